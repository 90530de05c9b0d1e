//! Which blocks of a disk were written since the last call.

use std::ops::Range;

/// Unit in which disks are copied and their changes are noted.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// One bit for each block.
#[derive(Debug)]
pub struct DirtyBlocks {
    words: Vec<u64>,
}

/// Blocks of a disk of that size; the last may be shorter than [`BLOCK_BYTES`].
pub fn block_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES)
}

impl DirtyBlocks {
    /// No block of a disk of that size.
    pub fn none(size_bytes: u64) -> Self {
        Self { words: vec![0; block_count(size_bytes).div_ceil(64) as usize] }
    }

    /// Notes a change of these bytes.
    pub fn mark(&mut self, bytes: Range<u64>) {
        if !bytes.is_empty() {
            for block in bytes.start / BLOCK_BYTES..=(bytes.end - 1) / BLOCK_BYTES {
                self.words[block as usize / 64] |= 1 << (block % 64);
            }
        }
    }

    /// The marked blocks in order; afterwards none is.
    pub fn take(&mut self) -> Vec<u64> {
        let mut blocks = Vec::new();
        for (index, word) in (0..).zip(&mut self.words) {
            while *word != 0 {
                blocks.push(index * 64 + u64::from(word.trailing_zeros()));
                *word &= *word - 1;
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_touched_block_is_told_once() {
        let mut dirty = DirtyBlocks::none(100 * BLOCK_BYTES + 512);
        assert_eq!(block_count(100 * BLOCK_BYTES + 512), 101);
        dirty.mark(5..5);
        assert!(dirty.take().is_empty());
        dirty.mark(BLOCK_BYTES - 1..BLOCK_BYTES);
        dirty.mark(63 * BLOCK_BYTES..64 * BLOCK_BYTES + 1);
        dirty.mark(100 * BLOCK_BYTES..100 * BLOCK_BYTES + 512);
        assert_eq!(dirty.take(), [0, 63, 64, 100]);
        assert!(dirty.take().is_empty());
    }
}
