//! The guest's disk in a pair. Completions of this host's worker go to the session. A backup
//! compares each completion in its log with that of its own disk.

use std::sync::Arc;

use ftvmm_devices::Input;
use ftvmm_machine::disk_completion::Completion;
use ftvmm_replication::{DiskAnswer, DiskComparison, DiskMark, SessionEvent};

use super::Peer;

/// What a follower does about a request that ended in its log.
pub enum Compared {
    /// Give this to the guest.
    Apply(Input),
    /// This host's disk failed where the other's did not.
    Failed {
        /// What failed.
        description: String,
    },
    /// The two disks have different completions.
    Differ {
        /// The request, its sector, both digests.
        description: String,
    },
}

/// Compares this host's completion with the primary's, and says what differs.
pub fn compare(own: Completion, primary: DiskAnswer) -> Compared {
    let (id, sector, failure) = (own.id, own.sector.unwrap_or_default(), own.failure());
    match primary.compare(own.outcome) {
        DiskComparison::Apply(input) => Compared::Apply(input),
        DiskComparison::OwnFailed => Compared::Failed { description: failure.unwrap_or_default() },
        DiskComparison::Differ { ours, theirs } => Compared::Differ {
            description: format!(
                "the disks differ: request {id} read xxh3 {ours:016x} from sector {sector} here, \
                 {theirs:016x} on the primary"
            ),
        },
    }
}

impl Peer {
    /// Makes the disk's worker report completions to the session. The guest gets those that the
    /// session allows.
    pub fn watch_disk(self: &Arc<Self>) {
        let peer = Arc::clone(self);
        if let Some(disk) = &self.disk {
            disk.on_completion(move |completion| peer.disk_completed(completion));
        }
    }

    /// From now on this host's disk is this.
    pub(super) fn mark_disk(&self, mark: DiskMark) {
        if let Some(disk) = &self.disk {
            disk.mark(mark);
        }
    }

    /// The run is over: everything is on the disk, and its label says whether the guest ended in
    /// order.
    pub fn close_disk(&self) {
        let mark = self.lock().disk_at_end();
        if let (Some(disk), Some(mark)) = (&self.disk, mark) {
            disk.close(mark);
        }
    }

    fn disk_completed(self: &Arc<Self>, completion: &Completion) {
        let id = completion.id;
        let tells_guest = self.tell(|core, now_ns| {
            // The completion belongs to a guest whose state is being replaced. Its request numbers
            // will be used again.
            if core.is_joining() {
                return false;
            }
            match completion.failure() {
                None if completion.is_flush => core.step(now_ns, SessionEvent::DiskFlushed { id }),
                // The primary waits for a follower's flush, so that its log cannot say how to go
                // on.
                Some(description)
                    if self.limits.disk_failover || completion.is_flush && core.follows() =>
                {
                    core.step(now_ns, SessionEvent::DiskFailed { id, description });
                }
                _ => return true,
            }
            false
        });
        if tells_guest {
            self.complete_disk(id);
            // A backup may be waiting for this completion.
            self.wake();
        }
    }

    /// A live guest may have the disk's completions of its flushes up to this one.
    pub(super) fn complete_flushes(&self, through: u64) {
        if let Some(disk) = &self.disk {
            disk.complete_flushes(through);
            self.queue.disk_completed();
        }
    }

    /// A live guest may have the disk's completion to this request.
    pub(super) fn complete_disk(&self, id: u64) {
        if let Some(disk) = &self.disk {
            disk.complete(id);
            self.queue.disk_completed();
        }
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::DiskOutcome;

    use super::*;

    fn completion(outcome: DiskOutcome) -> Completion {
        let error = (outcome == DiskOutcome::Failed).then(|| "Input/output error".to_owned());
        Completion { id: 3, sector: Some(8), is_flush: false, outcome, error }
    }

    fn read(byte: u8) -> DiskOutcome {
        DiskOutcome::Done { data: vec![byte; 512] }
    }

    #[test]
    fn the_guest_is_told_the_same_on_both_hosts_or_the_difference_is_named() {
        let primary = |outcome: &DiskOutcome| DiskAnswer::of(3, outcome);
        let applied = |own, theirs: &DiskOutcome| match compare(completion(own), primary(theirs)) {
            Compared::Apply(Input::DiskDone { id: 3, outcome }) => outcome,
            _ => panic!("not applied"),
        };
        assert_eq!(applied(read(1), &read(1)), read(1));
        assert_eq!(applied(read(1), &DiskOutcome::Failed), DiskOutcome::Failed);
        assert_eq!(applied(DiskOutcome::Failed, &DiskOutcome::Failed), DiskOutcome::Failed);
        match compare(completion(DiskOutcome::Failed), primary(&read(1))) {
            Compared::Failed { description } => {
                assert_eq!(description, "request 3 at sector 8: Input/output error");
            }
            _ => panic!("this host has to leave"),
        }
        match compare(completion(read(1)), primary(&read(2))) {
            Compared::Differ { description } => {
                assert!(description.contains("request 3 "), "{description}");
                assert!(description.contains("sector 8 "), "{description}");
            }
            _ => panic!("different data"),
        }
    }
}
