//! The entropy source as a driver meets it, and what a broken driver gets.

mod common;

use common::*;
use ftvmm_devices::{Board, BoardState, FLOATING_BUS, GuestFault, Input, VIRTIO_ENTROPY_SLOT};
use vm_memory::{Bytes, GuestAddress};

const QUEUE: u32 = RX;
const VERSION_1: u64 = 1 << 32;
/// IRQ 10 as [`init_pic`] maps it.
const VECTOR: u8 = 0x3a;

fn up(features: u64) -> Driver {
    let mut driver = Driver { base: VIRTIO_ENTROPY_SLOT.base, ..Driver::new() };
    driver.negotiate(features);
    driver.set_up_queue(QUEUE);
    driver.write(0x70, 0x0f);
    driver
}

fn supply(driver: &mut Driver, bytes: &[u8]) {
    driver.board.apply(&driver.mem, Input::Entropy { bytes: bytes.to_vec() });
}

/// Asks for `length` bytes in one buffer.
fn ask(driver: &mut Driver, length: u32) {
    let index = driver.next_avail[QUEUE as usize] % QUEUE_SIZE;
    driver.set_descriptor(QUEUE, index, (buffer(QUEUE, index), length, DESC_WRITE, 0));
    driver.make_available(QUEUE, index);
    driver.notify(QUEUE);
}

#[test]
fn registers_after_reset() {
    let mut driver = Driver { base: VIRTIO_ENTROPY_SLOT.base, ..Driver::new() };
    for (offset, value) in [(0x000, 0x7472_6976), (0x004, 2), (0x008, 4), (0x034, 256), (0x100, 0)]
    {
        assert_eq!(driver.read(offset), value, "register {offset:#x}");
    }
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "there is no second queue");
    let mut byte = [0];
    driver.board.mmio_read(&driver.mem, VIRTIO_ENTROPY_SLOT.base, &mut byte);
    assert_eq!(byte, [FLOATING_BUS]);
}

#[test]
fn a_request_waits_for_bytes_and_is_filled_by_them() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut driver = up(features);
        assert_eq!(driver.board.entropy_wanted_bytes(), 0);
        supply(&mut driver, b"nobody asked");
        assert_eq!(driver.board.entropy_supplied_bytes(), 0);

        ask(&mut driver, 64);
        assert_eq!(driver.board.entropy_wanted_bytes(), 64);
        assert_eq!(driver.take_used(QUEUE), []);
        assert_eq!(driver.read(0x60), 0);

        supply(&mut driver, &[7; 64]);
        assert_eq!(driver.take_used(QUEUE), [(0, 64)]);
        assert_eq!(driver.bytes(buffer(QUEUE, 0), 65), [&[7; 64][..], &[0]].concat());
        assert_eq!(driver.read(0x60), 1);
        assert_eq!(driver.board.entropy_wanted_bytes(), 0);
        assert_eq!(driver.board.entropy_supplied_bytes(), 64);
        assert_eq!(driver.board.guest_faults().count, 0);
    }
}

#[test]
fn fewer_bytes_use_the_buffer_and_more_are_dropped() {
    let mut driver = up(VERSION_1);
    ask(&mut driver, 64);
    supply(&mut driver, &[1; 10]);
    ask(&mut driver, 16);
    supply(&mut driver, &[2; 100]);
    assert_eq!(driver.take_used(QUEUE), [(0, 10), (1, 16)]);
    assert_eq!(driver.bytes(buffer(QUEUE, 1), 17), [&[2; 16][..], &[0]].concat());
    ask(&mut driver, 16);
    supply(&mut driver, &[]);
    assert_eq!(driver.board.entropy_wanted_bytes(), 16, "no bytes are no answer");
}

#[test]
fn buffers_are_filled_one_by_one_and_across_descriptors() {
    let mut driver = up(VERSION_1 | EVENT_IDX);
    driver.set_descriptor(QUEUE, 0, (buffer(QUEUE, 0), 3, DESC_WRITE | DESC_NEXT, 1));
    driver.set_descriptor(QUEUE, 1, (buffer(QUEUE, 1), 4, DESC_WRITE, 0));
    driver.set_descriptor(QUEUE, 2, (buffer(QUEUE, 2), 9, DESC_WRITE, 0));
    driver.make_available(QUEUE, 0);
    driver.make_available(QUEUE, 2);
    driver.notify(QUEUE);
    assert_eq!(driver.board.entropy_wanted_bytes(), 7);
    supply(&mut driver, b"abcdefghi");
    assert_eq!(driver.board.entropy_wanted_bytes(), 9);
    supply(&mut driver, b"ABCDEFGHI");
    assert_eq!(driver.take_used(QUEUE), [(0, 7), (2, 9)]);
    assert_eq!(driver.bytes(buffer(QUEUE, 0), 3), b"abc");
    assert_eq!(driver.bytes(buffer(QUEUE, 1), 4), b"defg");
    assert_eq!(driver.bytes(buffer(QUEUE, 2), 9), b"ABCDEFGHI");
    assert_eq!(driver.avail_event(QUEUE), 2, "the next request is to be notified");
}

#[test]
fn the_interrupt_rises_anew_after_each_acknowledge() {
    let mut driver = up(VERSION_1);
    init_pic(&mut driver.board);
    for (port, value) in [(0x21, !(1 << 2)), (0xa1, !(1 << 2))] {
        driver.board.pio_write(port, &[value]);
    }
    for _ in 0..2 {
        assert_eq!(driver.board.acknowledge_interrupt(), None);
        ask(&mut driver, 8);
        supply(&mut driver, &[1; 8]);
        assert_eq!(driver.board.acknowledge_interrupt(), Some(VECTOR));
        driver.write(0x64, 1);
        driver.board.pio_write(0xa0, &[0x20]);
        driver.board.pio_write(0x20, &[0x20]);
    }
}

#[test]
fn a_reset_forgets_the_request() {
    let mut driver = up(VERSION_1);
    ask(&mut driver, 64);
    driver.write(0x70, 0);
    assert_eq!(driver.board.entropy_wanted_bytes(), 0);
    supply(&mut driver, &[9; 64]);
    assert_eq!(driver.bytes(buffer(QUEUE, 0), 64), [0; 64]);
}

#[test]
fn a_broken_driver_stops_the_device() {
    let faults: [((u64, u32, u16, u16), GuestFault); 3] = [
        ((0x1000, 0, DESC_WRITE, 0), GuestFault::EmptyBuffer { queue: 0, head: 0 }),
        ((0x1000, 8, 0, 0), GuestFault::WrongDirection { queue: 0, head: 0 }),
        ((0x1000, 8, DESC_WRITE | DESC_NEXT, 0), GuestFault::LongChain { queue: 0, head: 0 }),
    ];
    for (descriptor, fault) in faults {
        let mut driver = up(VERSION_1);
        driver.set_descriptor(QUEUE, 0, descriptor);
        driver.make_available(QUEUE, 0);
        driver.notify(QUEUE);
        assert_eq!(driver.board.guest_faults().first, Some(fault));
        assert_ne!(driver.read(0x70) & STATUS_NEEDS_RESET, 0);
        assert_eq!(driver.board.entropy_wanted_bytes(), 0);
    }
}

#[test]
fn a_buffer_changed_after_the_notification_is_filled_as_it_is_now() {
    let mut driver = up(VERSION_1);
    ask(&mut driver, 64);
    driver.set_descriptor(QUEUE, 0, (buffer(QUEUE, 0), 5, DESC_WRITE, 0));
    supply(&mut driver, &[3; 64]);
    assert_eq!(driver.take_used(QUEUE), [(0, 5)]);

    ask(&mut driver, 64);
    driver.set_descriptor(QUEUE, 1, (MEMORY_BYTES as u64, 64, DESC_WRITE, 0));
    supply(&mut driver, &[3; 64]);
    let outside = GuestFault::BufferOutsideMemory {
        queue: 0,
        address: MEMORY_BYTES as u64,
        length_bytes: 64,
    };
    assert_eq!(driver.board.guest_faults().last, Some(outside));
    assert_eq!(driver.take_used(QUEUE), []);
}

#[test]
fn a_waiting_request_survives_saving() {
    let mut driver = up(VERSION_1);
    driver.mem.write_slice(&[0xee; 64], GuestAddress(buffer(QUEUE, 0))).unwrap();
    ask(&mut driver, 64);
    let saved = postcard::to_allocvec(&driver.board.save()).unwrap();
    let state: BoardState = postcard::from_bytes(&saved).unwrap();
    driver.board = Board::restore(state).unwrap();
    assert_eq!(driver.board.entropy_wanted_bytes(), 64);
    supply(&mut driver, &[4; 64]);
    assert_eq!(driver.take_used(QUEUE), [(0, 64)]);
    assert_eq!(driver.board.entropy_supplied_bytes(), 64);
}
