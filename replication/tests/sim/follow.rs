//! The guest's thread while the guest follows the other host's log, or is given its state.

use ftvmm_replication::{
    DiskAnswer, DiskComparison, MemoryCheckMode, Ordinal, ReplayStep, SessionEvent, Slice,
};

use crate::coverage::Mark;
use crate::host::Stage;
use crate::world::World;

impl World {
    /// The next part of the state this host is given; whether the thread goes on at once.
    pub fn join(&mut self, host: usize) -> bool {
        let Some(part) = self.hosts[host].core.follower().next_part() else { return false };
        match self.put_part(host, &part) {
            Ok(stands) => {
                if let Some(at) = stands {
                    self.hosts[host].thread.replayer.start_after(Ordinal(at.0 - 1));
                }
                self.core(host, |core, now_ns| {
                    core.part_restored(now_ns, part.len_bytes(), stands.is_some());
                });
            }
            Err(description) => self.core(host, |core, now_ns| core.fault(now_ns, description)),
        }
        self.random.one_in(2)
    }

    /// One step of a follower; whether the thread goes on at once.
    pub fn follow(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        if own.core.follows() {
            assert!(!own.thread.inputs_open || own.has_effects(), "a follower hears the network");
            if own.core.follower().has_faulted() {
                return false;
            }
        }
        if own.core.takes_strays(self.now_ns) && self.random.one_in(10) {
            let frame = self.random.number().to_le_bytes().to_vec();
            self.core(host, |core, now_ns| core.strays(now_ns, vec![frame]));
        }
        match self.hosts[host].thread.stage {
            Stage::Left => {
                self.answer(host);
                true
            }
            Stage::Running => self.follow_between(host),
            Stage::AtExit => self.follow_at_exit(host),
        }
    }

    /// Between two exits a follower looks for a slice, and for the end of the log.
    fn follow_between(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        let last = Ordinal(own.thread.guest.at);
        match own.thread.replayer.between_exits(own.core.follower().cursor(), last) {
            ReplayStep::Load(parts) => self.load(host, last.0 + 1, &parts),
            ReplayStep::UsedUp => self.take_over(host, last),
            _ => return self.run_guest(host),
        }
        true
    }

    fn follow_at_exit(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        let at = own.thread.guest.at;
        let before = Ordinal(at - 1);
        if let Some(answer) = own.thread.awaited {
            return self.take_answer(host, answer);
        }
        self.report(host, before, false);
        let own = &mut self.hosts[host];
        match own.thread.replayer.at_exit(own.core.follower().cursor(), Ordinal(at)) {
            ReplayStep::Apply(input) => own.thread.guest.apply(&input),
            ReplayStep::CompareDisk(answer) => own.thread.awaited = Some(answer),
            ReplayStep::Measure { memory } => self.compare_check(host, memory),
            ReplayStep::Load(parts) => self.load(host, at, &parts),
            ReplayStep::Proceed if self.options.ends_at.is_some_and(|ends_at| at >= ends_at) => {
                self.fault_at(host, "the guest ended, the recorder's went on");
            }
            ReplayStep::Proceed => self.answer(host),
            ReplayStep::Wait => {
                self.report(host, before, true);
                return false;
            }
            ReplayStep::Ended => {
                let end = own.thread.replayer.end().expect("it has just come to that");
                self.end(host, end.reason);
                return false;
            }
            ReplayStep::UsedUp => self.take_over(host, before),
            ReplayStep::Missed(record) => self.fault_at(host, &format!("went past '{record}'")),
        }
        true
    }

    /// Tells the primary that exit `left` is done, now and then or before the guest waits.
    fn report(&mut self, host: usize, left: Ordinal, waits: bool) {
        if self.hosts[host].thread.replayer.report_is_due(left, waits) {
            self.step(host, SessionEvent::Executed(left));
        }
    }

    fn load(&mut self, host: usize, at: u64, parts: &[Slice]) {
        self.coverage.mark(Mark::SliceLoaded);
        self.hosts[host].thread.guest.load(at, parts);
        self.hosts[host].thread.stage = Stage::AtExit;
    }

    fn compare_check(&mut self, host: usize, memory: MemoryCheckMode) {
        self.coverage.mark(Mark::CheckCompared);
        let own = &mut self.hosts[host];
        let check = own.thread.guest.check(memory);
        if let Some(what) = own.thread.replayer.difference(&check) {
            self.fault_at(host, &what);
        }
    }

    /// The log says how a request ended; the own disk has the data.
    fn take_answer(&mut self, host: usize, answer: DiskAnswer) -> bool {
        let own = &mut self.hosts[host];
        if answer.id > own.disk.last_id {
            // It would be waited for for ever.
            own.thread.awaited = None;
            self.fault_at(host, "a request ended that this guest never made");
            return true;
        }
        let Some(ours) = own.disk.take(answer.id) else {
            let before = Ordinal(own.thread.guest.at - 1);
            self.report(host, before, true);
            return false;
        };
        own.thread.awaited = None;
        self.coverage.mark(Mark::DiskCompared);
        match answer.compare(ours.outcome) {
            DiskComparison::Apply(input) => own.thread.guest.apply(&input),
            DiskComparison::OwnFailed => {
                let (id, description) = (answer.id, "failed here alone".to_owned());
                self.step(host, SessionEvent::DiskFailed { id, description });
                if !self.hosts[host].has_stopped() {
                    // The other is gone, and its guest was told another thing.
                    self.faults.bad_disk_alone = true;
                    self.fault_at(host, "the disk failed here alone");
                }
            }
            DiskComparison::Differ { .. } => self.fault_at(host, "the disks differ"),
        }
        true
    }

    fn fault_at(&mut self, host: usize, what: &str) {
        let description = format!("exit {}: {what}", self.hosts[host].thread.guest.at);
        self.core(host, |core, now_ns| core.fault(now_ns, description));
    }

    /// The log is used up: this host's own inputs from now on.
    fn take_over(&mut self, host: usize, through: Ordinal) {
        let own = &mut self.hosts[host];
        own.thread.is_live = true;
        if !self.faults.flipped {
            self.checker.on_disk(&own.thread.guest, &own.disk);
        }
        self.core(host, |core, now_ns| core.took_over(now_ns, through));
    }
}
