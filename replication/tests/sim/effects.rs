//! What a host's core has decided: seen at once, done in order and perhaps a little later.

use ftvmm_replication::peer::Notice;
use ftvmm_replication::{Effect, Ordinal, Role, SessionEvent, StopReason, Term};

use crate::checker::Right;
use crate::coverage::Mark;
use crate::guest::Guest;
use crate::host::Stage;
use crate::world::{Due, FAULTS_END_NS, MS, OnHost, US, World};

impl World {
    /// After a call of a host's core.
    pub fn pump(&mut self, host: usize) {
        self.note_state(host);
        self.see_phase(host);
        self.start_guest(host);
        self.plan_tick(host);
        let own = &self.hosts[host];
        if own.pump.performs || own.pump.performs_late || !own.has_effects() {
            return;
        }
        match self.random.one_in(4) {
            true => {
                self.coverage.mark(Mark::PerformedLate);
                self.hosts[host].pump.performs_late = true;
                let delay_ns = self.random.between(US, 500 * US);
                self.after_on(delay_ns, host, OnHost::Perform);
            }
            false => self.perform_all(host),
        }
    }

    fn plan_tick(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        if let Some(deadline_ns) = own.core.next_deadline_ns()
            && own.held.tick_due_ns.is_none_or(|due_ns| deadline_ns < due_ns)
        {
            own.held.tick_due_ns = Some(deadline_ns);
            let late_ns = self.random.between(0, 300 * US);
            let delay_ns = deadline_ns.saturating_sub(self.now_ns) + late_ns;
            self.after_on(delay_ns, host, OnHost::Tick);
        }
    }

    fn start_guest(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        let Some(begin) = own.core.begin().filter(|_| !own.thread.begun) else { return };
        (own.thread.begun, own.thread.is_live) = (true, !own.core.follows());
        self.witness.guest_has_run |= own.thread.is_live;
        // A successor keeps the guest of its predecessor for the checker until it has one.
        if !own.core.follower().is_joining() {
            own.thread.guest = Guest::new(begin.rtc_epoch_s);
            own.thread.stage = Stage::AtExit;
        }
        self.after_on(0, host, OnHost::Turn);
    }

    /// What this host has of the other's log and state, as the checker needs it.
    fn note_state(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        let is_on_its_way = own.core.session().state_name() == "Joining";
        // Between two looks a host may have begun to join and be through with it.
        if own.core.follower().is_joining()
            && !is_on_its_way
            && !own.has_stopped()
            && let Some((at, disk_through)) = own.state.offered.take()
        {
            (own.seen.received_through, own.state.state_through) = (at - 1, at - 1);
            self.checker.on_flushed(host, own.life, disk_through);
        }
        if own.core.follows()
            && let Some(Ordinal(horizon)) = own.core.follower().cursor().horizon()
        {
            own.seen.received_through = own.seen.received_through.max(horizon);
        }
    }

    /// What must hold when it is done.
    fn observe(&mut self, host: usize, effect: &Effect) {
        let life = self.hosts[host].life;
        match effect {
            Effect::Tell(Notice::Decided { row, .. }) => self.coverage.row(row.letter),
            Effect::Tell(
                Notice::TakesOver { term: Term(term) } | Notice::GoesAlone { term: Term(term) },
            ) => self.checker.on_speaks(host, life, *term),
            Effect::Tell(Notice::Follows { .. }) => {
                let horizon = self.hosts[host].core.follower().cursor().horizon();
                self.hosts[host].seen.received_through = horizon.map_or(0, |through| through.0);
            }
            Effect::CompleteFlushes { through } if !self.faults.flipped => {
                let own = &self.hosts[host];
                // A state that is on its way holds what was done before it was taken.
                let offered = self.hosts[1 - host].state.offered;
                let is_in_state = offered.is_some_and(|(_, disk)| disk >= *through);
                let is_followed = own.core.records_log() && !is_in_state;
                let peer = is_followed.then_some((1 - host, own.wire.peer_life));
                if peer.is_some() {
                    self.coverage.mark(Mark::FlushOnBoth);
                }
                self.checker.on_flush_told(*through, (host, life), peer);
            }
            Effect::Tell(Notice::Resumed { messages }) => {
                self.coverage.mark(if *messages > 0 { Mark::SentAgain } else { Mark::Resumed });
            }
            Effect::Tell(Notice::Over { reason: StopReason::DiskFailed { .. } }) => {
                self.coverage.mark(Mark::LeftWithDisk);
            }
            Effect::KeepIncident(report) => {
                assert!(
                    self.faults.flipped || self.faults.forged || self.faults.bad_disk_alone,
                    "a divergence out of nothing: {report}"
                );
            }
            _ => {}
        }
    }

    /// Does what was decided. What that leads to comes after it.
    pub fn perform_all(&mut self, host: usize) {
        if std::mem::replace(&mut self.hosts[host].pump.performs, true) {
            return;
        }
        while self.hosts[host].has_effects() {
            let own = &mut self.hosts[host];
            if own.core.has_release() {
                own.core.release(self.now_ns);
            }
            let effects = own.core.take_effects();
            effects.iter().for_each(|effect| self.observe(host, effect));
            self.hosts[host].pump.outbox.extend(effects);
            while let Some(effect) = self.hosts[host].pump.outbox.pop_front() {
                self.perform(host, effect);
            }
        }
        self.hosts[host].pump.performs = false;
    }

    fn perform(&mut self, host: usize, effect: Effect) {
        match &effect {
            Effect::Send(bytes) => self.trace(&format!("host {host}: {} bytes", bytes.len())),
            effect => self.trace(&format!("host {host}: {effect:?}")),
        }
        let own = &mut self.hosts[host];
        match effect {
            Effect::Send(bytes) => self.send_cut(host, bytes),
            Effect::Prove { number } => self.plan_proof(host, number),
            Effect::LookFor { number, nonce } => self.plan_look(host, number, nonce),
            Effect::LogSent => {
                let took_ns = self.random.between(0, 150 * US);
                self.hosts[host].core.log_sent(self.now_ns + took_ns);
            }
            Effect::HangUp => self.close(host),
            Effect::BreakOff => self.break_off(host),
            Effect::Transmit(frame) => self.transmit(host, &frame),
            Effect::ClaimTerm(term) => self.plan_claim(host, term, term),
            Effect::HoldTerm(term) => self.plan_claim(host, term, Term(0)),
            Effect::SendState { number } => self.begin_sending(host, Some(number)),
            Effect::LookAtLogIn { ns } => {
                let late_ns = self.random.between(0, 300 * US);
                self.after_on(ns + late_ns, host, OnHost::LookAtLog);
            }
            Effect::OpenInputs => own.thread.inputs_open = true,
            Effect::CloseInputs => self.close_inputs(host),
            Effect::GiveFrames(frames) => {
                own.thread.inbox.extend(frames);
                self.coverage.mark(Mark::StraysGiven);
            }
            Effect::InterruptGuest | Effect::RequestAttention => own.held.computes_until_ns = 0,
            Effect::StopGuest => {
                let is_clean = own.core.stop() == Some(&StopReason::Clean);
                self.close(host);
                if !is_clean {
                    self.plan_replacement(host);
                }
            }
            Effect::CompleteFlushes { through } => own.disk.complete_flushes(through),
            Effect::CompleteDisk { id } => own.disk.complete(id),
            Effect::MarkDisk(mark) => own.disk.mark = mark,
            Effect::Tell(
                Notice::TakesOver { term: Term(term) } | Notice::GoesAlone { term: Term(term) },
            ) => own.seen.own_term = Some(term),
            Effect::Tell(Notice::Protected { .. }) => own.seen.own_term = None,
            Effect::Announce => self.checker.on_announced((host, own.life)),
            Effect::Tell(_) | Effect::KeepIncident(_) => {}
        }
    }

    fn plan_claim(&mut self, host: usize, term: Term, ran: Term) {
        let life = self.hosts[host].life;
        let delay_ns = self.random.between(100 * US, self.options.witness.ns_max);
        self.after(delay_ns, Due::Judge { host, life, term, ran });
    }

    fn close_inputs(&mut self, host: usize) {
        self.checker.on_silent(host);
        let own = &mut self.hosts[host];
        (own.seen.own_term, own.thread.inputs_open, own.state.sender) = (None, false, None);
        let frames: Vec<_> = own.thread.inbox.drain(..).collect();
        let was_ending = std::mem::take(&mut own.thread.ending);
        if !frames.is_empty() && own.core.takes_strays(self.now_ns) {
            self.core(host, |core, now_ns| core.strays(now_ns, frames));
        }
        if was_ending {
            self.step(host, SessionEvent::HostStop);
        }
    }

    fn transmit(&mut self, host: usize, frame: &[u8]) {
        let own = &self.hosts[host];
        let right = match own.seen.own_term {
            Some(term) => Right::Own { term },
            None => {
                assert!(
                    own.has_stopped() || own.core.session().role() == Role::Primary,
                    "a backup speaks without a term"
                );
                let other = &self.hosts[1 - host];
                let (backup_received, in_state) =
                    (other.seen.received_through, other.state.state_through);
                Right::Gated { backup_received, in_state }
            }
        };
        let trusted = self.is_trusted();
        let [first, second] = &self.hosts;
        let guests = [&first.thread.guest, &second.thread.guest];
        let sender = (host, self.hosts[host].life);
        let repeats =
            self.checker.on_frame(sender, frame, &right, self.options.release, guests, trusted);
        if repeats {
            self.coverage.mark(Mark::Repeated);
        }
        if self.now_ns > FAULTS_END_NS + 200 * MS {
            self.hosts[host].seen.frames_after_faults += 1;
        }
    }
}
