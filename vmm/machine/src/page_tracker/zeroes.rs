//! Bytes that take no memory where they are zero: the host gives a page when it is first written.

use std::ops::{Deref, DerefMut};

use ftvmm_replication::PAGE_BYTES;
use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

/// Unused pages behind the copy. The host maps it right below memory: without them each page and
/// its copy would be as far apart as memory is long, and share a place wherever an address chooses
/// one. In QEMU's TLB, which has one place for an address, each word that is compared then costs a
/// walk.
const SPACER_BYTES: usize = 37 * PAGE_BYTES;

/// Bytes that are zero at first.
pub(super) struct Zeroes {
    region: MmapRegion<()>,
    bytes: usize,
}

impl Zeroes {
    /// So many zeroes.
    ///
    /// # Errors
    /// When the host has no address space for them.
    pub(super) fn new(bytes: usize) -> Result<Self, MmapRegionError> {
        let mapped_bytes = bytes.saturating_add(SPACER_BYTES);
        MmapRegion::new(mapped_bytes).map(|region| Self { region, bytes })
    }
}

impl Deref for Zeroes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is longer than `bytes`, readable, private to this process, lives as
        // long as `self`, and is reached through `self` only.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Zeroes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.region.as_ptr(), self.bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_can_be_is_refused() {
        assert!(Zeroes::new(1 << 60).is_err());
        let mut bytes = Zeroes::new(8192).unwrap();
        bytes[8191] = 1;
        assert_eq!((bytes[0], bytes[8191], bytes.len()), (0, 1, 8192));
    }
}
