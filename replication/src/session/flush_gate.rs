//! When a flush of the guest's disk completes: when both hosts' disks have completed it.
//!
//! Why: what a guest was told is on its disk must be on the disk of whichever host goes on.
//! Requests are executed in the order of their numbers, so a host that has carried out a flush has
//! carried out every one before it: a number says it all.

use crate::record::Ordinal;

/// How far the two disks are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FlushGate {
    /// The guest here has asked for flushes up to this one.
    asked_through: u64,
    /// This host's disk has everything up to this flush.
    own_through: u64,
    /// The other host's, as far as is known and was asked for.
    peer_through: u64,
    /// A flush that the other host reported and the guest here has not asked for yet, and how far
    /// the log had been sent then: the other guest may answer an exit first.
    early: Option<(u64, Ordinal)>,
    /// The other host was given a disk with everything up to this request.
    joined_through: u64,
    /// The guest may know of flushes up to this one.
    told_through: u64,
}

impl FlushGate {
    /// The guest asked for this flush.
    pub(super) fn on_asked(&mut self, id: u64) {
        self.asked_through = self.asked_through.max(id);
        if let Some((early, _)) = self.early.filter(|(early, _)| *early <= self.asked_through) {
            self.early = None;
            self.peer_through = early;
        }
    }

    pub(super) fn on_own(&mut self, id: u64) {
        assert!(id > self.own_through, "flush {id} after {}", self.own_through);
        self.own_through = id;
        self.on_asked(id);
    }

    /// Whether the other host may report this flush: reports do not go back.
    pub(super) fn may_follow(&self, id: u64) -> bool {
        id >= self.early.map_or(self.peer_through, |(early, _)| early)
    }

    /// The other host, which has the log through `sent_through`, has everything up to this flush.
    /// It is believed when the guest has asked for it.
    pub(super) fn on_peer(&mut self, id: u64, sent_through: Ordinal) {
        if id <= self.asked_through {
            self.peer_through = self.peer_through.max(id);
        } else {
            self.early = Some((id, sent_through));
        }
    }

    /// The guest here has left exit `through`: whether it has asked for all that the other host
    /// reported as flushed, which cannot have answered an exit that this host had not logged.
    pub(super) fn early_was_asked(&self, through: Ordinal) -> bool {
        self.early.is_none_or(|(_, sent_through)| through <= sent_through)
    }

    /// The other host has a state in which everything up to this request is carried out.
    pub(super) fn on_joined(&mut self, disk_through: u64) {
        self.joined_through = disk_through;
        self.peer_through = disk_through;
        self.on_asked(disk_through);
    }

    /// Another backup, or the old one with a new state, has reported nothing yet.
    pub(super) fn forget_peer(&mut self) {
        (self.peer_through, self.joined_through, self.early) = (0, 0, None);
    }

    /// What the other host has to know of this one's disk when the roles change, if there is
    /// anything since it was given a state.
    pub(super) fn own_report(&self) -> Option<u64> {
        Some(self.own_through).filter(|id| *id > self.joined_through)
    }

    /// Whether the guest waits for the other host's disk.
    pub(super) fn holds_any(&self) -> bool {
        self.own_through > self.told_through
    }

    /// Up to which flush the guest may get completions now, if there are new ones. `alone`: there
    /// is no other host.
    pub(super) fn release(&mut self, alone: bool) -> Option<u64> {
        let through = self.releasable(alone)?;
        self.told_through = through;
        Some(through)
    }

    /// What [`Self::release`] would return.
    pub(super) fn releasable(&self, alone: bool) -> Option<u64> {
        let through =
            if alone { self.own_through } else { self.own_through.min(self.peer_through) };
        (through > self.told_through).then_some(through)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The log was sent so far when the other host reported.
    const SENT: Ordinal = Ordinal(10);

    #[test]
    fn a_flush_is_told_when_both_have_it_or_nobody_else_is_there() {
        let mut gate = FlushGate::default();
        gate.on_own(3);
        gate.on_own(5);
        assert_eq!((gate.release(false), gate.holds_any()), (None, true));
        gate.on_peer(4, SENT);
        assert_eq!((gate.release(false), gate.release(false)), (Some(4), None));
        gate.on_peer(2, SENT);
        assert_eq!(
            (gate.release(false), gate.release(true), gate.release(true)),
            (None, Some(5), None)
        );
        assert!(!gate.holds_any());
        gate.on_peer(9, SENT);
        gate.on_own(9);
        assert_eq!(gate.release(false), Some(9));
    }

    #[test]
    fn a_report_of_a_flush_that_was_not_asked_for_releases_nothing_and_is_found_out() {
        let mut gate = FlushGate::default();
        gate.on_peer(u64::MAX, SENT);
        gate.on_own(3);
        assert_eq!(gate.release(false), None);
        assert!(gate.early_was_asked(SENT), "the guest may still ask at the exit it stands at");
        assert!(!gate.early_was_asked(SENT.next()));
        assert!(!gate.may_follow(3), "reports do not go back");
    }

    #[test]
    fn the_other_guest_may_answer_an_exit_first() {
        let mut gate = FlushGate::default();
        gate.on_peer(3, SENT);
        gate.on_asked(3);
        assert!(gate.early_was_asked(SENT.next()));
        assert_eq!(gate.release(false), None, "the own disk is not done");
        gate.on_own(3);
        assert_eq!(gate.release(false), Some(3));
    }

    #[test]
    fn a_flush_after_the_state_waits_for_its_report() {
        let mut gate = FlushGate::default();
        gate.on_own(3);
        assert_eq!(gate.release(true), Some(3));
        gate.on_own(5);
        gate.forget_peer();
        gate.on_joined(5);
        assert_eq!(gate.release(false), Some(5), "it is in the state");
        assert_eq!(gate.own_report(), None, "the other has it with the state");
        gate.on_own(6);
        assert_eq!((gate.release(false), gate.own_report()), (None, Some(6)));
        gate.on_peer(6, SENT);
        assert_eq!(gate.release(false), Some(6));
    }
}
