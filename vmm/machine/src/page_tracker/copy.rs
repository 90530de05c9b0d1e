//! The copy of memory, which the thread that sends a guest's state reads while the guest runs: it
//! stands still between two syncs. A page whose copy is renewed meanwhile is sent again.

use ftvmm_replication::PAGE_BYTES;
use vm_memory::mmap::MmapRegionError;

use super::zeroes::Zeroes;
use super::{ZERO_PAGE, set_bits};
use crate::sync::{Mutex, MutexGuard, lock};

/// A page and its content.
pub type PageImage = (u64, Vec<u8>);

/// A copy of memory, and which of its pages have to be sent. Only a [`super::PageTracker`] changes
/// its content.
pub struct MemoryCopy {
    regions: Mutex<Vec<CopyRegion>>,
}

impl MemoryCopy {
    pub(super) fn new(regions: Vec<CopyRegion>) -> Self {
        Self { regions: Mutex::new(regions) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<CopyRegion>> {
        lock(&self.regions)
    }

    /// From now on counts what has to be sent: at first every page that is not zero. How many there
    /// are.
    pub fn begin_transfer(&self) -> u64 {
        let mut regions = self.lock();
        for region in &mut *regions {
            let mut unsent = vec![0; region.pages().div_ceil(64)];
            for (index, page) in region.bytes.chunks_exact(PAGE_BYTES).enumerate() {
                if page != ZERO_PAGE {
                    set(&mut unsent, index);
                }
            }
            region.unsent = Some(unsent);
        }
        count_unsent(&regions)
    }

    /// Nothing has to be sent any more.
    pub fn end_transfer(&self) {
        self.lock().iter_mut().for_each(|region| region.unsent = None);
    }

    /// Pages that have to be sent.
    pub fn unsent_pages(&self) -> u64 {
        count_unsent(&self.lock())
    }

    /// At most `most` pages that have to be sent; they count as sent.
    pub fn take_unsent(&self, most: usize) -> Vec<PageImage> {
        let mut pages = Vec::new();
        for region in &mut *self.lock() {
            let Some(unsent) = &mut region.unsent else { continue };
            let chosen: Vec<_> = set_bits(unsent).take(most - pages.len()).collect();
            for index in chosen {
                unsent[index / 64] &= !(1 << (index % 64));
                let content = &region.bytes[index * PAGE_BYTES..(index + 1) * PAGE_BYTES];
                pages.push((region.first_page + index as u64, content.to_vec()));
            }
        }
        pages
    }

    /// Copies some of the copy; how many bytes, and how many there are.
    pub fn sample(&self, into: &mut [u8]) -> (u64, u64) {
        let regions = self.lock();
        let all = regions.iter().map(|region| region.bytes.len() as u64).sum();
        let copied = regions.first().map_or(0, |region| region.bytes.len().min(into.len()));
        if let Some(region) = regions.first() {
            into[..copied].copy_from_slice(&region.bytes[..copied]);
        }
        (copied as u64, all)
    }
}

fn count_unsent(regions: &[CopyRegion]) -> u64 {
    let words = regions.iter().filter_map(|region| region.unsent.as_ref()).flatten();
    words.map(|word| u64::from(word.count_ones())).sum()
}

/// The copy of one region of memory.
pub(super) struct CopyRegion {
    first_page: u64,
    bytes: Zeroes,
    /// While a state is sent: the pages whose copy has not been sent as it is now.
    unsent: Option<Vec<u64>>,
}

impl CopyRegion {
    /// A copy of so many zeroes, the first of which is the first of page `first_page`.
    pub(super) fn zeroed(first_page: u64, bytes: usize) -> Result<Self, MmapRegionError> {
        Ok(Self { first_page, bytes: Zeroes::new(bytes)?, unsent: None })
    }

    fn pages(&self) -> usize {
        self.bytes.len() / PAGE_BYTES
    }

    /// The copy of a page.
    pub(super) fn page(&mut self, index: usize) -> &mut [u8] {
        &mut self.bytes[index * PAGE_BYTES..(index + 1) * PAGE_BYTES]
    }

    /// The copy of a page was renewed.
    pub(super) fn mark_unsent(&mut self, index: usize) {
        if let Some(unsent) = &mut self.unsent {
            set(unsent, index);
        }
    }
}

fn set(bits: &mut [u64], index: usize) {
    bits[index / 64] |= 1 << (index % 64);
}

#[cfg(test)]
mod tests {
    use super::super::testing::copy;
    use super::*;

    fn numbers(pages: &[PageImage]) -> Vec<u64> {
        pages.iter().map(|(page, _)| *page).collect()
    }

    #[test]
    fn a_page_is_sent_once_and_again_when_its_copy_was_renewed() {
        let copy = copy();
        assert_eq!(copy.begin_transfer(), 2);
        let first = copy.take_unsent(1);
        assert_eq!((numbers(&first), copy.unsent_pages()), (vec![1], 1));
        assert_eq!(first[0].1, [7; PAGE_BYTES]);
        copy.lock()[0].page(1).fill(8);
        copy.lock()[0].mark_unsent(1);
        copy.lock()[1].mark_unsent(2);
        let rest = copy.take_unsent(usize::MAX);
        assert_eq!(numbers(&rest), [1, 101, 102]);
        assert_eq!(rest[0].1, [8; PAGE_BYTES]);
        assert_eq!(copy.unsent_pages(), 0);
    }

    #[test]
    fn nothing_is_sent_when_nobody_wants_it() {
        let copy = copy();
        copy.lock()[0].mark_unsent(1);
        assert!(copy.take_unsent(usize::MAX).is_empty());
        copy.begin_transfer();
        copy.end_transfer();
        assert!(copy.take_unsent(usize::MAX).is_empty());
    }

    #[test]
    fn a_sample_is_of_the_first_region_at_most() {
        let (page, copy) = (PAGE_BYTES as u64, copy());
        assert_eq!(copy.sample(&mut vec![0; 2 * PAGE_BYTES]), (2 * page, 6 * page));
        assert_eq!(copy.sample(&mut vec![0; 9 * PAGE_BYTES]), (3 * page, 6 * page));
    }
}
