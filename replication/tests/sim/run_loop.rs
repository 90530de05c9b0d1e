//! The guest's thread, and the host's disk beside it.

use ftvmm_devices::{DiskOp, DiskOutcome, DiskRequest, Input, Output};
use ftvmm_replication::{
    End, EndReason, Event, MemoryCheckMode, Ordinal, OutputDigest, Record, SessionEvent,
};

use crate::coverage::Mark;
use crate::disk::Completion;
use crate::host::{GATED_FRAMES_MAX, Stage};
use crate::world::{BACKUP, FAULTS_END_NS, MS, OnHost, US, World};

/// Frames that wait at most: what the gate holds, and as many again where the guest is let go on so
/// that its state can be taken, or where frames are decided and not performed.
const UNSEEN_MAX: u64 = 2 * GATED_FRAMES_MAX;

/// What a guest left behind before it went computing is with the other host after that, timers that
/// are late included.
const TAIL_NS_MAX: u64 = 7 * MS;

impl World {
    /// The guest's thread of a host goes on, if it may.
    pub fn turn(&mut self, host: usize) {
        if self.hosts[host].has_stopped() {
            return;
        }
        let delay_ns = self.random.between(20 * US, MS);
        self.after_on(delay_ns, host, OnHost::Turn);
        while self.advance(host) {}
    }

    /// One step; whether the thread goes on at once.
    fn advance(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        let now_ns = self.now_ns;
        if own.has_stopped()
            || own.thread.stage == Stage::Running && now_ns < own.held.computes_until_ns
        {
            return false;
        }
        if std::mem::take(&mut own.held.computes_until_ns) > 0
            && own.core.records_log()
            && now_ns > own.held.computes_since_ns.max(own.held.paused_until_ns) + TAIL_NS_MAX
        {
            assert!(!own.core.log().has_records(), "a guest that computes leaves its log unsent");
        }
        if let Some(part) = own.thread.slices.pop_front() {
            let is_last = part.is_last();
            own.thread.has_half_a_slice = !is_last;
            self.log(host, Event::Slice(part));
            if !is_last && self.random.one_in(2) {
                // As after a part of its full size.
                self.core(host, |core, now_ns| core.flush_log(now_ns));
            }
            return self.random.one_in(2);
        }
        if let Some(part) = own.state.snapshot.pop_front() {
            self.put_part(host, &part).expect("a disk that is new");
            return true;
        }
        if own.core.follower().is_joining() {
            (own.thread.awaited, own.thread.is_live) = (None, false);
            (own.thread.ended, own.thread.ending) = (false, false);
            return self.join(host);
        }
        if own.thread.ended {
            return false;
        }
        if own.thread.is_live
            && own.thread.stage != Stage::Left
            && own.core.wants_yield()
            && self.core(host, |core, now_ns| core.change_role(now_ns))
        {
            return false;
        }
        let own = &mut self.hosts[host];
        if own.core.session().is_yielding() {
            return false;
        }
        // Its thread may not have had its turn since, and this host may be live again.
        if own.thread.is_live && own.core.follower().is_active() {
            (own.thread.is_live, own.thread.awaited) = (false, None);
            own.thread.replayer.start_after(own.core.log().horizon());
        }
        match own.thread.is_live {
            true => self.live(host),
            false => self.follow(host),
        }
    }

    fn live(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        let wants_stop = own.state.sender.as_ref().is_some_and(|sender| sender.wants_stop());
        match own.thread.stage {
            Stage::AtExit if wants_stop => self.save_state(host),
            Stage::AtExit => self.record(host),
            Stage::Left => {
                let is_wanted =
                    own.core.wants_yield() || own.core.follower().is_joining() || wants_stop;
                if own.core.is_congested() && !is_wanted {
                    self.coverage.mark(Mark::Congested);
                    return false;
                }
                self.answer(host);
                true
            }
            Stage::Running => self.run_live(host, wants_stop),
        }
    }

    pub fn log(&mut self, host: usize, event: Event) {
        let record = Record { at: Ordinal(self.hosts[host].thread.guest.at), event };
        self.core(host, |core, now_ns| core.append(now_ns, &record));
    }

    /// The guest stands at an exit and takes this host's inputs.
    fn record(&mut self, host: usize) -> bool {
        let own = &self.hosts[host];
        let at = own.thread.guest.at;
        assert!(own.thread.inputs_open || own.has_effects(), "the guest hears nothing");
        if self.random.one_in(3) {
            self.core(host, |core, now_ns| core.idle(now_ns));
        }
        for input in self.inputs(host) {
            self.log(host, Event::Input(input.clone()));
            self.hosts[host].thread.guest.apply(&input);
        }
        let own = &mut self.hosts[host];
        if own.thread.ending || self.options.ends_at.is_some_and(|ends_at| at >= ends_at) {
            self.end(host, own_reason(self.hosts[host].thread.ending));
            return false;
        }
        if self.random.one_in(10) {
            let look = [MemoryCheckMode::None, MemoryCheckMode::Digest, MemoryCheckMode::Renew];
            let look = look[self.random.between(0, 3) as usize];
            let check = self.hosts[host].thread.guest.check(look);
            self.log(host, Event::Check(Box::new(check)));
        }
        self.core(host, |core, now_ns| core.exit_complete(now_ns, Ordinal(at)));
        self.hosts[host].thread.stage = Stage::Left;
        true
    }

    fn inputs(&mut self, host: usize) -> Vec<Input> {
        let own = &mut self.hosts[host];
        let mut inputs: Vec<_> =
            own.thread.inbox.drain(..).map(|frame| Input::NetRx { frame }).collect();
        while let Some(input) = own.disk.take_completed() {
            if self.now_ns > FAULTS_END_NS + 200 * MS {
                own.seen.answers_after_faults += 1;
            }
            if let Input::DiskDone { outcome: DiskOutcome::Failed, .. } = input {
                self.coverage.mark(Mark::DiskFailureTold);
            }
            inputs.push(input);
        }
        let now_ns = self.now_ns;
        for _ in 0..self.random.between(0, 3) {
            inputs.push(match self.random.one_in(3) && self.hosts[host].thread.inputs_open {
                true => Input::NetRx { frame: self.random.number().to_le_bytes().to_vec() },
                false => Input::Time { now_ns },
            });
        }
        inputs
    }

    /// The exit is answered: what the guest sends there goes to the session and to the disk.
    pub fn answer(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        own.thread.stage = Stage::Running;
        let outputs = own.thread.guest.answer();
        let (at, chain) = (Ordinal(own.thread.guest.at), own.thread.guest.chain());
        for output in outputs {
            match output {
                Output::Frame(frame) => {
                    let digest = OutputDigest::of(at, chain, &frame);
                    self.core(host, |core, now_ns| {
                        core.flush_log(now_ns);
                        core.step(now_ns, SessionEvent::Output { at, digest, frame });
                    });
                }
                Output::Disk(request) => self.submit(host, request),
                Output::Console(_) => {}
            }
        }
        let own = &self.hosts[host];
        if own.core.session().is_protected() && own.core.records_log() {
            let unseen = (own.thread.guest.sent.len() as u64).saturating_sub(self.checker.seen());
            assert!(unseen <= UNSEEN_MAX, "{unseen} frames of a protected guest wait");
        }
    }

    fn run_live(&mut self, host: usize, wants_stop: bool) -> bool {
        if self.hosts[host].core.is_unrecorded() && self.random.one_in(4) {
            // No log names the point.
            let inputs = self.inputs(host);
            inputs.iter().for_each(|input| self.hosts[host].thread.guest.apply(input));
        }
        if self.random.one_in(12) || wants_stop && self.random.one_in(2) {
            self.kick(host);
            return self.random.one_in(2);
        }
        self.run_guest(host)
    }

    /// Stops the guest between two exits, where a slice names the point.
    fn kick(&mut self, host: usize) {
        for _ in 0..self.random.between(0, 4) {
            self.hosts[host].thread.guest.compute();
        }
        let parts = self.random.between(1, 4) as usize;
        let own = &mut self.hosts[host];
        own.thread.slices = own.thread.guest.capture(parts).into();
        own.thread.stage = Stage::AtExit;
    }

    /// The guest goes on to its next exit, or computes for long.
    pub fn run_guest(&mut self, host: usize) -> bool {
        if self.random.one_in(200) {
            let computes_ns = self.random.between(MS, 20 * MS);
            let own = &mut self.hosts[host];
            own.held.computes_since_ns = self.now_ns;
            own.held.computes_until_ns = self.now_ns + computes_ns;
            return false;
        }
        let own = &mut self.hosts[host];
        own.thread.guest.run();
        own.thread.stage = Stage::AtExit;
        if host == BACKUP
            && !self.faults.flipped
            && self.faults.flip_at.is_some_and(|flip_at| own.thread.guest.at >= flip_at)
        {
            self.faults.flipped = true;
            own.thread.guest.state ^= 1;
        }
        self.random.one_in(3)
    }

    /// The guest ends at the exit it stands at.
    pub fn end(&mut self, host: usize, reason: EndReason) {
        let own = &mut self.hosts[host];
        own.thread.ended = true;
        let (state_digest, chain) = (own.thread.guest.digest(), own.thread.guest.chain());
        let end = End { state_digest, chain, outputs: 0, reason };
        let at = Ordinal(own.thread.guest.at);
        self.core(host, |core, now_ns| core.guest_ended(now_ns, at, end));
    }

    // The disk.

    fn submit(&mut self, host: usize, request: DiskRequest) {
        if request.op == DiskOp::Flush {
            self.core(host, |core, now_ns| {
                core.step(now_ns, SessionEvent::FlushAsked { id: request.id });
                core.flush_log(now_ns);
            });
        }
        self.hosts[host].disk.submit(request);
        let delay_ns = self.random.between(20 * US, 5 * MS);
        self.after_on(delay_ns, host, OnHost::Disk);
    }

    pub fn carry_out(&mut self, host: usize) {
        let one_in = self.options.disk_fails;
        let by_chance = one_in > 0 && self.now_ns < FAULTS_END_NS && self.random.one_in(one_in);
        let own = &mut self.hosts[host];
        let fails = by_chance || !own.disk.queue.is_empty() && std::mem::take(&mut own.disk.is_bad);
        let Some(completion) = own.disk.carry_out(fails) else { return };
        if completion.is_flush && !fails {
            self.checker.on_flushed(host, own.life, completion.id);
        }
        self.on_disk_completion(host, &completion);
    }

    fn on_disk_completion(&mut self, host: usize, completion: &Completion) {
        let own = &mut self.hosts[host];
        // Of a guest that another's state replaces: its numbers will be given again.
        if own.core.follower().is_joining() || own.has_stopped() {
            return;
        }
        let id = completion.id;
        let has_failed = completion.outcome == DiskOutcome::Failed;
        let leaves = self.options.disk_failover || completion.is_flush && own.core.follows();
        match has_failed {
            false if completion.is_flush => self.step(host, SessionEvent::DiskFlushed { id }),
            true if leaves => {
                let description = format!("request {id} failed");
                self.step(host, SessionEvent::DiskFailed { id, description });
            }
            _ => own.disk.complete(id),
        }
    }
}

fn own_reason(is_asked: bool) -> EndReason {
    if is_asked { EndReason::HostRequest } else { EndReason::PowerOff }
}
