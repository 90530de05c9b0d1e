//! A guest whose history is the list of its inputs, and its disk.

use ftvmm_replication::{Ordinal, OutputDigest};

/// The exit at which the guest asks its disk for a flush; the flush has this number.
const FLUSH_AT: usize = 1;

/// One input at each exit, and one frame: everything that the guest knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    pub inputs: Vec<u8>,
}

impl Guest {
    /// The last exit it has left.
    pub fn left(&self) -> Ordinal {
        Ordinal(self.inputs.len() as u64)
    }

    /// The frame it sends at the exit it stands at, and the flush it asks for there.
    pub fn answer(&self) -> (Ordinal, OutputDigest, Vec<u8>, Option<u64>) {
        let at = self.left();
        let frame = self.inputs.clone();
        let flush = (frame.len() == FLUSH_AT).then_some(at.0);
        (at, OutputDigest::of(at, 0, &frame), frame, flush)
    }

    /// The last flush it has asked for.
    pub fn flush_asked(&self) -> u64 {
        if self.inputs.len() >= FLUSH_AT { FLUSH_AT as u64 } else { 0 }
    }
}

/// Flushes by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// Asked for.
    pub asked: u64,
    /// Everything up to here is on the disk.
    pub done: u64,
}
