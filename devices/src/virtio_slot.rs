//! Where the virtio devices lie: the one list that the MMIO bus, the interrupt lines and the ACPI tables follow.

use crate::board::BoardConfig;

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

/// The network card's place.
pub const VIRTIO_NET_SLOT: VirtioSlot = VirtioSlot { base: 0xd000_0000, bytes: 0x1000, irq: 5 };
/// The entropy source's place.
pub const VIRTIO_ENTROPY_SLOT: VirtioSlot =
    VirtioSlot { base: 0xd000_1000, bytes: 0x1000, irq: 10 };
/// The disk's place.
pub const VIRTIO_BLK_SLOT: VirtioSlot = VirtioSlot { base: 0xd000_2000, bytes: 0x1000, irq: 11 };

impl VirtioSlot {
    /// Offset of an access that lies completely in the registers.
    pub(crate) fn offset(&self, addr: u64, length: usize) -> Option<u32> {
        let offset = addr.checked_sub(self.base)?;
        let end = offset.checked_add(length as u64)?;
        (end <= self.bytes).then_some(offset as u32)
    }
}

/// The devices of a board, in the order of their addresses.
pub fn virtio_slots(config: &BoardConfig) -> Vec<VirtioSlot> {
    let slots = [
        config.net.map(|_| VIRTIO_NET_SLOT),
        Some(VIRTIO_ENTROPY_SLOT),
        config.disk_bytes.map(|_| VIRTIO_BLK_SLOT),
    ];
    slots.into_iter().flatten().collect()
}
