//! What goes wrong, and what the operator wants.

use ftvmm_replication::{Message, SessionEvent, Term, wire};

use crate::coverage::Mark;
use crate::host::Parcel;
use crate::options::Strike;
use crate::world::{Due, FAILURE_NS, FAULTS_END_NS, MS, OnHost, US, World};

impl World {
    pub fn fault(&mut self) {
        let victim = self.random.between(0, 2) as usize;
        let kind = self.random.between(0, 10);
        self.trace(&format!("fault {kind} at host {victim}"));
        match kind {
            0 | 1 => self.crash(victim),
            2 if self.random.one_in(3) => self.rubbish(victim),
            2 => self.cut_loudly(victim),
            // The connection breaks; one side is told, the other finds out.
            3 => {
                self.cut = true;
                self.disconnect(victim);
            }
            // The connection breaks in silence.
            4 => self.cut = true,
            5 | 6 => self.stick(victim),
            // Clients do not reach the host for a while.
            7 if self.is_paused(victim) => {}
            7 => {
                self.step(victim, SessionEvent::ClientLink { up: false });
                let down_ns = self.random.between(MS, 300 * MS);
                self.after_on(down_ns, victim, OnHost::LinkUp);
            }
            // The host stands still: shorter than the other waits for it, or longer.
            _ => {
                let pause_ns = self.random.between(MS, 150 * MS);
                self.pause(victim, pause_ns);
            }
        }
    }

    /// What was put off until the end of a pause comes then, so no pause ends one before it.
    fn pause(&mut self, victim: usize, pause_ns: u64) {
        let until_ns = &mut self.hosts[victim].held.paused_until_ns;
        *until_ns = (*until_ns).max(self.now_ns + pause_ns);
    }

    /// A crash; what was sent may still arrive, and the peer's kernel may tell it or not.
    fn crash(&mut self, victim: usize) {
        if self.random.one_in(2) {
            self.post(victim, Parcel::Closed);
        } else if self.random.one_in(2) {
            self.cut = true;
        }
        self.judge_disks();
        let own = &mut self.hosts[victim];
        own.crashed = true;
        if own.thread.has_half_a_slice && own.core.records_log() {
            self.coverage.mark(Mark::SliceTorn);
        }
        self.plan_replacement(victim);
    }

    /// The connection breaks and both are told at once.
    fn cut_loudly(&mut self, first: usize) {
        self.cut = true;
        self.disconnect(first);
        self.disconnect(1 - first);
    }

    /// What comes to a host is no message, and no network made it.
    fn rubbish(&mut self, victim: usize) {
        self.post(1 - victim, Parcel::Bytes(vec![0xff; 9]));
    }

    /// The guest's processor does not come back for a while; the rest of the host is well.
    fn stick(&mut self, victim: usize) {
        let stuck_ns = self.random.between(MS, 250 * MS);
        self.hosts[victim].held.stuck_until_ns = self.now_ns + stuck_ns;
        self.after_on(FAILURE_NS, victim, OnHost::Watch);
    }

    /// A guest that waits for the other host is not stuck, wherever its thread is.
    pub fn watch(&mut self, host: usize) {
        let own = &self.hosts[host];
        if self.now_ns < own.held.stuck_until_ns
            && own.thread.begun
            && !own.core.session().is_yielding()
        {
            self.step(host, SessionEvent::VcpuStuck { unseen_ns: FAILURE_NS });
        }
    }

    /// The ambush.
    pub fn strike(&mut self, host: usize) {
        let Some((_, strike)) = self.options.ambush else { return };
        self.trace(&format!("{strike:?} at host {host}"));
        let reached = if strike == Strike::StopOther { 1 - host } else { host };
        if self.is_paused(reached) {
            return self.after_on(MS, host, OnHost::Strike);
        }
        match strike {
            Strike::Cut => self.cut_loudly(host),
            Strike::CutInSilence => self.cut = true,
            Strike::Crash => self.crash(host),
            Strike::CrashOther => self.crash(1 - host),
            Strike::CrashInSlice => {
                let own = &self.hosts[host];
                match own.thread.has_half_a_slice && own.core.records_log() {
                    true => self.crash(host),
                    false if self.now_ns < FAULTS_END_NS => {
                        self.after_on(50 * US, host, OnHost::Strike);
                    }
                    false => {}
                }
            }
            Strike::Stop => self.step(host, SessionEvent::HostStop),
            Strike::StopOther => self.step(1 - host, SessionEvent::HostStop),
            Strike::Detach => self.step(host, SessionEvent::Detach),
            Strike::FlipAndCut => self.flip_and_cut(host),
            Strike::Forge => self.forge(host),
            Strike::BadDisk => self.hosts[host].disk.is_bad = true,
            // The witness does not know of the guest yet.
            Strike::StartAnother => {
                let waits = self.hosts[host].core.session().state_name() == "AwaitingReady";
                self.faults.other_guest = waits && self.witness.store.starts_another();
            }
            Strike::Pause => {
                // A digest may be on its way.
                let pause_ns = self.random.between(FAILURE_NS, 3 * FAILURE_NS);
                self.pause(host, pause_ns);
            }
            Strike::Stuck => {
                self.hosts[host].held.stuck_until_ns = self.now_ns + 150 * MS;
                self.after_on(FAILURE_NS, host, OnHost::Watch);
            }
        }
    }

    /// The guest stands still while its log comes; then it differs from it, and the other is gone.
    fn flip_and_cut(&mut self, host: usize) {
        if !self.faults.flipped {
            self.faults.flipped = true;
            self.hosts[host].thread.guest.state ^= 1;
            let stuck_ns = self.random.between(10 * MS, 90 * MS);
            self.hosts[host].held.stuck_until_ns = self.now_ns + stuck_ns;
            self.faults.strikes = 0;
            return self.after_on(10 * MS, host, OnHost::Strike);
        }
        self.cut_loudly(host);
    }

    /// A host says a thing which one of this build does not say then.
    fn forge(&mut self, host: usize) {
        let other = &self.hosts[1 - host];
        let Some(term) = other.core.session().term().filter(|term| *term > Term(0)) else { return };
        self.faults.forged = true;
        let mut bytes = Vec::new();
        wire::encode(&Message::StandDown { term }, &mut bytes);
        self.post(1 - host, Parcel::Bytes(bytes));
    }

    // The operator.

    pub fn order(&mut self) {
        let host = self.random.between(0, 2) as usize;
        let kind = if self.options.only_switches { 0 } else { self.random.between(0, 13) };
        self.trace(&format!("order {kind} to host {host}"));
        if kind == 12 {
            return self.start_beside();
        }
        if self.hosts[host].is_gone() || self.is_paused(host) {
            return;
        }
        match kind {
            0..6 => self.core(host, |core, _| core.want_switch()),
            6..9 => self.step(host, SessionEvent::Detach),
            9..11 => self.begin_sending(host, None),
            _ => self.stop(host),
        }
    }

    /// The user asks a host to stop: an active one ends it, one that follows
    /// leaves.
    fn stop(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        match own.thread.begun && !own.core.follows() {
            true => own.thread.ending = true,
            false => self.step(host, SessionEvent::HostStop),
        }
    }

    pub fn plan_replacement(&mut self, host: usize) {
        if self.options.replaces && self.now_ns < FAULTS_END_NS {
            let delay_ns = self.random.between(5 * MS, 60 * MS);
            self.after(delay_ns, Due::Replace(host));
        }
    }

    pub fn replace(&mut self, host: usize) {
        let other = &self.hosts[1 - host];
        if !self.hosts[host].is_gone() || other.is_gone() || !other.thread.begun {
            return self.plan_replacement(host);
        }
        self.trace(&format!("host {host} is replaced"));
        self.judge_disks();
        // As a supervisor does, which knows nothing of roles.
        self.start_beside();
        let term = self.witness(host).term();
        self.hosts[host].replaced(&self.options, term);
        self.checker.on_silent(host);
        self.see_phase(host);
    }
}
