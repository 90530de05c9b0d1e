//! The place of a virtio device on the memory-mapped bus.

/// Registers and interrupt of a virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Guest-physical address of the registers.
    pub base: u64,
    /// Length of the registers.
    pub bytes: u64,
    /// Interrupt request, level triggered, active high, not shared.
    pub irq: u8,
}

impl VirtioSlot {
    /// Offset of an access that lies completely in the registers.
    pub(crate) fn offset(&self, addr: u64, length: usize) -> Option<u32> {
        let offset = addr.checked_sub(self.base)?;
        let end = offset.checked_add(length as u64)?;
        (end <= self.bytes).then_some(offset as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_belongs_to_a_slot_when_it_lies_completely_in_it() {
        let slot = VirtioSlot { base: 0x1000, bytes: 0x100, irq: 5 };
        for (addr, length, offset) in [
            (0x1000, 4, Some(0)),
            (0x10fc, 4, Some(0xfc)),
            (0x10fd, 4, None),
            (0xfff, 1, None),
            (0x1100, 1, None),
            (u64::MAX, 8, None),
        ] {
            assert_eq!(slot.offset(addr, length), offset, "{length} bytes at {addr:#x}");
        }
    }
}
