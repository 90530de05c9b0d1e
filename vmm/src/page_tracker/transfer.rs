//! A whole state: memory as another execution starts from it, and putting that in place.

use super::{Dirty, Flush, LoadError, PageTracker, ZERO_PAGE, digest_change, place_of};
use crate::kvm::{KvmError, WriteLog};

impl<L: WriteLog> PageTracker<L> {
    /// Brings the copy up to date at a point from which another execution starts; the digest of
    /// memory.
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
        let Self { memory, regions, copy, .. } = self;
        for (slot, (region, copy)) in regions.iter().zip(&mut *copy.lock()).enumerate() {
            // Pages the host has not touched yet need not be touched.
            for index in 0..region.idle.len() {
                if *copy.page(index) != ZERO_PAGE {
                    copy.page(index).fill(0);
                    copy.mark_unsent(index);
                }
                let live = memory.page(slot, index);
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
        let Some((slot, index)) = place_of(&self.regions, page) else {
            return Err(LoadError::NoSuchPage { page });
        };
        let copy = &mut self.copy.lock()[slot];
        let old = copy.page(index);
        self.digest = self.digest.wrapping_add(digest_change(page, 0, old, content));
        old.copy_from_slice(content);
        copy.mark_unsent(index);
        self.memory.page(slot, index).copy_from_slice(content);
        Ok(())
    }

    /// After [`Self::clear`] and [`Self::put`]: the guest loses its TLB, as the one does whose
    /// state it is. The digest of memory.
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
