//! Chains as drivers build them, well and badly.

use vm_memory::GuestMemoryMmap;

use super::*;

const DESC_TABLE: u64 = 0x1000;
const AVAIL_RING: u64 = 0x2000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDEX: u16 = 3;

/// Guest memory and a queue of four in it, whose driver has made one chain available, of these
/// (address, length, flags, next).
fn queue(chain: &[(u64, u32, u16, u16)]) -> (GuestMemoryMmap, Queue) {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    for (at, (address, length, flags, next)) in (DESC_TABLE..).step_by(16).zip(chain) {
        mem.write_obj(*address, GuestAddress(at)).unwrap();
        mem.write_obj(*length, GuestAddress(at + 8)).unwrap();
        mem.write_obj(*flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj(*next, GuestAddress(at + 14)).unwrap();
    }
    mem.write_obj(1u16, GuestAddress(AVAIL_RING + 2)).unwrap();
    let state = QueueState {
        max_size: 4,
        size: 4,
        ready: true,
        desc_table: DESC_TABLE,
        avail_ring: AVAIL_RING,
        used_ring: 0x3000,
        ..QueueState::default()
    };
    (mem, Queue::try_from(state).unwrap())
}

fn segments(chain: &[(u64, u32, u16, u16)]) -> Result<Segments, GuestFault> {
    let (mem, mut queue) = queue(chain);
    next_chain(&mut queue, INDEX, &mem).unwrap().unwrap().segments()
}

#[test]
fn what_is_scattered_is_gathered_again() {
    let chain = [(0x5000, 3, NEXT, 1), (0x6000, 2, NEXT | WRITE, 2), (0x7000, 4, WRITE, 0)];
    let Segments { readable, writable } = segments(&chain).unwrap();
    assert_eq!((total_bytes(&readable), total_bytes(&writable)), (3, 6));
    let (mem, _) = queue(&chain);
    scatter(&mem, INDEX, &writable, b"abcd").unwrap();
    write_last_byte(&mem, INDEX, &writable, b'!').unwrap();
    assert_eq!(gather(&mem, INDEX, &writable).unwrap(), b"abcd\0!");
    let mut front = [0; 3];
    assert_eq!(gather_front(&mem, INDEX, &writable, &mut front).unwrap(), 3);
    assert_eq!(&front, b"abc");
}

#[test]
fn bad_chains_are_told_apart() {
    let (queue, head) = (INDEX, 0);
    for (chain, fault) in [
        (vec![(0x5000, 4, NEXT, 0)], GuestFault::LongChain { queue, head }),
        (vec![(0x5000, 4, NEXT, 9)], GuestFault::BrokenChain { queue, head }),
        (
            vec![(0x5000, 4, NEXT | WRITE, 1), (0x6000, 4, 0, 0)],
            GuestFault::WrongDirection { queue, head },
        ),
        (
            vec![(0xffff, 2, 0, 0)],
            GuestFault::BufferOutsideMemory { queue, address: 0xffff, length_bytes: 2 },
        ),
    ] {
        assert_eq!(segments(&chain).unwrap_err(), fault);
    }
}

#[test]
fn a_chain_is_read_only_as_far_as_there_is_room() {
    let (mem, mut queue) = queue(&[(0x5000, 3, 0, 0)]);
    let chain = next_chain(&mut queue, INDEX, &mem).unwrap().unwrap();
    let too_long = GuestFault::LongChain { queue: INDEX, head: 0 };
    assert_eq!(chain.read(&mut [0; 2]).unwrap_err(), too_long);
    assert!(next_chain(&mut queue, INDEX, &mem).unwrap().is_none(), "there is no other chain");
}

#[test]
fn sizes_and_misaligned_addresses_are_refused() {
    let (_, mut queue) = queue(&[]);
    assert_eq!(set_size(&mut queue, INDEX, 2), Ok(()));
    for size in [0, 3, 8, 0x1_0002] {
        let fault = GuestFault::QueueSize { queue: INDEX, size };
        assert_eq!(set_size(&mut queue, INDEX, size), Err(fault));
    }
    for (offset, good, bad) in [
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x4000, 0x4008),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x4002, 0x4001),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0x4004, 0x4002),
    ] {
        assert_eq!(set_ring_address(&mut queue, INDEX, offset, good), Ok(()));
        let fault = GuestFault::QueueAlignment { queue: INDEX, address_low: bad };
        assert_eq!(set_ring_address(&mut queue, INDEX, offset, bad), Err(fault));
    }
    assert_eq!(set_ring_address(&mut queue, INDEX, VIRTIO_MMIO_QUEUE_USED_HIGH, 7), Ok(()));
    assert_eq!(queue.used_ring(), 7 << 32 | 0x4004);
}
