//! A copy of memory that takes none where it is zero: the host gives a page when it is first written.

use std::ops::{Deref, DerefMut};

use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

/// Bytes that are zero at first.
pub struct Copy {
    region: MmapRegion<()>,
}

impl Copy {
    /// So many zeroes.
    ///
    /// # Errors
    /// When the host has no address space for them.
    pub fn zeroed(bytes: usize) -> Result<Self, MmapRegionError> {
        MmapRegion::new(bytes).map(|region| Self { region })
    }
}

impl Deref for Copy {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is as long as it says, readable, private to this process, lives as long as `self`, and is
        // reached through `self` only.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr(), self.region.size()) }
    }
}

impl DerefMut for Copy {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.region.as_ptr(), self.region.size()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_there_can_be_is_refused() {
        assert!(Copy::zeroed(1 << 60).is_err());
        let mut copy = Copy::zeroed(8192).unwrap();
        copy[8191] = 1;
        assert_eq!((copy[0], copy[8191], copy.len()), (0, 1, 8192));
    }
}
