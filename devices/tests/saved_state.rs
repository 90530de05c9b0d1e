//! The encoding of a saved board, byte by byte: snapshots and transfers between hosts carry it.

#![allow(clippy::unwrap_used, reason = "a refused state or an unwritable file is a failure")]

mod common;

use std::collections::BTreeSet;

use common::*;
use ftvmm_devices::{
    Board, BoardState, DiskOutcome, Input, RX_BACKLOG_FRAMES_MAX, VIRTIO_BLK_SLOT,
    VIRTIO_ENTROPY_SLOT, VIRTIO_NET_SLOT,
};

const GOLDEN: &[u8] = include_bytes!("golden/board-state.bin");
/// Where the bytes go when they are not the golden ones.
const ACTUAL: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/board-state.bin");

const DISK_FEATURES: u64 = 1 << 32 | 1 << 9;
const MISALIGNED: u32 = 0x0d;

/// Two different faults: a queue that is not ready is notified, and a ring is misaligned.
fn break_rules(driver: &mut Driver, base: u64) {
    driver.base = base;
    driver.negotiate(1 << 32);
    driver.write(0x50, 1);
    driver.write(0x80, MISALIGNED);
}

fn bring_up(driver: &mut Driver, base: u64, features: u64, queues: &[u32]) {
    driver.base = base;
    driver.next_avail = [0; 3];
    driver.negotiate(features);
    queues.iter().for_each(|queue| driver.set_up_queue(*queue));
    driver.write(0x70, 0x0f);
    driver.write(0x14, 1);
}

/// A network card with a backlog, a wish for an announcement, a source with tags, and one of each
/// counter.
fn busy_network(driver: &mut Driver) {
    break_rules(driver, VIRTIO_NET_SLOT.base);
    driver.arrive(frame(1, 60));
    let features = FEATURES | NEWER_FEATURES | EVENT_IDX;
    bring_up(driver, VIRTIO_NET_SLOT.base, features, &[RX, TX, CONTROL]);
    driver.poke(0x3a_0000, [3u8, 0]);
    driver.set_descriptor(CONTROL, 0, (0x3a_0000, 2, DESC_NEXT, 1));
    driver.set_descriptor(CONTROL, 1, (0x3a_0010, 1, DESC_WRITE, 0));
    driver.make_available(CONTROL, 0);
    driver.notify(CONTROL);
    driver.add_receive_buffers(1);
    driver.notify(RX);
    driver.arrive(vec![0; 3]);
    (0..=RX_BACKLOG_FRAMES_MAX + 1).for_each(|tag| driver.arrive(frame(tag as u8, 60)));
    driver.add_receive_buffers(RX_BACKLOG_FRAMES_MAX as u16 - 2);
    driver.notify(RX);
    let mut malformed = frame(4, 60);
    malformed[1] = 9;
    driver.send(&malformed);
    let ethernet = [
        &[0; 12][..],
        &[2, 0, 0, 0, 0, 9, 4, 0, 0, 0, 0, 1],
        &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6, 8, 0],
    ];
    driver.send(&ethernet.concat());
    driver.board.apply(&driver.mem, Input::NetAnnounce);
}

/// An entropy source that gave some bytes and waits for more.
fn busy_entropy(driver: &mut Driver) {
    break_rules(driver, VIRTIO_ENTROPY_SLOT.base);
    bring_up(driver, VIRTIO_ENTROPY_SLOT.base, 1 << 32 | EVENT_IDX, &[0]);
    for index in 0..2 {
        driver.set_descriptor(0, index, (buffer(0, index), 40, DESC_WRITE, 0));
        driver.make_available(0, index);
        driver.notify(0);
    }
    driver.board.apply(&driver.mem, Input::Entropy { bytes: vec![7; 16] });
}

/// A disk that has seen a request of each kind; a read and a write are under way.
fn busy_disk(driver: &mut Driver) {
    break_rules(driver, VIRTIO_BLK_SLOT.base);
    bring_up(driver, VIRTIO_BLK_SLOT.base, DISK_FEATURES | EVENT_IDX, &[0]);
    // IN, OUT, FLUSH, DISCARD, WRITE_ZEROES: a read beyond the end fails at once.
    let requests =
        [(0u32, 1u64, 512, true), (1, 2, 16, false), (4, 0, 0, false), (11, 0, 16, false)];
    let more = [(13, 0, 16, false), (0, 1 << 40, 512, true), (0, 3, 512, true), (1, 4, 512, false)];
    for (slot, (kind, sector, length, for_writing)) in (0u16..).zip(requests.iter().chain(&more)) {
        let (at, head) = (buffer(0, slot), slot * 3);
        driver.poke(at, *kind);
        driver.poke(at + 8, *sector);
        // Sector, count and flags of a discard; the data of a write.
        driver.poke(at + 0x100, 8u64);
        driver.poke(at + 0x108, 8u32);
        let length = if *kind == 1 { 512 } else { *length };
        driver.set_descriptor(0, head, (at, 16, DESC_NEXT, head + 1));
        let direction = if *for_writing { DESC_WRITE } else { 0 };
        let data = (at + 0x100, length, DESC_NEXT | direction, head + 2);
        if length > 0 {
            driver.set_descriptor(0, head + 1, data);
            driver.set_descriptor(0, head + 2, (at + 16, 1, DESC_WRITE, 0));
        } else {
            driver.set_descriptor(0, head + 1, (at + 16, 1, DESC_WRITE, 0));
        }
        driver.make_available(0, head);
        driver.notify(0);
    }
    let done = Input::DiskDone { id: 1, outcome: DiskOutcome::Done { data: vec![9; 512] } };
    driver.board.apply(&driver.mem, done);
}

/// Writes that leave no register as it is at power-on.
const BUSY: &[(u16, u8)] = &[
    // First chip: level triggered lines, priorities rotated, special mask, polled.
    (0x4d0, 0x20),
    (0x4d1, 0x02),
    (0x20, 0xc2),
    (0x20, 0x6b),
    (0x20, 0x0c),
    // Second chip: alone, automatic end of interrupt with rotation, fully nested.
    (0xa0, 0x13),
    (0xa1, 0x38),
    (0xa1, 0x12),
    (0xa0, 0x80),
    (0xa1, 0x51),
    // Timer: counter 0 with a successor, half written; counter 1 latched, BCD; counter 2 with
    // its gate closed.
    (0x40, 0x11),
    (0x40, 0x22),
    (0x40, 0x33),
    (0x43, 0x57),
    (0x41, 0x44),
    (0x43, 0xc4),
    (0x61, 0x03),
    (0x43, 0xb0),
    (0x42, 0x55),
    (0x42, 0x66),
    (0x61, 0x02),
    // Clock: interrupts wanted, time set by an hour, then frozen.
    (0x70, 0x0b),
    (0x71, 0x32),
    (0x70, 0x04),
    (0x71, 0x01),
    (0x70, 0x0b),
    (0x71, 0xb2),
    (0xcf9, 0x0e),
    // Console: every register that keeps what is written.
    (0x3fb, 0x83),
    (0x3f8, 0x11),
    (0x3f9, 0x12),
    (0x3fb, 0x03),
    (0x3fc, 0x0b),
    (0x3ff, 0x5a),
    (0x3f9, 0x05),
    (0x505, 0x01),
];

/// A board whose fields are all another than at power-on, as far as they can be so together.
fn busy_board() -> Board {
    let mut driver = Driver::new();
    let Driver { board, mem, .. } = &mut driver;
    board.apply(mem, Input::ConsoleRx { bytes: vec![b'y'; 70_000] });
    board.reset();
    init_pic(board);
    for (port, value) in [
        // The timer's interrupt is level triggered, in service, and the next one waits.
        (0x21, 0x00),
        (0x43, 0x34),
        (0x40, 0xa9),
        (0x40, 0x04),
    ] {
        board.pio_write(port, &[value]);
    }
    board.apply(mem, Input::Time { now_ns: 50_000_000_000 });
    board.acknowledge_interrupt();
    busy_network(&mut driver);
    busy_entropy(&mut driver);
    busy_disk(&mut driver);
    let Driver { board, mem, .. } = &mut driver;
    for (port, value) in BUSY {
        board.pio_write(*port, &[*value]);
    }
    b"Kernel panic - not syncing: ink".iter().for_each(|byte| board.pio_write(0x3f8, &[*byte]));
    board.pio_write(0x602, &[0x21, 0x01]);
    board.pio_write(0x60d, &[0x01]);
    board.pio_write(0x604, &[0x02, 0x34]);
    board.apply(mem, Input::ConsoleBreak);
    board.apply(mem, Input::ConsoleRx { bytes: b"typed".to_vec() });
    board.apply(mem, Input::PowerButton);
    board.apply(mem, Input::Nmi);
    board.apply(mem, Input::NewIdentity { generation_id: [3; 16], unix_s: 1_800_000_000 });
    board.pio_read(0x42, &mut [0]);
    driver.board
}

/// Names of the fields that are nowhere other than zero, empty or absent.
fn fields_at_rest(state: &BoardState) -> BTreeSet<String> {
    let text = format!("{state:#?}");
    let fields: Vec<(&str, &str)> =
        text.lines().filter_map(|line| line.trim().split_once(": ")).collect();
    let rests = |value: &str| matches!(value, "0," | "false," | "None," | "[]," | "Ready,");
    let busy: BTreeSet<&str> =
        fields.iter().filter(|(_, value)| !rests(value)).map(|(name, _)| *name).collect();
    let all = fields.iter().map(|(name, _)| *name);
    all.filter(|name| !busy.contains(name)).map(str::to_owned).collect()
}

#[test]
fn a_saved_board_has_the_bytes_it_has_always_had() {
    let state = busy_board().save();
    let bytes = postcard::to_allocvec(&state).unwrap();
    if bytes != GOLDEN {
        std::fs::write(ACTUAL, &bytes).unwrap();
        panic!("raise the version of the machine's state, then take {ACTUAL} as the golden bytes");
    }
    // An interrupt controller that is being initialised has forgotten much else.
    assert_eq!(fields_at_rest(&state), BTreeSet::from(["init_step".to_owned()]));
}

#[test]
fn the_golden_bytes_are_a_board_that_is_saved_as_they_are() {
    let state: BoardState = postcard::from_bytes(GOLDEN).unwrap();
    let restored = Board::restore(state).unwrap();
    assert!(postcard::to_allocvec(&restored.save()).unwrap() == GOLDEN);
}
