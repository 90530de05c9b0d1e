//! What a guest lays out in its memory: requests to the disk, and rings.

use ftvmm_devices::{
    Board, BoardConfig, DiskOutcome, DiskRequest, Input, NetConfig, Output, VIRTIO_BLK_SLOT,
    VIRTIO_ENTROPY_SLOT, VIRTIO_NET_SLOT, VirtioSlot,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: usize = 1 << 20;
const DISK_BYTES: u64 = 64 * 512;
/// VERSION_1 and INDIRECT_DESC is not offered; EVENT_IDX is.
const FEATURES: u64 = 1 << 32 | 1 << 29;
const QUEUE_SIZE: u32 = 16;
/// Where the rings of a queue lie, and the bytes that are fed.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x1100;
const USED: u64 = 0x1200;
const DATA: u64 = 0x2000;
const STATUS: u64 = 0xf_0000;
const NEXT: u64 = 1;
const WRITE: u64 = 2;

struct Guest {
    board: Board,
    memory: GuestMemoryMmap,
    slot: VirtioSlot,
}

impl Guest {
    /// A guest whose device at `slot` is up with `queues`, all of them on the same rings.
    #[expect(clippy::expect_used, reason = "a mebibyte of memory at address 0 can be had")]
    fn up(slot: VirtioSlot, queues: u32) -> Self {
        let net = Some(NetConfig { mac: [2, 0, 0, 0, 0, 7], mtu: 1500 });
        let config = BoardConfig { rtc_epoch_s: 0, net, disk_bytes: Some(DISK_BYTES) };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
        let memory = memory.expect("a mebibyte of memory at address 0 can be had");
        let mut guest = Self { board: Board::new(&config), memory, slot };
        let up = [(0x70, 1), (0x70, 3), (0x24, 0), (0x20, FEATURES as u32)];
        let then = [(0x24, 1), (0x20, (FEATURES >> 32) as u32), (0x70, 0x0b)];
        up.into_iter().chain(then).for_each(|(at, value)| guest.register(at, value));
        for queue in 0..queues {
            let rings = [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)];
            guest.register(0x30, queue);
            guest.register(0x38, QUEUE_SIZE);
            rings.into_iter().for_each(|(at, value)| guest.register(at, value as u32));
            guest.register(0x44, 1);
        }
        guest.register(0x70, 0x0f);
        guest
    }

    fn register(&mut self, offset: u64, value: u32) {
        let address = self.slot.base + offset;
        self.board.mmio_write(&self.memory, address, &value.to_le_bytes());
    }

    /// As much of the bytes as memory has room for.
    fn poke(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    fn descriptor(&self, index: u64, address: u64, length: u64, flags: u64) {
        let at = DESCRIPTORS + 16 * index;
        self.poke(at, &address.to_le_bytes());
        self.poke(at + 8, &(length | flags << 32 | (index + 1) << 48).to_le_bytes());
    }

    fn notify(&mut self, queue: u32) {
        self.register(0x50, queue);
        for output in self.board.take_outputs() {
            if let Output::Disk(DiskRequest { id, .. }) = output {
                let outcome = DiskOutcome::Done { data: Vec::new() };
                self.board.apply(&self.memory, Input::DiskDone { id, outcome });
            }
        }
    }
}

/// A request to the disk, cut into descriptors by its first byte; the second says how much room for
/// an answer.
pub fn blk_request(bytes: &[u8]) {
    let [cut, room, request @ ..] = bytes else { return };
    let mut guest = Guest::up(VIRTIO_BLK_SLOT, 1);
    let request = &request[..request.len().min((STATUS - DATA) as usize)];
    guest.poke(DATA, request);
    let cut = u64::from(*cut).min(request.len() as u64);
    guest.descriptor(0, DATA, cut, NEXT);
    guest.descriptor(1, DATA + cut, request.len() as u64 - cut, NEXT);
    guest.descriptor(2, STATUS, 512 * u64::from(room & 7) + 1, WRITE);
    guest.poke(AVAILABLE, &[0, 0, 1, 0, 0, 0]);
    guest.notify(0);
}

/// Rings and descriptors of the network card, the disk and the entropy source, and whatever they
/// point to: the bytes are memory from the first descriptor on.
pub fn virtqueue(bytes: &[u8]) {
    let slots = [(VIRTIO_NET_SLOT, 2), (VIRTIO_BLK_SLOT, 1), (VIRTIO_ENTROPY_SLOT, 1)];
    for (slot, queues) in slots {
        let mut guest = Guest::up(slot, queues);
        guest.poke(DESCRIPTORS, bytes);
        guest.board.apply(&guest.memory, Input::NetRx { frame: vec![0x55; 76] });
        (0..queues).for_each(|queue| guest.notify(queue));
        guest.board.apply(&guest.memory, Input::Entropy { bytes: vec![0xaa; 64] });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The harness reaches the device: a request that is well-formed is carried out.
    #[test]
    fn a_whole_request_is_answered() {
        let mut guest = Guest::up(VIRTIO_BLK_SLOT, 1);
        let flush = [4u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        guest.poke(DATA, &flush);
        guest.poke(STATUS, &[0xee]);
        guest.descriptor(0, DATA, 16, NEXT);
        guest.descriptor(1, STATUS, 1, WRITE);
        guest.poke(AVAILABLE, &[0, 0, 1, 0, 0, 0]);
        guest.notify(0);
        let status: u8 = guest.memory.read_obj(GuestAddress(STATUS)).unwrap();
        assert_eq!(status, 0, "{:?}", guest.board.guest_faults());
    }

    /// Rings that the bytes lay out are walked.
    #[test]
    fn a_ring_of_nonsense_is_a_fault_of_the_guest() {
        let mut guest = Guest::up(VIRTIO_NET_SLOT, 2);
        guest.poke(DESCRIPTORS, &[0xff; 0x400]);
        guest.notify(1);
        assert!(guest.board.guest_faults().last.is_some());
    }
}
