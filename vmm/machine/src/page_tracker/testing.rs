//! A copy of memory for tests of those who send it; nothing in the program names it.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test that cannot go on fails"
)]

use ftvmm_replication::PAGE_BYTES;

use super::copy::{CopyRegion, MemoryCopy};

/// Two regions of three pages each; page 1 and page 101 are not zero.
pub fn copy() -> MemoryCopy {
    let mut regions = [0, 100].map(|first| CopyRegion::zeroed(first, 3 * PAGE_BYTES).unwrap());
    for region in &mut regions {
        region.page(1).fill(7);
    }
    MemoryCopy::new(regions.into())
}

/// As a check of memory does that finds page 1 filled with `byte`.
pub fn renew(copy: &MemoryCopy, byte: u8) {
    copy.lock()[0].page(1).fill(byte);
    copy.lock()[0].mark_unsent(1);
}
