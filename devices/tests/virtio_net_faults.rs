//! Every way to break the virtio rules that the network card knows: the reason is kept, the device
//! stops, and starts over after a reset.

mod common;

use common::*;
use ftvmm_devices::{GuestFault, HeaderProblem};

#[test]
fn a_frame_with_a_bad_header_is_dropped_and_noted() {
    let mut driver = Driver::up(FEATURES);
    let mut bad = frame(0, 60);
    bad[1] = 3;
    driver.send(&bad);
    driver.send(&frame(1, 13));
    driver.send(&frame(2, 60));
    assert_eq!(driver.take_used(TX).len(), 3);
    assert_eq!(driver.take_frames(), [frame(2, 60)]);
    let faults = driver.board.guest_faults();
    assert_eq!(faults.count, 2);
    let problem = HeaderProblem::SegmentationNotNegotiated;
    assert_eq!(faults.first, Some(GuestFault::FrameHeader { problem }));
    let problem = HeaderProblem::ShortFrame;
    assert_eq!(faults.last, Some(GuestFault::FrameHeader { problem }));
    assert_eq!(driver.read(0x70) & STATUS_NEEDS_RESET, 0);
}

/// One way to break the rules, and the fault it has to be reported as.
type Misdeed = (&'static str, fn(&mut Driver), GuestFault);

const MISDEEDS: &[Misdeed] = &[
    (
        "a chain that loops",
        |driver| {
            driver.set_descriptor(TX, 0, (buffer(TX, 0), 8, DESC_NEXT, 1));
            driver.set_descriptor(TX, 1, (buffer(TX, 1), 8, DESC_NEXT, 0));
            driver.make_available(TX, 0);
            driver.notify(TX);
        },
        GuestFault::LongChain { queue: 1, head: 0 },
    ),
    (
        "a chain that leaves the table",
        |driver| {
            driver.set_descriptor(TX, 3, (buffer(TX, 0), 80, DESC_NEXT, 256));
            driver.make_available(TX, 3);
            driver.notify(TX);
        },
        GuestFault::BrokenChain { queue: 1, head: 3 },
    ),
    (
        "a head outside the table",
        |driver| {
            driver.make_available(TX, 256);
            driver.notify(TX);
        },
        GuestFault::BrokenChain { queue: 1, head: 256 },
    ),
    (
        "an indirect table outside memory",
        |driver| {
            driver.set_descriptor(TX, 0, (u64::MAX - 15, 16 * 65_535, 4, 0));
            driver.make_available(TX, 0);
            driver.notify(TX);
        },
        GuestFault::BrokenChain { queue: 1, head: 0 },
    ),
    (
        "more bytes than any frame has",
        |driver| {
            driver.set_descriptor(TX, 0, (0x10_0000, 65_566, 0, 0));
            driver.make_available(TX, 0);
            driver.notify(TX);
        },
        GuestFault::LongChain { queue: 1, head: 0 },
    ),
    (
        "four gibibytes in one descriptor",
        |driver| {
            driver.set_descriptor(TX, 0, (0, u32::MAX, 0, 0));
            driver.make_available(TX, 0);
            driver.notify(TX);
        },
        GuestFault::LongChain { queue: 1, head: 0 },
    ),
    (
        "a frame outside memory",
        |driver| {
            driver.set_descriptor(TX, 0, (MEMORY_BYTES as u64 - 50, 60, 0, 0));
            driver.make_available(TX, 0);
            driver.notify(TX);
        },
        GuestFault::BufferOutsideMemory {
            queue: 1,
            address: MEMORY_BYTES as u64 - 50,
            length_bytes: 60,
        },
    ),
    (
        "an address that wraps",
        |driver| {
            driver.set_descriptor(TX, 0, (u64::MAX - 3, 60, 0, 0));
            driver.make_available(TX, 0);
            driver.notify(TX);
        },
        GuestFault::BufferOutsideMemory { queue: 1, address: u64::MAX - 3, length_bytes: 60 },
    ),
    (
        "a buffer to write in the transmit queue",
        |driver| {
            driver.set_descriptor(TX, 0, (buffer(TX, 0), 60, DESC_WRITE, 0));
            driver.make_available(TX, 0);
            driver.notify(TX);
        },
        GuestFault::WrongDirection { queue: 1, head: 0 },
    ),
    (
        "a buffer to read in the receive queue",
        |driver| {
            driver.set_descriptor(RX, 4, (buffer(RX, 0), 1536, 0, 0));
            driver.make_available(RX, 4);
            driver.arrive(frame(0, 60));
        },
        GuestFault::WrongDirection { queue: 0, head: 4 },
    ),
    (
        "a receive buffer that is too small",
        |driver| {
            driver.set_descriptor(RX, 0, (buffer(RX, 0), 71, DESC_WRITE, 0));
            driver.make_available(RX, 0);
            driver.arrive(frame(0, 60));
        },
        GuestFault::ReceiveBufferTooSmall { head: 0, frame_bytes: 72 },
    ),
    (
        "a receive buffer outside memory",
        |driver| {
            driver.set_descriptor(RX, 0, (1 << 40, 1536, DESC_WRITE, 0));
            driver.make_available(RX, 0);
            driver.arrive(frame(0, 60));
        },
        GuestFault::BufferOutsideMemory { queue: 0, address: 1 << 40, length_bytes: 1536 },
    ),
    (
        "an available index that runs ahead",
        |driver| {
            driver.poke(avail_ring(TX) + 2, QUEUE_SIZE + 1);
            driver.notify(TX);
        },
        GuestFault::AvailableIndex { queue: 1 },
    ),
    (
        "the notification of a queue that is not ready",
        |driver| {
            driver.write(0x30, TX);
            driver.write(0x44, 0);
            driver.notify(TX);
        },
        GuestFault::QueueNotReady { queue: 1 },
    ),
    (
        "the notification of a queue that does not exist",
        |driver| driver.notify(0x1_0001),
        GuestFault::QueueNotReady { queue: 0x1_0001 },
    ),
];

#[test]
fn a_broken_driver_finds_needs_reset_and_the_reason_is_kept() {
    for (name, misdeed, fault) in MISDEEDS {
        let mut driver = Driver::up(FEATURES);
        misdeed(&mut driver);
        let faults = driver.board.guest_faults();
        assert_eq!((faults.count, faults.first), (1, Some(*fault)), "{name}");
        assert!(!fault.to_string().is_empty());
        assert_eq!(driver.read(0x70) & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET, "{name}");
        assert_eq!(driver.read(0x60), 2, "{name}: a configuration interrupt");
        assert!(!driver.board.network_ready(), "{name}");
        // Nothing more is served …
        driver.next_avail = [0; 3];
        driver.send(&frame(0, 60));
        driver.arrive(frame(0, 60));
        assert_eq!(driver.take_frames(), Vec::<Vec<u8>>::new(), "{name}");
        assert_eq!(driver.board.guest_faults().count, 1, "{name}");
        // … until the driver starts over.
        let restarted = Driver::up(FEATURES);
        driver.mem = restarted.mem;
        (driver.next_avail, driver.seen_used) = ([0; 3], [0; 3]);
        driver.negotiate(FEATURES);
        driver.set_up_queue(RX);
        driver.set_up_queue(TX);
        driver.write(0x70, 0x0f);
        driver.send(&frame(9, 60));
        assert_eq!(driver.take_frames(), [frame(9, 60)], "{name}");
    }
}

#[test]
fn bad_queue_registers_are_faults_at_once() {
    for (name, offset, value, fault) in [
        ("size 0", 0x38, 0, GuestFault::QueueSize { queue: 1, size: 0 }),
        ("size 3", 0x38, 3, GuestFault::QueueSize { queue: 1, size: 3 }),
        ("size 512", 0x38, 512, GuestFault::QueueSize { queue: 1, size: 512 }),
        ("size 65 537", 0x38, 0x1_0001, GuestFault::QueueSize { queue: 1, size: 0x1_0001 }),
        ("table", 0x80, 0x1008, GuestFault::QueueAlignment { queue: 1, address_low: 0x1008 }),
        ("available", 0x90, 0x1001, GuestFault::QueueAlignment { queue: 1, address_low: 0x1001 }),
        ("used", 0xa0, 0x1002, GuestFault::QueueAlignment { queue: 1, address_low: 0x1002 }),
    ] {
        let mut driver = Driver::new();
        driver.negotiate(FEATURES);
        driver.write(0x30, TX);
        driver.write(offset, value);
        assert_eq!(driver.board.guest_faults().last, Some(fault), "{name}");
        assert_eq!(driver.read(0x70) & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET, "{name}");
    }
    for offset in [0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        let mut driver = Driver::new();
        driver.negotiate(FEATURES);
        driver.set_up_queue(RX);
        driver.write(0x30, RX);
        driver.write(0x44, 0);
        driver.set_up_queue(RX);
        driver.write(0x44, 0);
        driver.write(0x38, 256);
        for other in [0x80, 0x90, 0xa0] {
            driver.write(other, 0x1000);
        }
        driver.write(offset, 0x7fff_fff0);
        driver.write(0x44, 1);
        let fault = GuestFault::QueueOutsideMemory { queue: 0 };
        assert_eq!(driver.board.guest_faults().last, Some(fault), "register {offset:#x}");
        assert_eq!(driver.read(0x44), 0);
    }
}

#[test]
fn a_used_ring_that_rewrites_the_available_index_is_a_fault() {
    let mut driver = Driver::new();
    driver.negotiate(FEATURES);
    driver.write(0x30, TX);
    driver.write(0x38, 1);
    // The only used element lies on the available ring's flags, index and entry.
    for (offset, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x1ffc)] {
        driver.write(offset, address);
    }
    driver.write(0x44, 1);
    driver.write(0x70, 0x0f);
    driver.poke(0x1000, 0x3000u64);
    driver.poke(0x1008, 72u64);
    driver.poke(0x2002, 1u16);
    driver.notify(TX);
    assert_eq!(driver.take_frames().len(), 1);
    assert_eq!(driver.board.guest_faults().last, Some(GuestFault::AvailableIndex { queue: 1 }));
    assert_eq!(driver.read(0x70) & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET);
}
