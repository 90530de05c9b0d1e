//! A guest that does anything: random ports, random registers, random descriptors, and the world
//! answering at random moments. Nothing may panic, work and outputs stay bounded, every stop has
//! its reason, the same sequence always gives the same board, and a board that was saved and
//! restored in the middle goes on as if nothing had happened.

#![allow(clippy::unwrap_used, reason = "a refused state or an address outside memory is a failure")]

mod common;

use common::*;
use ftvmm_devices::{Board, BoardState, Input, Output, VIRTIO_NET_SLOT};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

/// What a queue can hold of the longest frames.
const TX_BYTES_PER_NOTIFICATION_MAX: usize = 256 * 65_565;

#[derive(Clone, Debug)]
enum Step {
    PioRead { port: u16, width: usize },
    PioWrite { port: u16, data: Vec<u8> },
    MmioRead { offset: u64, width: usize },
    MmioWrite { offset: u64, data: Vec<u8> },
    Register { offset: u64, value: u32 },
    Poke { address: u64, value: u64 },
    Descriptor { queue: u32, index: u16, descriptor: (u64, u32, u16, u16) },
    Available { queue: u32, head: u16 },
    Notify { queue: u32 },
    Send { length: usize, header: [u8; 12] },
    Refill { count: u16 },
    BringUp { features: u64 },
    Acknowledge,
    EndOfInterrupt,
    Advance { by_ns: u64 },
    Arrive { frame: Vec<u8> },
    Type { bytes: Vec<u8> },
    TakeOutputs,
}

fn port() -> impl Strategy<Value = u16> {
    let mapped = vec![
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x64, 0x70, 0x71,
        0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0xcf9, 0x600, 0x602, 0x604, 0x605,
        0x608, 0x609,
    ];
    prop_oneof![20 => prop::sample::select(mapped), 1 => any::<u16>()]
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        10 => any::<u8>().prop_map(|byte| vec![byte]),
        1 => prop::collection::vec(any::<u8>(), 0..max)
    ]
}

/// Addresses that matter: rings, buffers, the end of memory, the end of everything.
fn address() -> impl Strategy<Value = u64> {
    let near = |at: u64| (at.saturating_sub(32)..=at.saturating_add(0x2800)).boxed();
    prop_oneof![
        near(desc_table(RX)),
        near(desc_table(TX)),
        near(buffer(TX, 0)),
        near(buffer(RX, 0)),
        near(MEMORY_BYTES as u64),
        near(u64::MAX),
        any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..2000u32, 1 => 65_000..70_000u32, 1 => any::<u32>()]
}

fn index() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 0..6u16, 1 => 250..260u16, 1 => any::<u16>()]
}

fn register() -> impl Strategy<Value = u64> {
    prop_oneof![8 => (0..0x40u64).prop_map(|word| word * 4), 1 => 0..0x110u64]
}

fn features() -> impl Strategy<Value = u64> {
    prop_oneof![Just(FEATURES), Just(FEATURES | EVENT_IDX), Just(1 << 32), any::<u64>()]
}

fn step() -> impl Strategy<Value = Step> {
    let queue = || prop_oneof![100 => 0..2u32, 1 => any::<u32>()];
    let known_queue = || 0..2u32;
    prop_oneof![
        4 => (port(), 0..9usize).prop_map(|(port, width)| Step::PioRead {
            port,
            width: if width < 6 { 1 } else { width - 4 },
        }),
        4 => (port(), bytes(5)).prop_map(|(port, data)| Step::PioWrite { port, data }),
        1 => (0..VIRTIO_NET_SLOT.bytes, 0..9usize)
            .prop_map(|(offset, width)| Step::MmioRead { offset, width }),
        1 => (0..VIRTIO_NET_SLOT.bytes, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Step::MmioWrite { offset, data }),
        2 => (register(), prop_oneof![0..16u32, any::<u32>()])
            .prop_map(|(offset, value)| Step::Register { offset, value }),
        2 => (address(), any::<u64>()).prop_map(|(address, value)| Step::Poke { address, value }),
        6 => (known_queue(), index(), (address(), length(), 0..8u16, index()))
            .prop_map(|(queue, index, descriptor)| Step::Descriptor { queue, index, descriptor }),
        4 => (known_queue(), index()).prop_map(|(queue, head)| Step::Available { queue, head }),
        4 => queue().prop_map(|queue| Step::Notify { queue }),
        3 => (0..1600usize, prop_oneof![Just([0; 12]), any::<[u8; 12]>()])
            .prop_map(|(length, header)| Step::Send { length, header }),
        2 => (0..20u16).prop_map(|count| Step::Refill { count }),
        2 => features().prop_map(|features| Step::BringUp { features }),
        3 => Just(Step::Acknowledge),
        3 => Just(Step::EndOfInterrupt),
        3 => prop_oneof![0..10_000_000u64, any::<u32>().prop_map(|ns| u64::from(ns) << 8)]
            .prop_map(|by_ns| Step::Advance { by_ns }),
        4 => (any::<u8>(), prop_oneof![10 => 60..1400usize, 1 => 0..1600usize])
            .prop_map(|(tag, length)| Step::Arrive { frame: frame(tag, length) }),
        1 => prop::collection::vec(any::<u8>(), 0..20).prop_map(|bytes| Step::Type { bytes }),
        1 => Just(Step::TakeOutputs),
    ]
}

fn poke(driver: &Driver, address: u64, value: &[u8]) {
    // A guest's store outside memory does nothing.
    let _ = driver.mem.write_slice(value, GuestAddress(address));
}

/// Takes one step; what the guest and the world saw of it goes to `seen`.
fn take(driver: &mut Driver, step: &Step, seen: &mut Vec<u8>, sent: &mut Vec<Output>) {
    match step.clone() {
        Step::PioRead { port, width } => {
            let mut data = vec![0; width];
            driver.board.pio_read(port, &mut data);
            seen.extend(data);
        }
        Step::PioWrite { port, data } => driver.board.pio_write(port, &data),
        Step::MmioRead { offset, width } => {
            let mut data = vec![0; width];
            driver.board.mmio_read(&driver.mem, VIRTIO_NET_SLOT.base + offset, &mut data);
            seen.extend(data);
        }
        Step::MmioWrite { offset, data } => {
            driver.board.mmio_write(&driver.mem, VIRTIO_NET_SLOT.base + offset, &data);
        }
        Step::Register { offset, value } => {
            driver.write(offset, value);
            seen.extend(driver.read(offset).to_le_bytes());
        }
        Step::Poke { address, value } => poke(driver, address, &value.to_le_bytes()),
        Step::Descriptor { queue, index, descriptor: (address, length, flags, next) } => {
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            poke(driver, desc_table(queue) + 16 * u64::from(index), &descriptor);
        }
        Step::Available { queue, head } => driver.make_available(queue, head),
        Step::Notify { queue } => driver.notify(queue),
        Step::Send { length, header } => {
            let mut frame = frame(0, length);
            frame[..12].copy_from_slice(&header);
            driver.send(&frame);
        }
        Step::Refill { count } => driver.add_receive_buffers(count),
        Step::BringUp { features } => {
            driver.mem.write_slice(&[0; 0x3000], GuestAddress(desc_table(RX))).unwrap();
            driver.mem.write_slice(&[0; 0x3000], GuestAddress(desc_table(TX))).unwrap();
            driver.next_avail = [0; 3];
            driver.negotiate(features);
            driver.set_up_queue(RX);
            driver.set_up_queue(TX);
            driver.write(0x70, 0x0f);
        }
        Step::Acknowledge => {
            let pending = driver.board.interrupt_pending();
            let vector = driver.board.acknowledge_interrupt();
            assert_eq!(vector.is_some(), pending);
            seen.extend(vector);
        }
        Step::EndOfInterrupt => driver.board.pio_write(0x20, &[0x20]),
        Step::Advance { by_ns } => {
            let now_ns = driver.board.now_ns().saturating_add(by_ns);
            driver.board.apply(&driver.mem, Input::Time { now_ns });
            assert!(driver.board.next_deadline_ns().is_none_or(|deadline| deadline > now_ns));
        }
        Step::Arrive { frame } => driver.arrive(frame),
        Step::Type { bytes } => driver.board.apply(&driver.mem, Input::ConsoleRx { bytes }),
        Step::TakeOutputs => sent.extend(driver.board.take_outputs()),
    }
}

fn frame_bytes(outputs: &[Output]) -> usize {
    let lengths = outputs.iter().map(|output| match output {
        Output::Frame(frame) => frame.len(),
        Output::Console(_) | Output::Disk(_) => 0,
    });
    lengths.sum()
}

/// All that can be observed at the end of a run.
#[derive(PartialEq, Eq)]
struct Run {
    state: BoardState,
    seen: Vec<u8>,
    sent: Vec<Output>,
    memory: Vec<u8>,
}

/// Takes all steps; before step `restored_at` the board is replaced by one restored from its saved
/// bytes.
fn run(steps: &[Step], restored_at: Option<usize>) -> Run {
    let mut driver = Driver::up(FEATURES | EVENT_IDX);
    init_pic(&mut driver.board);
    for (port, value) in [(0x21, 0), (0xa1, 0), (0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        driver.board.pio_write(port, &[value]);
    }
    let (mut seen, mut sent) = (Vec::new(), Vec::new());
    for (number, step) in steps.iter().enumerate() {
        if restored_at == Some(number) {
            let saved = postcard::to_allocvec(&driver.board.save()).unwrap();
            let state: BoardState = postcard::from_bytes(&saved).unwrap();
            driver.board = Board::restore(state).unwrap();
        }
        sent.extend(driver.board.take_outputs());
        take(&mut driver, step, &mut seen, &mut sent);
        let outputs = driver.board.take_outputs();
        assert!(frame_bytes(&outputs) <= TX_BYTES_PER_NOTIFICATION_MAX);
        sent.extend(outputs);
        if driver.read(0x70) & STATUS_NEEDS_RESET != 0 {
            assert!(driver.board.guest_faults().last.is_some());
            assert!(!driver.board.network_ready());
        }
    }
    let mut memory = vec![0; MEMORY_BYTES];
    driver.mem.read_slice(&mut memory, GuestAddress(0)).unwrap();
    Run { state: driver.board.save(), seen, sent, memory }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn same_steps_same_board_even_when_restored_in_the_middle(
        steps in prop::collection::vec(step(), 1..120),
        restored_at in 0..120usize,
    ) {
        let first = run(&steps, None);
        let second = run(&steps, None);
        prop_assert!(first == second, "two runs differ");
        let restored = run(&steps, Some(restored_at % steps.len()));
        prop_assert_eq!(&first.state, &restored.state);
        prop_assert!(first == restored, "the restored run differs");
    }

    /// The rings on top of one another and of the buffers: the device's own writes change what it
    /// reads next.
    #[test]
    fn overlapping_rings_stay_bounded(
        rings in prop::collection::vec(0..0x40u64, 3),
        content in prop::collection::vec(any::<u16>(), 0x800),
        size in 0..9u32,
        arriving in 0..40usize,
    ) {
        let mut driver = Driver::new();
        driver.negotiate(FEATURES | EVENT_IDX);
        for queue in [RX, TX] {
            driver.write(0x30, queue);
            driver.write(0x38, 1 << size);
            for (offset, at) in [0x80, 0x90, 0xa0].into_iter().zip(&rings) {
                driver.write(offset, 0x1000 + (at * 16) as u32);
            }
            driver.write(0x44, 1);
        }
        driver.write(0x70, 0x0f);
        for (index, word) in content.iter().enumerate() {
            driver.poke(0x1000 + 2 * index as u64, *word);
        }
        for tag in 0..arriving {
            driver.arrive(frame(tag as u8, 60));
        }
        driver.notify(RX);
        driver.notify(TX);
        prop_assert!(frame_bytes(&driver.board.take_outputs()) <= TX_BYTES_PER_NOTIFICATION_MAX);
        prop_assert!(Board::restore(driver.board.save()).is_ok());
    }
}

#[test]
fn a_busy_board_survives_saving_field_by_field() {
    let mut driver = Driver::up(FEATURES | EVENT_IDX);
    let Driver { board, mem, .. } = &mut driver;
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04), (0x70, 0x0b), (0x71, 0x82)] {
        board.pio_write(port, &[value]);
    }
    board.pio_write(0xcf9, &[0x0a]);
    board.pio_write(0x602, &[0x20, 0]);
    board.pio_write(0x604, &[0, 0x34]);
    board.pio_write(0x3f8, b"x");
    board.apply(mem, Input::Time { now_ns: 100_000_000_000 });
    board.apply(mem, Input::ConsoleRx { bytes: vec![b'y'; 70_000] });
    driver.arrive(frame(1, 60));
    driver.arrive(frame(2, 60));
    driver.send(&frame(3, 5));
    let board = &driver.board;
    let state = board.save();
    let restored = Board::try_from(state.clone()).unwrap();
    assert_eq!(restored.save(), state);
    assert_eq!(restored.now_ns(), board.now_ns());
    assert_eq!(restored.power_event(), board.power_event());
    assert_eq!(restored.guest_faults(), board.guest_faults());
    assert_eq!(restored.net_counters(), board.net_counters());
    assert_eq!(restored.next_deadline_ns(), board.next_deadline_ns());
    assert!(restored.lost_ticks() > 0);
    assert_eq!(restored.lost_ticks(), board.lost_ticks());
    assert!(restored.dropped_console_bytes() > 0);
    assert_eq!(restored.dropped_console_bytes(), board.dropped_console_bytes());
}
