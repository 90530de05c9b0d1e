//! The guest's memory itself, page by page.

use std::rc::Rc;

use ftvmm_replication::PAGE_BYTES;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use crate::memory::Memory;

/// A share of guest memory, on the guest's thread.
pub(super) struct LiveMemory(Rc<Memory>);

impl LiveMemory {
    /// Pages of `memory`.
    pub(super) fn new(memory: Rc<Memory>) -> Self {
        Self(memory)
    }

    /// A page of the region `slot`.
    pub(super) fn page(&mut self, slot: usize, index: usize) -> &mut [u8] {
        let region = self.region(slot);
        assert!((index + 1) * PAGE_BYTES <= region.size(), "the page lies in its region");
        // SAFETY: the range lies inside the region's mapping, which `self` keeps. Memory is on this
        // thread alone (see Memory), and the guest writes to it only inside a method of its
        // processor (see Cpu), which the tracker does not have. `self` is borrowed for as long as
        // the slice lives, is private to its tracker, and the tracker does nothing else with memory
        // meanwhile.
        unsafe {
            let start = region.as_ptr().add(index * PAGE_BYTES);
            std::slice::from_raw_parts_mut(start, PAGE_BYTES)
        }
    }

    /// The pages of the region that this program wrote since the last call, or that were marked.
    pub(super) fn take_written(&self, slot: usize) -> Vec<u64> {
        self.region(slot).bitmap().get_and_reset()
    }

    /// Has the next [`Self::take_written`] name this page.
    pub(super) fn mark_written(&self, slot: usize, index: usize) {
        self.region(slot).bitmap().mark_dirty(index * PAGE_BYTES, 1);
    }

    fn region(&self, slot: usize) -> &MmapRegion<AtomicBitmap> {
        #[expect(clippy::expect_used, reason = "regions were counted when the tracker was made")]
        let region: &GuestRegionMmap<_> = self.0.iter().nth(slot).expect("the slot is a region");
        region
    }
}
