//! When a flush of the guest's disk completes: when both hosts' disks have completed it.
//!
//! Why: what a guest was told is on its disk must be on the disk of whichever host goes on.
//! Requests are executed in the order of their numbers, so a host that has carried out a flush has
//! carried out every one before it: a number says it all.

/// How far the two disks are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FlushGate {
    /// This host's disk has everything up to this flush.
    own_through: u64,
    /// The other host's, as far as is known.
    peer_through: u64,
    /// The guest may know of flushes up to this one.
    told_through: u64,
}

impl FlushGate {
    pub(super) fn on_own(&mut self, id: u64) {
        assert!(id > self.own_through, "flush {id} after {}", self.own_through);
        self.own_through = id;
    }

    pub(super) fn on_peer(&mut self, id: u64) {
        self.peer_through = self.peer_through.max(id);
    }

    /// Another backup, or the old one with a new state, has reported nothing yet.
    pub(super) fn forget_peer(&mut self) {
        self.peer_through = 0;
    }

    pub(super) fn own_through(&self) -> u64 {
        self.own_through
    }

    /// Whether the guest waits for the other host's disk.
    pub(super) fn holds_any(&self) -> bool {
        self.own_through > self.told_through
    }

    /// Up to which flush the guest may get completions now, if there are new ones. `alone`: there
    /// is no other host.
    pub(super) fn release(&mut self, alone: bool) -> Option<u64> {
        let through =
            if alone { self.own_through } else { self.own_through.min(self.peer_through) };
        (through > self.told_through).then(|| {
            self.told_through = through;
            through
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_is_told_when_both_have_it_or_nobody_else_is_there() {
        let mut gate = FlushGate::default();
        gate.on_own(3);
        gate.on_own(5);
        assert_eq!((gate.release(false), gate.holds_any()), (None, true));
        gate.on_peer(4);
        assert_eq!((gate.release(false), gate.release(false)), (Some(4), None));
        gate.on_peer(2);
        assert_eq!(
            (gate.release(false), gate.release(true), gate.release(true)),
            (None, Some(5), None)
        );
        assert!(!gate.holds_any());
        gate.on_peer(9);
        gate.on_own(9);
        assert_eq!(gate.release(false), Some(9));
    }
}
