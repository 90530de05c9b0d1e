//! The disk's device as a driver meets it, what a broken driver gets, and random requests against a
//! model.

#![allow(clippy::unwrap_used, reason = "a refused state or an address outside memory is a failure")]

mod common;

use common::*;
use ftvmm_devices::{
    Board, BoardState, DiskOp, DiskOutcome, DiskRequest, FLOATING_BUS, GuestFault, Input, Output,
    VIRTIO_BLK_SLOT, ZeroRange,
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

const QUEUE: u32 = 0;
/// VERSION_1 and what Linux takes: SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, DISCARD, WRITE_ZEROES.
const FEATURES: u64 = 1 << 32 | 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
/// A status no device writes.
const UNTOUCHED: u8 = 0xee;

fn up(features: u64) -> Driver {
    let mut driver = Driver { base: VIRTIO_BLK_SLOT.base, ..Driver::new() };
    driver.negotiate(features);
    driver.set_up_queue(QUEUE);
    driver.write(0x70, 0x0f);
    driver
}

fn data_at(slot: u16) -> u64 {
    buffer(QUEUE, slot) + 0x100
}

/// Puts a request into descriptors `3 * slot`..: header, data and status, as Linux does. Slots are
/// 0x800 bytes.
fn put(driver: &mut Driver, slot: u16, kind: u32, sector: u64, given: &[u8], room: u32) {
    let (at, head) = (buffer(QUEUE, slot), slot * 3);
    driver.poke(at, kind);
    driver.poke(at + 4, 0u32);
    driver.poke(at + 8, sector);
    driver.poke(at + 16, UNTOUCHED);
    driver.set_descriptor(QUEUE, head, (at, 16, DESC_NEXT, head + 1));
    let status = (at + 16, 1, DESC_WRITE, 0);
    if !given.is_empty() {
        driver.mem.write_slice(given, GuestAddress(data_at(slot))).unwrap();
        let length = given.len() as u32;
        driver.set_descriptor(QUEUE, head + 1, (data_at(slot), length, DESC_NEXT, head + 2));
        driver.set_descriptor(QUEUE, head + 2, status);
    } else if room > 0 {
        let data = (data_at(slot), room, DESC_NEXT | DESC_WRITE, head + 2);
        driver.set_descriptor(QUEUE, head + 1, data);
        driver.set_descriptor(QUEUE, head + 2, status);
    } else {
        driver.set_descriptor(QUEUE, head + 1, status);
    }
    driver.make_available(QUEUE, head);
}

fn ask(driver: &mut Driver, slot: u16, kind: u32, sector: u64, given: &[u8], room: u32) {
    put(driver, slot, kind, sector, given, room);
    driver.notify(QUEUE);
}

fn status(driver: &Driver, slot: u16) -> u8 {
    driver.peek(buffer(QUEUE, slot) + 16)
}

fn requests(driver: &mut Driver) -> Vec<DiskRequest> {
    let of_disk = |output| match output {
        Output::Disk(request) => Some(request),
        Output::Frame(_) | Output::Console(_) => None,
    };
    driver.board.take_outputs().into_iter().filter_map(of_disk).collect()
}

fn complete(driver: &mut Driver, id: u64, outcome: DiskOutcome) {
    driver.board.apply(&driver.mem, Input::DiskDone { id, outcome });
}

fn done(data: &[u8]) -> DiskOutcome {
    DiskOutcome::Done { data: data.to_vec() }
}

#[test]
fn registers_and_configuration() {
    let mut driver = Driver { base: VIRTIO_BLK_SLOT.base, ..Driver::new() };
    for (offset, value) in [
        (0x000, 0x7472_6976),
        (0x008, 2),
        (0x010, (FEATURES | EVENT_IDX) as u32),
        (0x034, 256),
        (0x100, 64),
        (0x104, 0),
        (0x108, 32 << 10),
        (0x10c, 126),
        (0x114, 512),
        (0x124, 1 << 18),
        (0x128, 16),
        (0x12c, 8),
        (0x130, 1 << 18),
        (0x134, 1),
        (0x138, 1),
        (0x13c, 0),
    ] {
        assert_eq!(driver.read(offset), value, "register {offset:#x}");
    }
    let mut byte = [0];
    driver.board.mmio_read(&driver.mem, VIRTIO_BLK_SLOT.base, &mut byte);
    assert_eq!(byte, [FLOATING_BUS]);
}

#[test]
fn a_write_is_copied_at_the_notification_and_answered_later() {
    for features in [FEATURES, FEATURES | EVENT_IDX] {
        let mut driver = up(features);
        ask(&mut driver, 0, OUT, 3, &[7; 512], 0);
        driver.mem.write_slice(&[9; 512], GuestAddress(data_at(0))).unwrap();
        let op = DiskOp::Write { sector: 3, data: vec![7; 512] };
        assert_eq!(requests(&mut driver), [DiskRequest { id: 1, op }]);
        assert_eq!((driver.take_used(QUEUE), status(&driver, 0)), (vec![], UNTOUCHED));
        assert_eq!(driver.read(0x60), 0);
        complete(&mut driver, 1, done(&[]));
        assert_eq!(driver.take_used(QUEUE), [(0, 1)]);
        assert_eq!(status(&driver, 0), 0);
        assert_eq!(driver.read(0x60), 1);
        assert_eq!(driver.board.guest_faults().count, 0);
    }
}

#[test]
fn answers_may_come_in_any_order_and_once() {
    let mut driver = up(FEATURES);
    put(&mut driver, 0, IN, 0, &[], 512);
    put(&mut driver, 1, IN, 1, &[], 512);
    put(&mut driver, 2, FLUSH, 0, &[], 0);
    driver.notify(QUEUE);
    let ids: Vec<u64> = requests(&mut driver).iter().map(|request| request.id).collect();
    assert_eq!(ids, [1, 2, 3]);
    complete(&mut driver, 3, done(&[]));
    complete(&mut driver, 2, done(&[2; 512]));
    complete(&mut driver, 2, done(&[3; 512]));
    complete(&mut driver, 77, done(&[3; 512]));
    assert_eq!(driver.take_used(QUEUE), [(6, 1), (3, 513)]);
    assert_eq!(driver.bytes(data_at(1), 513), [&[2; 512][..], &[0]].concat());
    assert_eq!((status(&driver, 0), status(&driver, 1)), (UNTOUCHED, 0));
}

#[test]
fn a_failure_and_an_answer_of_the_wrong_length_are_io_errors() {
    let mut driver = up(FEATURES);
    for (slot, outcome) in [(0, DiskOutcome::Failed), (1, done(&[1; 511])), (2, done(&[1; 513]))] {
        ask(&mut driver, slot, IN, 0, &[], 512);
        complete(&mut driver, u64::from(slot) + 1, outcome);
        assert_eq!(status(&driver, slot), 1);
        assert_eq!(driver.bytes(data_at(slot), 512), [0; 512]);
    }
    assert_eq!(driver.board.disk_counters().failed, 3);
}

#[test]
fn what_needs_no_host_is_answered_at_once() {
    let mut driver = up(FEATURES);
    ask(&mut driver, 0, GET_ID, 0, &[], 20);
    ask(&mut driver, 1, 99, 0, &[], 0);
    ask(&mut driver, 2, IN, 64, &[], 512);
    assert_eq!(driver.take_used(QUEUE), [(0, 21), (3, 1), (6, 1)]);
    assert_eq!(driver.bytes(data_at(0), 12), b"ftvmm-disk\0\0");
    assert_eq!([0, 1, 2].map(|slot| status(&driver, slot)), [0, 2, 1]);
    assert_eq!(requests(&mut driver), []);
}

#[test]
fn framing_means_nothing() {
    let mut driver = up(FEATURES);
    let (header, data, rest) = (buffer(QUEUE, 0), buffer(QUEUE, 1), buffer(QUEUE, 2));
    driver.poke(header, IN);
    driver.poke(header + 8, 5u64);
    driver.set_descriptor(QUEUE, 0, (header, 7, DESC_NEXT, 1));
    driver.set_descriptor(QUEUE, 1, (header + 7, 9, DESC_NEXT, 2));
    driver.set_descriptor(QUEUE, 2, (data, 300, DESC_NEXT | DESC_WRITE, 3));
    driver.set_descriptor(QUEUE, 3, (rest, 213, DESC_WRITE, 0));
    driver.make_available(QUEUE, 0);
    driver.notify(QUEUE);
    let op = DiskOp::Read { sector: 5, length_bytes: 512 };
    assert_eq!(requests(&mut driver), [DiskRequest { id: 1, op }]);
    driver.poke(rest + 212, UNTOUCHED);
    complete(&mut driver, 1, done(&[4; 512]));
    assert_eq!(driver.bytes(data, 301), [&[4; 300][..], &[0]].concat());
    assert_eq!(driver.bytes(rest, 213), [&[4; 212][..], &[0]].concat());
}

#[test]
fn a_reset_forgets_requests_and_their_numbers_go_on() {
    let mut driver = up(FEATURES);
    ask(&mut driver, 0, IN, 0, &[], 512);
    driver.write(0x70, 0);
    complete(&mut driver, 1, done(&[8; 512]));
    assert_eq!(driver.bytes(data_at(0), 512), [0; 512]);

    ask_after_reset(&mut driver);
    assert_eq!(requests(&mut driver).last().unwrap().id, 2);
}

fn ask_after_reset(driver: &mut Driver) {
    driver.mem.write_slice(&[0; 0x3000], GuestAddress(desc_table(QUEUE))).unwrap();
    (driver.next_avail, driver.seen_used) = ([0; 3], [0; 3]);
    driver.negotiate(FEATURES);
    driver.set_up_queue(QUEUE);
    driver.write(0x70, 0x0f);
    ask(driver, 0, IN, 0, &[], 512);
}

#[test]
fn an_answer_to_a_request_before_the_reset_reaches_no_later_one() {
    let mut driver = up(FEATURES);
    ask(&mut driver, 0, IN, 0, &[], 512);
    ask_after_reset(&mut driver);
    complete(&mut driver, 1, done(&[8; 512]));
    assert_eq!((driver.take_used(QUEUE), status(&driver, 0)), (vec![], UNTOUCHED));
    complete(&mut driver, 2, done(&[9; 512]));
    assert_eq!(driver.take_used(QUEUE), [(0, 513)]);
    assert_eq!(driver.bytes(data_at(0), 512), [9; 512]);
}

#[test]
fn the_host_is_never_given_more_than_it_can_hold() {
    let mut driver = up(FEATURES | EVENT_IDX);
    // The largest request there is, as one buffer over and over.
    for index in 0..127 {
        driver.set_descriptor(QUEUE, index, (0, 32 << 10, DESC_NEXT, index + 1));
    }
    driver.poke(buffer(QUEUE, 0), OUT);
    driver.poke(buffer(QUEUE, 0) + 8, 0u64);
    driver.set_descriptor(QUEUE, 0, (buffer(QUEUE, 0), 16, DESC_NEXT, 1));
    driver.set_descriptor(QUEUE, 127, (buffer(QUEUE, 1), 1, DESC_WRITE, 0));
    driver.make_available(QUEUE, 0);
    driver.notify(QUEUE);
    // It is longer than this disk.
    assert_eq!(driver.board.guest_faults().count, 0);
    assert_eq!(driver.peek::<u8>(buffer(QUEUE, 1)), 1);

    driver.set_descriptor(QUEUE, 2, (0, 512, DESC_NEXT, 127));
    driver.set_descriptor(QUEUE, 1, (0, 32 << 10, DESC_NEXT, 127));
    let mut given = 0;
    for _ in 0..100 {
        (0..5).for_each(|_| driver.make_available(QUEUE, 0));
        driver.notify(QUEUE);
        given += requests(&mut driver).len();
        if driver.board.guest_faults().count > 0 {
            break;
        }
    }
    assert_eq!(given, 256, "a driver that names its request again and again");
    assert_eq!(
        driver.board.guest_faults().first,
        None,
        "the rest waits in the queue until it overflows"
    );
}

#[test]
fn requests_that_waited_in_the_queue_follow_an_answer() {
    let mut driver = up(FEATURES | EVENT_IDX);
    put(&mut driver, 0, FLUSH, 0, &[], 0);
    (0..255).for_each(|_| driver.make_available(QUEUE, 0));
    driver.notify(QUEUE);
    assert_eq!(requests(&mut driver).len(), 256);
    put(&mut driver, 1, FLUSH, 0, &[], 0);
    driver.notify(QUEUE);
    assert_eq!(requests(&mut driver), []);
    complete(&mut driver, 9, done(&[]));
    let waited = DiskRequest { id: 257, op: DiskOp::Flush };
    assert_eq!(requests(&mut driver), [waited]);
}

#[test]
fn a_broken_driver_stops_the_device() {
    type Descriptors = &'static [(u64, u32, u16, u16)];
    let outside = MEMORY_BYTES as u64;
    let faults: [(Descriptors, GuestFault); 6] = [
        (&[(0, 15, DESC_NEXT, 1), (0, 1, DESC_WRITE, 0)], short()),
        (&[(0, 16, 0, 0)], short()),
        (&[(0, 16, DESC_NEXT, 1), (0, 0, DESC_WRITE, 0)], short()),
        (
            &[(0, 1, DESC_WRITE | DESC_NEXT, 1), (0, 16, 0, 0)],
            GuestFault::WrongDirection { queue: 0, head: 0 },
        ),
        (&[(0, 16, DESC_NEXT, 0)], GuestFault::LongChain { queue: 0, head: 0 }),
        (
            &[(0, 16, DESC_NEXT, 1), (MEMORY_BYTES as u64, 1, DESC_WRITE, 0)],
            GuestFault::BufferOutsideMemory { queue: 0, address: outside, length_bytes: 1 },
        ),
    ];
    for (descriptors, fault) in faults {
        let mut driver = up(FEATURES);
        for (index, descriptor) in (0..).zip(descriptors) {
            driver.set_descriptor(QUEUE, index, *descriptor);
        }
        driver.make_available(QUEUE, 0);
        driver.notify(QUEUE);
        assert_eq!(driver.board.guest_faults().first, Some(fault));
        assert_ne!(driver.read(0x70) & STATUS_NEEDS_RESET, 0);
        assert_eq!(requests(&mut driver), []);
    }
}

fn short() -> GuestFault {
    GuestFault::DiskRequestTooShort { head: 0 }
}

#[test]
fn the_interrupt_reaches_the_processor() {
    let mut driver = up(FEATURES);
    init_pic(&mut driver.board);
    for (port, value) in [(0x21, !(1 << 2)), (0xa1, !(1 << 3))] {
        driver.board.pio_write(port, &[value]);
    }
    for id in 1..3 {
        assert_eq!(driver.board.acknowledge_interrupt(), None);
        ask(&mut driver, 0, FLUSH, 0, &[], 0);
        complete(&mut driver, id, done(&[]));
        assert_eq!(driver.board.acknowledge_interrupt(), Some(0x3b), "IRQ 11");
        driver.write(0x64, 1);
        driver.board.pio_write(0xa0, &[0x20]);
        driver.board.pio_write(0x20, &[0x20]);
    }
}

#[test]
fn requests_in_flight_survive_saving() {
    let mut driver = up(FEATURES);
    ask(&mut driver, 0, IN, 0, &[], 512);
    ask(&mut driver, 1, OUT, 0, &[1; 512], 0);
    let saved = postcard::to_allocvec(&driver.board.save()).unwrap();
    let state: BoardState = postcard::from_bytes(&saved).unwrap();
    driver.board = Board::restore(state).unwrap();
    complete(&mut driver, 2, done(&[]));
    complete(&mut driver, 1, done(&[6; 512]));
    assert_eq!(driver.take_used(QUEUE), [(3, 1), (0, 513)]);
    assert_eq!(driver.bytes(data_at(0), 512), [6; 512]);
    let counters = driver.board.disk_counters();
    assert_eq!((counters.reads, counters.writes, counters.written_bytes), (1, 1, 512));
}

/// Carries out a request on a model of the disk.
fn carry_out(disk: &mut [u8], op: &DiskOp) -> DiskOutcome {
    let at = |sector: u64| sector as usize * 512;
    match op {
        DiskOp::Read { sector, length_bytes } => {
            return done(&disk[at(*sector)..][..*length_bytes as usize]);
        }
        DiskOp::Write { sector, data } => {
            disk[at(*sector)..][..data.len()].copy_from_slice(data);
        }
        DiskOp::Flush => {}
        DiskOp::Zero { ranges } => {
            for ZeroRange { sector, sector_count, .. } in ranges {
                disk[at(*sector)..][..at((*sector_count).into())].fill(0);
            }
        }
    }
    done(&[])
}

#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, tag: u8, sectors: u64 },
    Read { sector: u64, sectors: u64 },
    Discard { sector: u64, sectors: u64 },
    Flush,
    Answer { which: usize },
    Restore,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..64u64, 1..3u64);
    prop_oneof![
        3 => (place(), any::<u8>())
            .prop_map(|((sector, sectors), tag)| Step::Write { sector, tag, sectors }),
        3 => place().prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        1 => place().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => Just(Step::Flush),
        6 => any::<usize>().prop_map(|which| Step::Answer { which }),
        1 => Just(Step::Restore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Requests are carried out in order and answered in any order; what the guest reads is what it
    /// wrote.
    #[test]
    fn a_guest_reads_what_it_wrote(steps in prop::collection::vec(step(), 1..200)) {
        let mut driver = up(FEATURES | EVENT_IDX);
        let mut model = vec![0u8; DISK_BYTES as usize];
        let mut disk = model.clone();
        let mut free: Vec<u16> = (0..80).collect();
        // The slot of a request, and what its read must bring.
        let mut asked: Vec<(u16, Option<Vec<u8>>)> = Vec::new();
        let mut answers: Vec<(u64, DiskOutcome)> = Vec::new();
        for step in steps {
            let span = |sector: u64, sectors: u64| {
                let end = (sector + sectors) * 512;
                (end <= DISK_BYTES).then_some(sector as usize * 512..end as usize)
            };
            let slot = free.last().copied();
            let expected = match (step, slot) {
                (Step::Write { sector, tag, sectors }, Some(slot)) => {
                    let given = vec![tag; sectors as usize * 512];
                    put(&mut driver, slot, OUT, sector, &given, 0);
                    let span = span(sector, sectors);
                    span.map(|span| { model[span].fill(tag); None })
                }
                (Step::Read { sector, sectors }, Some(slot)) => {
                    put(&mut driver, slot, IN, sector, &[], sectors as u32 * 512);
                    span(sector, sectors).map(|span| Some(model[span].to_vec()))
                }
                (Step::Discard { sector, sectors }, Some(slot)) => {
                    let range =
                        [&sector.to_le_bytes()[..], &(sectors as u32).to_le_bytes(), &[0; 4]];
                    put(&mut driver, slot, DISCARD, 0, &range.concat(), 0);
                    span(sector, sectors).map(|span| { model[span].fill(0); None })
                }
                (Step::Flush, Some(slot)) => {
                    put(&mut driver, slot, FLUSH, 0, &[], 0);
                    Some(None)
                }
                (Step::Answer { which }, _) if !answers.is_empty() => {
                    let (id, outcome) = answers.remove(which % answers.len());
                    complete(&mut driver, id, outcome);
                    None
                }
                (Step::Restore, _) => {
                    driver.board = Board::restore(driver.board.save()).unwrap();
                    None
                }
                _ => None,
            };
            driver.notify(QUEUE);
            if let (Some(expected), Some(slot)) = (expected, slot) {
                free.pop();
                asked.push((slot, expected));
            }
            for DiskRequest { id, op } in requests(&mut driver) {
                answers.push((id, carry_out(&mut disk, &op)));
            }
            for (head, _) in driver.take_used(QUEUE) {
                let slot = head as u16 / 3;
                let Some(place) = asked.iter().position(|(asked, _)| *asked == slot) else {
                    prop_assert_eq!(status(&driver, slot), 1, "beyond the disk");
                    continue;
                };
                let (_, expected) = asked.remove(place);
                prop_assert_eq!(status(&driver, slot), 0);
                if let Some(expected) = expected {
                    prop_assert_eq!(driver.bytes(data_at(slot), expected.len()), expected);
                }
                free.push(slot);
            }
        }
        prop_assert_eq!(driver.board.guest_faults().count, 0);
        prop_assert_eq!(disk, model);
    }

    /// Any descriptors at all: nothing panics, requests stay on the disk and bounded, the state
    /// stays possible.
    #[test]
    fn hostile_descriptors_stay_bounded(
        descriptors in prop::collection::vec((0..0x6000u64, 0..0x1000u32, 0..4u16, 0..12u16), 12),
        headers in prop::collection::vec((0..16u32, 0..70u64), 8),
        heads in prop::collection::vec(0..13u16, 1..40),
        answered in prop::collection::vec((1..20u64, 0..0x2000usize), 0..20),
    ) {
        let mut driver = up(FEATURES | EVENT_IDX);
        for (index, descriptor) in (0..).zip(descriptors) {
            driver.set_descriptor(QUEUE, index, descriptor);
        }
        for (index, (kind, sector)) in headers.into_iter().enumerate() {
            driver.poke(index as u64 * 0x800, kind);
            driver.poke(index as u64 * 0x800 + 8, sector);
        }
        heads.into_iter().for_each(|head| driver.make_available(QUEUE, head));
        driver.notify(QUEUE);
        for (id, length) in answered {
            complete(&mut driver, id, done(&vec![0x5a; length]));
        }
        for DiskRequest { op, .. } in requests(&mut driver) {
            carry_out(&mut vec![0; DISK_BYTES as usize], &op);
        }
        prop_assert_eq!(&Board::restore(driver.board.save()).unwrap().save(), &driver.board.save());
    }
}
