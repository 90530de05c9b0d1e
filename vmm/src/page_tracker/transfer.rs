//! Shipping all of memory while the guest runs: the copy is sent, which stands still between two looks at
//! memory; a page whose copy is renewed meanwhile is sent again. And the other side: putting it in place.

use ftvmm_replication::PAGE_BYTES;

use super::{
    Dirty, Flush, LoadError, PageTracker, Region, ZERO_PAGE, digest_change, live_page, place_of,
    set_bits,
};
use crate::kvm::KvmError;

/// A page and its content.
pub type PageImage = (u64, Vec<u8>);

impl PageTracker {
    /// From now on counts what has to be sent: at first every page of the copy that is not zero.
    pub fn begin_transfer(&mut self) {
        for region in &mut self.regions {
            let mut unsent = vec![0; region.idle.len().div_ceil(64)];
            for (index, page) in region.copy.chunks_exact(PAGE_BYTES).enumerate() {
                if page != ZERO_PAGE {
                    set(&mut unsent, index);
                }
            }
            region.unsent = Some(unsent);
        }
    }

    /// Nothing has to be sent any more.
    pub fn end_transfer(&mut self) {
        self.regions.iter_mut().for_each(|region| region.unsent = None);
    }

    /// Pages that have to be sent.
    pub fn unsent_pages(&self) -> u64 {
        let words = self.regions.iter().filter_map(|region| region.unsent.as_ref()).flatten();
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// The copies of at most `most` pages that have to be sent; they count as sent.
    pub fn take_unsent(&mut self, most: usize) -> Vec<PageImage> {
        let mut pages = Vec::new();
        for region in &mut self.regions {
            let Some(unsent) = &mut region.unsent else { continue };
            let chosen: Vec<_> = set_bits(unsent).take(most - pages.len()).collect();
            for index in chosen {
                unsent[index / 64] &= !(1 << (index % 64));
                let content = &region.copy[index * PAGE_BYTES..(index + 1) * PAGE_BYTES];
                pages.push((region.first_page + index as u64, content.to_vec()));
            }
        }
        pages
    }

    /// Copies some of memory's copy; how many bytes, and how many there are.
    pub fn sample(&self, into: &mut [u8]) -> (u64, u64) {
        let all = self.regions.iter().map(|region| region.bytes as u64).sum();
        let copied = self.regions.first().map_or(0, |region| region.bytes.min(into.len()));
        if let Some(region) = self.regions.first() {
            into[..copied].copy_from_slice(&region.copy[..copied]);
        }
        (copied as u64, all)
    }

    /// Brings the copy up to date at a point from which another execution starts; the digest of memory.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn settle(&mut self) -> Result<u64, KvmError> {
        self.catch_up(Flush::Tlb, |_, _, _| {})?;
        Ok(self.digest)
    }

    /// Memory becomes zero.
    pub fn clear(&mut self) {
        self.digest = 0;
        for (slot, region) in self.regions.iter_mut().enumerate() {
            // Pages the host has not touched yet need not be touched.
            for index in 0..region.idle.len() {
                if *region.copy_of(index) != ZERO_PAGE {
                    region.copy_of(index).fill(0);
                    region.mark_unsent(index);
                }
                let live = live_page(&self.memory, slot, index);
                if *live != ZERO_PAGE {
                    live.fill(0);
                }
            }
        }
    }

    /// Replaces a page.
    ///
    /// # Errors
    /// When this guest has no such page.
    pub fn put(&mut self, page: u64, content: &[u8]) -> Result<(), LoadError> {
        let Some((slot, index, region)) = place_of(&mut self.regions, page) else {
            return Err(LoadError::NoSuchPage { page });
        };
        let copy = region.copy_of(index);
        self.digest = self.digest.wrapping_add(digest_change(page, 0, copy, content));
        copy.copy_from_slice(content);
        region.mark_unsent(index);
        live_page(&self.memory, slot, index).copy_from_slice(content);
        Ok(())
    }

    /// After [`Self::clear`] and [`Self::put`]: the guest loses its TLB, as the one does whose state it is. The
    /// digest of memory.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn put_done(&mut self) -> Result<u64, KvmError> {
        let Self { log, memory, regions, .. } = self;
        for (slot, region) in regions.iter_mut().enumerate() {
            let dirty = Dirty::read(log, memory, slot, region)?;
            dirty.protect(log, slot, region, Flush::Tlb)?;
        }
        Ok(self.digest)
    }
}

impl Region {
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
