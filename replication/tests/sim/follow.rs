//! The guest's thread while the guest follows the other host's log, or is given its state.

use ftvmm_replication::{Check, CursorStep, DiskAnswer, Ordinal, SessionEvent, Slice};

use crate::coverage::Mark;
use crate::disk::{Compared, compare};
use crate::host::Stage;
use crate::world::World;

impl World {
    /// The next part of the state this host is given; whether the thread goes on at once.
    pub fn join(&mut self, host: usize) -> bool {
        let Some(part) = self.hosts[host].core.follower().next_part() else { return false };
        match self.put_part(host, &part) {
            Ok(stands) => self.core(host, |core, now_ns| {
                core.part_restored(now_ns, part.len_bytes(), stands);
            }),
            Err(description) => self.core(host, |core, now_ns| core.fault(now_ns, description)),
        }
        self.random.one_in(2)
    }

    /// One step of a follower; whether the thread goes on at once.
    pub fn follow(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        if own.core.follows() {
            assert!(!own.inputs_open || !own.outbox.is_empty(), "a follower hears the network");
            if own.core.follower().has_faulted() {
                return false;
            }
        }
        if own.core.takes_strays(self.now_ns) && self.random.one_in(10) {
            let frame = self.random.number().to_le_bytes().to_vec();
            self.core(host, |core, now_ns| core.strays(now_ns, vec![frame]));
        }
        match self.hosts[host].stage {
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
        let last = Ordinal(own.guest.at);
        let cursor = own.core.follower().cursor();
        if cursor.has_slice(last.next())
            && let CursorStep::Load(parts) = cursor.next(last.next())
        {
            self.load(host, last.0 + 1, &parts);
            return true;
        }
        if cursor.is_used_up(last.next()) {
            self.take_over(host, last);
            return true;
        }
        self.run_guest(host)
    }

    fn follow_at_exit(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        let at = own.guest.at;
        let before = Ordinal(at - 1);
        if let Some(answer) = own.awaited {
            return self.take_answer(host, answer);
        }
        // The match is here and nowhere else.
        match own.core.follower().cursor().next(Ordinal(at)) {
            CursorStep::Apply(input) => own.guest.apply(&input),
            CursorStep::ApplyDisk(answer) => own.awaited = Some(answer),
            CursorStep::Check(check) => self.compare_check(host, &check),
            CursorStep::Load(parts) => self.load(host, at, &parts),
            CursorStep::Proceed if self.options.ends_at.is_some_and(|ends_at| at >= ends_at) => {
                self.fault_at(host, "the guest ended, the recorder's went on");
            }
            CursorStep::Proceed => self.answer(host),
            CursorStep::Wait => {
                self.core(host, |core, now_ns| core.executed(now_ns, before));
                return false;
            }
            CursorStep::End(end) => {
                self.end(host, end.reason);
                return false;
            }
            CursorStep::Exhausted => self.take_over(host, before),
            CursorStep::Missed { record, .. } => {
                self.fault_at(host, &format!("went past '{record}'"));
            }
        }
        true
    }

    fn load(&mut self, host: usize, at: u64, parts: &[Slice]) {
        self.coverage.mark(Mark::SliceLoaded);
        self.hosts[host].guest.load(at, parts);
        self.hosts[host].stage = Stage::AtExit;
    }

    fn compare_check(&mut self, host: usize, check: &Check) {
        self.coverage.mark(Mark::CheckCompared);
        let own = self.hosts[host].guest.check(check.memory_look());
        if let Some(what) = own.difference(check) {
            self.fault_at(host, &what);
        }
    }

    /// The log says how a request ended; the own disk has the data.
    fn take_answer(&mut self, host: usize, answer: DiskAnswer) -> bool {
        let own = &mut self.hosts[host];
        if answer.id > own.disk.last_id {
            // It would be waited for for ever.
            own.awaited = None;
            self.fault_at(host, "a request ended that this guest never made");
            return true;
        }
        let Some(ours) = own.disk.take(answer.id) else {
            let before = Ordinal(own.guest.at - 1);
            self.core(host, |core, now_ns| core.executed(now_ns, before));
            return false;
        };
        own.awaited = None;
        self.coverage.mark(Mark::DiskCompared);
        match compare(ours, answer) {
            Compared::Apply(input) => own.guest.apply(&input),
            Compared::Failed => {
                let (id, description) = (answer.id, "failed here alone".to_owned());
                self.step(host, SessionEvent::DiskFailed { id, description });
                if !self.hosts[host].has_stopped() {
                    // The other is gone, and its guest was told another thing.
                    self.bad_disk_alone = true;
                    self.fault_at(host, "the disk failed here alone");
                }
            }
            Compared::Differ => self.fault_at(host, "the disks differ"),
        }
        true
    }

    fn fault_at(&mut self, host: usize, what: &str) {
        let description = format!("exit {}: {what}", self.hosts[host].guest.at);
        self.core(host, |core, now_ns| core.fault(now_ns, description));
    }

    /// The log is used up: this host's own inputs from now on.
    fn take_over(&mut self, host: usize, through: Ordinal) {
        let own = &mut self.hosts[host];
        own.is_live = true;
        if !self.flipped {
            self.checker.on_disk(&own.guest, &own.disk);
        }
        self.core(host, |core, now_ns| core.took_over(now_ns, through));
    }
}
