//! What this host's disk is, as its label says it (decision 0035).

use super::{Effect, PeerCore};
use crate::disk_label::{DiskMark, DiskState};
use crate::policy::StopReason;
use crate::record::Term;

impl PeerCore {
    /// Marks the disk. A host may take over before it has put all of the state it was sent in
    /// place: until then what is on its disk is not the guest's, whatever the host is.
    pub(super) fn mark_disk(&mut self, state: DiskState, term: Term) {
        let mark = match self.follower.is_joining() {
            true => {
                self.guest.disk_when_whole = state;
                DiskMark { state: DiskState::Incomplete, term }
            }
            false => DiskMark { state, term },
        };
        if self.guest.disk_mark.replace(mark) != Some(mark) {
            self.effects.push(Effect::MarkDisk(mark));
        }
    }

    /// What is to come over the disk counts, and what is on it no more.
    pub(super) fn disk_is_overwritten(&mut self, term: Term) {
        self.mark_disk(DiskState::Incomplete, term);
        self.guest.disk_when_whole = DiskState::Following;
    }

    /// The state that was to be put on the disk is.
    pub(super) fn disk_is_whole(&mut self) {
        if let Some(DiskMark { state: DiskState::Incomplete, term }) = self.guest.disk_mark {
            self.mark_disk(self.guest.disk_when_whole, term);
        }
    }

    /// What this host's disk is when the session is over: `None` when nothing more is known than
    /// during the run. A guest that ended in order leaves a clean disk on each host. One that was
    /// ended on order leaves one where it was active; the other host may not have come so far.
    #[must_use]
    pub fn disk_at_end(&self) -> Option<DiskMark> {
        let DiskMark { state, term } = self.guest.disk_mark?;
        let is_clean = match self.stop.as_ref()? {
            StopReason::Clean => state != DiskState::Incomplete,
            StopReason::HostRequest => state == DiskState::Active,
            _ => false,
        };
        is_clean.then_some(DiskMark { state: DiskState::Clean, term })
    }
}
