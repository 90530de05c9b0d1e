//! The schedule of a transfer: pre-copy in iterations while the guest runs, then stop-and-copy.
//!
//! An iteration sends what the guest changed since the one before. Each ends with a dirty sync at
//! the guest's next exit, which finds what it has changed meanwhile. The guest is stopped when
//! little is left, when it makes no exit to sync at, or when iterations do not help.

use core::time::Duration;

use crate::slice::PAGE_BYTES;
use crate::state::{BLOCK_BYTES, PART_BLOCKS_MAX, PART_PAGES_MAX};

/// Stop-and-copy starts when at most this many pages are dirty.
const STOP_PAGES_MAX: u64 = PART_PAGES_MAX as u64;
/// Stop-and-copy starts when at most this many blocks of the disk are dirty.
const STOP_BLOCKS_MAX: u64 = PART_BLOCKS_MAX as u64;
/// After this many iterations the guest is stopped, however much is left: it changes its memory as
/// fast as it is sent.
const ITERATIONS_MAX: u32 = 12;
/// How long a dirty sync waits for an exit of a guest that computes; the stop does not need one.
pub const SYNC_WAIT: Duration = Duration::from_millis(200);
/// The vCPU's thread stops within this, or the guest is gone.
pub const STOP_WAIT: Duration = Duration::from_secs(60);

/// What a dirty sync found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtySync {
    /// The guest made no exit within [`SYNC_WAIT`].
    NoExit,
    /// So much has to be sent again.
    Dirty {
        /// Pages of memory.
        pages: u64,
        /// Blocks of the disk.
        blocks: u64,
    },
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreCopyStep {
    /// Send what is dirty while the guest runs; then sync again.
    Iteration {
        /// Its number; the first pass over everything is 1.
        number: u32,
        /// Bytes it has to send.
        bytes: u64,
    },
    /// Send the dirty blocks while the guest runs; then stop it and send the rest.
    StopAndCopy,
}

/// Decides after each iteration. It begins in iteration 1, which sends everything.
#[derive(Debug)]
pub struct PreCopy {
    iteration: u32,
}

impl Default for PreCopy {
    fn default() -> Self {
        Self { iteration: 1 }
    }
}

impl PreCopy {
    /// The iteration that is being sent, or was sent last.
    #[must_use]
    pub fn iteration(&self) -> u32 {
        self.iteration
    }

    /// An iteration is sent, and this is what the dirty sync after it found.
    pub fn next(&mut self, sync: DirtySync) -> PreCopyStep {
        let DirtySync::Dirty { pages, blocks } = sync else { return PreCopyStep::StopAndCopy };
        let is_little = pages <= STOP_PAGES_MAX && blocks <= STOP_BLOCKS_MAX;
        if is_little || self.iteration == ITERATIONS_MAX {
            return PreCopyStep::StopAndCopy;
        }
        self.iteration += 1;
        let bytes = pages * PAGE_BYTES as u64 + blocks * BLOCK_BYTES as u64;
        PreCopyStep::Iteration { number: self.iteration, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_stopped_when_little_is_left_or_no_exit_comes() {
        let dirty = |pages, blocks| DirtySync::Dirty { pages, blocks };
        let iteration = |bytes| PreCopyStep::Iteration { number: 2, bytes };
        let table = [
            (DirtySync::NoExit, PreCopyStep::StopAndCopy),
            (dirty(0, 0), PreCopyStep::StopAndCopy),
            (dirty(256, 16), PreCopyStep::StopAndCopy),
            (dirty(257, 0), iteration(257 * 4096)),
            (dirty(0, 17), iteration(17 * 65536)),
            (dirty(300, 20), iteration(300 * 4096 + 20 * 65536)),
        ];
        for (sync, expected) in table {
            assert_eq!(PreCopy::default().next(sync), expected, "{sync:?}");
        }
    }

    #[test]
    fn a_guest_that_writes_as_fast_as_it_is_sent_is_stopped_after_twelve_rounds() {
        let busy = DirtySync::Dirty { pages: 100_000, blocks: 0 };
        let mut schedule = PreCopy::default();
        for expected in 2..=12 {
            let step = schedule.next(busy);
            assert!(matches!(step, PreCopyStep::Iteration { number, .. } if number == expected));
        }
        assert_eq!(schedule.next(busy), PreCopyStep::StopAndCopy);
        assert_eq!(schedule.iteration(), 12);
    }

    #[test]
    fn the_last_round_counts_once_however_it_ends() {
        let mut schedule = PreCopy::default();
        schedule.next(DirtySync::Dirty { pages: 1000, blocks: 0 });
        assert_eq!(schedule.next(DirtySync::NoExit), PreCopyStep::StopAndCopy);
        assert_eq!(schedule.iteration(), 2);
    }
}
