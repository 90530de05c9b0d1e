//! A virtio driver as small as a driver can be, in the order Linux does things (`virtio_mmio.c`,
//! `virtio_net.c`).

#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "the memory below is the test's own")]

use ftvmm_devices::{Board, BoardConfig, Input, NetConfig, Output, VIRTIO_NET_SLOT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const MEMORY_BYTES: usize = 4 << 20;
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
pub const DISK_BYTES: u64 = 64 * 512;
pub const RX: u32 = 0;
pub const TX: u32 = 1;
pub const CONTROL: u32 = 2;
pub const MTU: u16 = 9000;
pub const NET: NetConfig = NetConfig { mac: MAC, mtu: MTU };
pub const QUEUE_SIZE: u16 = 256;
/// VERSION_1 and MAC, CSUM, GUEST_CSUM, HOST_TSO4.
pub const FEATURES: u64 = 1 << 32 | 1 << 5 | 1 << 1 | 1 << 11 | 1;
/// MTU, STATUS, CTRL_VQ, GUEST_ANNOUNCE.
pub const NEWER_FEATURES: u64 = 1 << 3 | 1 << 16 | 1 << 17 | 1 << 21;
pub const EVENT_IDX: u64 = 1 << 29;
pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;

pub const STATUS_DRIVER_OK: u32 = 4;
pub const STATUS_FEATURES_OK: u32 = 8;
pub const STATUS_NEEDS_RESET: u32 = 0x40;

/// Rings and buffers of queue `queue`, each queue in its own mebibyte.
pub fn desc_table(queue: u32) -> u64 {
    0x10_0000 * u64::from(queue + 1)
}
pub fn avail_ring(queue: u32) -> u64 {
    desc_table(queue) + 0x1000
}
pub fn used_ring(queue: u32) -> u64 {
    desc_table(queue) + 0x2000
}
pub fn buffer(queue: u32, index: u16) -> u64 {
    desc_table(queue) + 0x1_0000 + u64::from(index) * 0x800
}

/// A board with a network card, its memory, and what a driver remembers about its queues.
pub struct Driver {
    pub board: Board,
    pub mem: GuestMemoryMmap,
    /// Where the registers of the device driven lie.
    pub base: u64,
    pub next_avail: [u16; 3],
    pub seen_used: [u16; 3],
}

impl Driver {
    pub fn new() -> Driver {
        let config = BoardConfig {
            rtc_epoch_s: 1_700_000_000,
            net: Some(NET),
            disk_bytes: Some(DISK_BYTES),
        };
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        Driver {
            board: Board::new(&config),
            mem,
            base: VIRTIO_NET_SLOT.base,
            next_avail: [0; 3],
            seen_used: [0; 3],
        }
    }

    /// A driver whose card is up, with `features`.
    pub fn up(features: u64) -> Driver {
        let mut driver = Driver::new();
        driver.negotiate(features);
        driver.set_up_queue(RX);
        driver.set_up_queue(TX);
        driver.write(0x70, 0x0f);
        driver
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.board.mmio_read(&self.mem, self.base + offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.board.mmio_write(&self.mem, self.base + offset, &value.to_le_bytes());
    }

    pub fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x24, select);
            self.write(0x20, half);
        }
        self.write(0x70, 0x0b);
    }

    pub fn set_up_queue(&mut self, queue: u32) {
        self.write(0x30, queue);
        self.write(0x38, u32::from(QUEUE_SIZE));
        for (offset, address) in
            [(0x80, desc_table(queue)), (0x90, avail_ring(queue)), (0xa0, used_ring(queue))]
        {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    pub fn poke<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn peek<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.mem.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn set_descriptor(&self, queue: u32, index: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = descriptor;
        let at = desc_table(queue) + 16 * u64::from(index);
        self.poke(at, address);
        self.poke(at + 8, length);
        self.poke(at + 12, flags);
        self.poke(at + 14, next);
    }

    /// Puts the chain at `head` into the available ring.
    pub fn make_available(&mut self, queue: u32, head: u16) {
        let next = &mut self.next_avail[queue as usize];
        let slot = avail_ring(queue) + 4 + 2 * u64::from(*next % QUEUE_SIZE);
        *next = next.wrapping_add(1);
        let next = *next;
        self.poke(slot, head);
        self.poke(avail_ring(queue) + 2, next);
    }

    pub fn notify(&mut self, queue: u32) {
        self.write(0x50, queue);
    }

    /// Makes `count` receive buffers of 1536 bytes available, without a notification.
    pub fn add_receive_buffers(&mut self, count: u16) {
        for _ in 0..count {
            let index = self.next_avail[RX as usize] % QUEUE_SIZE;
            self.set_descriptor(RX, index, (buffer(RX, index), 1536, DESC_WRITE, 0));
            self.make_available(RX, index);
        }
    }

    /// Transmits header and frame as one buffer.
    pub fn send(&mut self, frame: &[u8]) {
        let index = self.next_avail[TX as usize] % QUEUE_SIZE;
        self.mem.write_slice(frame, GuestAddress(buffer(TX, index))).unwrap();
        self.set_descriptor(TX, index, (buffer(TX, index), frame.len() as u32, 0, 0));
        self.make_available(TX, index);
        self.notify(TX);
    }

    /// Takes the used ring's news: head and length of each.
    pub fn take_used(&mut self, queue: u32) -> Vec<(u32, u32)> {
        let index: u16 = self.peek(used_ring(queue) + 2);
        let seen = &mut self.seen_used[queue as usize];
        let mut used = Vec::new();
        while *seen != index {
            let slot = used_ring(queue) + 4 + 8 * u64::from(*seen % QUEUE_SIZE);
            *seen = seen.wrapping_add(1);
            used.push((
                self.mem.read_obj(GuestAddress(slot)).unwrap(),
                self.mem.read_obj(GuestAddress(slot + 4)).unwrap(),
            ));
        }
        used
    }

    /// EVENT_IDX: "interrupt me when used passes `index`".
    pub fn set_used_event(&self, queue: u32, index: u16) {
        self.poke(avail_ring(queue) + 4 + 2 * u64::from(QUEUE_SIZE), index);
    }

    pub fn avail_event(&self, queue: u32) -> u16 {
        self.peek(used_ring(queue) + 4 + 8 * u64::from(QUEUE_SIZE))
    }

    pub fn arrive(&mut self, frame: Vec<u8>) {
        self.board.apply(&self.mem, Input::NetRx { frame });
    }

    pub fn take_frames(&mut self) -> Vec<Vec<u8>> {
        let frames = self.board.take_outputs().into_iter().map(|output| match output {
            Output::Frame(frame) => frame,
            Output::Console(_) | Output::Disk(_) => vec![],
        });
        frames.collect()
    }
}

/// A plain header and a frame of `length` bytes that can be told from others by `tag`.
pub fn frame(tag: u8, length: usize) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend((0..length).map(|index| (index as u8).wrapping_add(tag)));
    frame
}

/// `frame` as the guest sees it: one buffer.
pub fn as_received(mut frame: Vec<u8>) -> Vec<u8> {
    frame[10] = 1;
    frame
}

/// Linux sets up the interrupt controller so that the card's vector is 0x35.
pub fn init_pic(board: &mut Board) {
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 4),
        (0x21, 1),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 2),
        (0xa1, 1),
        (0x21, !(1 << 5)),
    ] {
        board.pio_write(port, &[value]);
    }
}
