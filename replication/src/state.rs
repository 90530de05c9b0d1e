//! The whole state of a guest, in parts: what a backup that attaches is sent, and what a snapshot
//! holds.
//!
//! Memory is zero before the first part; a page sent twice counts as sent last. The last part of
//! all is the machine: processor and devices, opaque here.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bounded::COUNTER_MAX;
use crate::group::LZ4_RATIO_MAX;
use crate::slice::PAGE_BYTES;

/// Most pages in a part.
pub const PART_PAGES_MAX: usize = 256;
/// Bytes of a disk block.
pub const BLOCK_BYTES: usize = 64 << 10;
/// Most blocks in a part.
pub const PART_BLOCKS_MAX: usize = 16;
/// Bytes of the number in front of a page or block.
const NUMBER_BYTES: usize = 8;

/// A part of a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StatePart {
    /// A state begins: about so many bytes of memory and disk will come. Memory is zero.
    Outline {
        /// Before packing.
        total_bytes: u64,
    },
    /// Pages of memory, as [`pack`] makes it: number (guest-physical address divided by 4096) and
    /// content.
    Pages(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Blocks of the disk, packed like pages: number (offset divided by 64 KiB) and content.
    Blocks(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The machine as it stands at an exit. Nothing comes after it.
    Machine(#[serde(with = "serde_bytes")] Vec<u8>),
}

impl StatePart {
    /// Size of what is carried.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Outline { .. } => 0,
            Self::Pages(bytes) | Self::Blocks(bytes) | Self::Machine(bytes) => bytes.len() as u64,
        }
    }
}

impl StatePart {
    /// Size of what is carried before packing, and of what it says of itself if it is damaged.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        match self {
            Self::Outline { .. } => 0,
            Self::Pages(packed) | Self::Blocks(packed) => {
                lz4_flex::block::uncompressed_size(packed).map_or(0, |(bytes, _)| bytes as u64)
            }
            Self::Machine(bytes) => bytes.len() as u64,
        }
    }
}

/// Bytes are no list of pages or blocks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StateError {
    /// They cannot be decompressed.
    #[error("a part of the state is damaged")]
    Damaged,
    /// They are of another length than a list of that many.
    #[error("a part of the state has {bytes} bytes, which is no list of pages or blocks")]
    Length {
        /// Decompressed.
        bytes: usize,
    },
    /// A number names a place that no memory or disk has.
    #[error("a part of the state names page or block {number}, which no guest has")]
    Number {
        /// The number.
        number: u64,
    },
}

/// Makes a part's content of numbered items of one size.
#[must_use]
pub fn pack<'a>(items: impl Iterator<Item = (u64, &'a [u8])>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, content) in items {
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(content);
    }
    lz4_flex::block::compress_prepend_size(&bytes)
}

/// Hands out what [`pack`] took: pages.
///
/// # Errors
/// [`StateError`]; nothing has been handed out then.
pub fn unpack_pages(packed: &[u8], take: impl FnMut(u64, &[u8])) -> Result<(), StateError> {
    unpack(packed, PAGE_BYTES, PART_PAGES_MAX, take)
}

/// Hands out what [`pack`] took: blocks.
///
/// # Errors
/// [`StateError`]; nothing has been handed out then.
pub fn unpack_blocks(packed: &[u8], take: impl FnMut(u64, &[u8])) -> Result<(), StateError> {
    unpack(packed, BLOCK_BYTES, PART_BLOCKS_MAX, take)
}

fn unpack(
    packed: &[u8],
    item_bytes: usize,
    items_max: usize,
    mut take: impl FnMut(u64, &[u8]),
) -> Result<(), StateError> {
    let (claimed, stored) =
        lz4_flex::block::uncompressed_size(packed).map_err(|_| StateError::Damaged)?;
    if claimed > (NUMBER_BYTES + item_bytes) * items_max {
        return Err(StateError::Length { bytes: claimed });
    }
    // Room is made for what can be there.
    if claimed > stored.len() * LZ4_RATIO_MAX {
        return Err(StateError::Damaged);
    }
    let bytes = lz4_flex::block::decompress(stored, claimed).map_err(|_| StateError::Damaged)?;
    if !bytes.len().is_multiple_of(NUMBER_BYTES + item_bytes) {
        return Err(StateError::Length { bytes: bytes.len() });
    }
    let items = bytes.chunks_exact(NUMBER_BYTES + item_bytes);
    let items = items.filter_map(|item| item.split_first_chunk());
    let items = items.map(|(number, content)| (u64::from_le_bytes(*number), content));
    // Whoever takes an item multiplies its number by its size.
    let beyond =
        |number: &u64| number.checked_mul(item_bytes as u64).is_none_or(|at| at > COUNTER_MAX);
    if let Some(number) = items.clone().map(|(number, _)| number).find(beyond) {
        return Err(StateError::Number { number });
    }
    items.for_each(|(number, content)| take(number, content));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_survive_and_damage_is_told() {
        let pages = [(3u64, vec![7u8; PAGE_BYTES]), (900, vec![0; PAGE_BYTES])];
        let packed = pack(pages.iter().map(|(page, content)| (*page, content.as_slice())));
        assert!(packed.len() < 200, "{} bytes", packed.len());
        let mut got = Vec::new();
        unpack_pages(&packed, |page, content| got.push((page, content.to_vec()))).unwrap();
        assert_eq!(got, pages);
        let none = |_: u64, _: &[u8]| panic!("nothing is handed out");
        assert_eq!(unpack_pages(&packed[..packed.len() - 1], none), Err(StateError::Damaged));
        assert_eq!(unpack_pages(&[], none), Err(StateError::Damaged));
        let odd = lz4_flex::block::compress_prepend_size(&[0; 100]);
        assert_eq!(unpack_pages(&odd, none), Err(StateError::Length { bytes: 100 }));
        let huge = [u32::MAX.to_le_bytes().as_slice(), &[0; 20]].concat();
        assert!(matches!(unpack_pages(&huge, none), Err(StateError::Length { .. })));
        let large = [1_000_000u32.to_le_bytes().as_slice(), &[0; 20]].concat();
        assert_eq!(unpack_pages(&large, none), Err(StateError::Damaged), "before there is room");
    }

    /// Whoever takes a page or block may multiply its number by its size.
    #[test]
    fn a_place_that_no_guest_has_is_refused_before_anything_is_handed_out() {
        let place =
            |number| pack([(3, &[7; PAGE_BYTES][..]), (number, &[8; PAGE_BYTES])].into_iter());
        let mut got = Vec::new();
        let last = COUNTER_MAX / PAGE_BYTES as u64;
        unpack_pages(&place(last), |page, _| got.push(page)).unwrap();
        assert_eq!(got, [3, last]);
        for number in [last + 1, 1 << 52, u64::MAX] {
            let refused = unpack_pages(&place(number), |_, _| panic!("nothing is handed out"));
            assert_eq!(refused, Err(StateError::Number { number }));
        }
        let blocks = pack([(1 << 48, &[7; BLOCK_BYTES][..])].into_iter());
        let refused = unpack_blocks(&blocks, |_, _| panic!("nothing is handed out"));
        assert_eq!(refused, Err(StateError::Number { number: 1 << 48 }));
    }
}
