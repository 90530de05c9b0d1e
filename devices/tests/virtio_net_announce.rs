//! The network card and where its guest is: the addresses it sends from, the driver that is asked
//! to announce it (virtio 1.2 §5.1.6.5.4), and the MTU.

mod common;

use common::*;
use ftvmm_devices::{
    Board, GuestFault, Input, NET_SOURCES_MAX, VlanKind, VlanTag, rx_frame_bytes_max,
};

const CONFIG_INTERRUPT: u32 = 2;
const LINK_UP: u32 = 1;
const ANNOUNCE: u32 = 2;
/// Where a command and its answer lie.
const COMMAND: u64 = 0x3a_0000;
const ANSWER: u64 = 0x3a_0010;
const UNANSWERED: u8 = 0xee;

fn up(features: u64) -> Driver {
    let mut driver = Driver::new();
    driver.negotiate(features);
    for queue in [RX, TX, CONTROL] {
        driver.set_up_queue(queue);
    }
    driver.write(0x70, 0x0f);
    driver
}

fn status(driver: &mut Driver) -> u32 {
    driver.read(0x104) >> 16
}

fn ask(driver: &mut Driver) {
    driver.board.apply(&driver.mem, Input::NetAnnounce);
}

/// Sends a command through the control queue; what the device answered.
fn command(driver: &mut Driver, command: &[u8]) -> u8 {
    (COMMAND..).zip(command).for_each(|(address, byte)| driver.poke(address, *byte));
    driver.poke(ANSWER, UNANSWERED);
    driver.set_descriptor(CONTROL, 0, (COMMAND, command.len() as u32, DESC_NEXT, 1));
    driver.set_descriptor(CONTROL, 1, (ANSWER, 1, DESC_WRITE, 0));
    driver.make_available(CONTROL, 0);
    driver.notify(CONTROL);
    driver.peek(ANSWER)
}

#[test]
fn a_driver_that_can_is_asked_until_it_says_that_it_has_announced() {
    let mut driver = up(FEATURES | NEWER_FEATURES | EVENT_IDX);
    assert_eq!(status(&mut driver), LINK_UP);
    let generation = driver.read(0xfc);
    ask(&mut driver);
    assert_eq!(status(&mut driver), LINK_UP | ANNOUNCE);
    assert_eq!(driver.read(0x60) & CONFIG_INTERRUPT, CONFIG_INTERRUPT);
    assert_ne!(driver.read(0xfc), generation);
    driver.write(0x64, CONFIG_INTERRUPT);
    ask(&mut driver);
    assert_eq!(driver.read(0x60) & CONFIG_INTERRUPT, CONFIG_INTERRUPT, "asked once more");
    assert_eq!(command(&mut driver, &[3, 0]), 0);
    assert_eq!(status(&mut driver), LINK_UP);
    assert_eq!(driver.take_used(CONTROL), [(0, 1)]);
    assert_eq!(driver.board.net_counters().announcements, 1);
    assert_eq!(driver.board.guest_faults().count, 0);
}

#[test]
fn a_driver_that_cannot_is_left_alone() {
    let mut no_driver = Driver::new();
    let mut without = up(FEATURES | 1 << 16 | 1 << 17);
    let mut not_ready = Driver::new();
    not_ready.negotiate(FEATURES | NEWER_FEATURES);
    let mut without_queue = Driver::up(FEATURES | NEWER_FEATURES);
    for driver in [&mut no_driver, &mut without, &mut not_ready, &mut without_queue] {
        ask(driver);
        assert_eq!((status(driver), driver.read(0x60)), (LINK_UP, 0));
    }
    assert_eq!(command(&mut without, &[3, 0]), 1, "what was not agreed on is refused");
    assert_eq!(without.board.net_counters().announcements, 0);
}

#[test]
fn a_reset_takes_the_wish_back() {
    let mut driver = up(FEATURES | NEWER_FEATURES);
    ask(&mut driver);
    driver.write(0x70, 0);
    assert_eq!((status(&mut driver), driver.read(0x60)), (LINK_UP, 0));
}

#[test]
fn commands_that_are_not_offered_are_refused() {
    let mut driver = up(FEATURES | NEWER_FEATURES);
    ask(&mut driver);
    for refused in [&[3, 1][..], &[0, 0, 1], &[1, 1, 2, 0, 0, 0, 0, 9], &[2, 0, 5, 0], &[3], &[]] {
        assert_eq!(command(&mut driver, refused), 1, "{refused:?}");
    }
    assert_eq!(status(&mut driver), LINK_UP | ANNOUNCE);
    assert_eq!(driver.board.guest_faults().count, 0);
}

#[test]
fn a_command_without_room_for_its_answer_stops_the_card() {
    let mut driver = up(FEATURES | NEWER_FEATURES);
    driver.set_descriptor(CONTROL, 0, (COMMAND, 2, 0, 0));
    driver.make_available(CONTROL, 0);
    driver.notify(CONTROL);
    assert_eq!(driver.read(0x70) & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET);
    assert_eq!(
        driver.board.guest_faults().last,
        Some(GuestFault::EmptyBuffer { queue: 2, head: 0 })
    );
}

fn from(mac: [u8; 6], after: &[u8]) -> Vec<u8> {
    let mut frame = [&[0; 12][..], &[0xff; 6], &mac, after].concat();
    frame.resize(12 + 60, 0);
    frame
}

#[test]
fn what_the_guest_sends_from_is_remembered_and_saved() {
    let mut driver = up(FEATURES);
    assert_eq!(driver.board.net_sources().unwrap().iter().count(), 0);
    let other = [6, 0, 0, 0, 0, 1];
    driver.send(&from(MAC, &[8, 0]));
    driver.send(&from(other, &[0x81, 0, 0x20, 5, 8, 0]));
    driver.send(&from([3, 0, 0, 0, 0, 1], &[8, 0]));
    let mut malformed = from([8, 0, 0, 0, 0, 1], &[8, 0]);
    malformed[1] = 4;
    driver.send(&malformed);
    let found: Vec<_> = driver.board.net_sources().unwrap().iter().copied().collect();
    let tag = VlanTag { kind: VlanKind::Customer, id: 5 };
    assert_eq!(
        found.iter().map(|s| (s.mac, s.tags)).collect::<Vec<_>>(),
        [(other, [Some(tag), None]), (MAC, [None, None]),]
    );
    assert_eq!(driver.board.net_counters().tx_malformed, 1);
    for n in 0..2 * NET_SOURCES_MAX {
        driver.send(&from([2, 0, 0, 1, (n >> 8) as u8, n as u8], &[8, 0]));
        driver.take_used(TX);
    }
    let restored = Board::restore(driver.board.save()).unwrap();
    assert_eq!(restored.net_sources(), driver.board.net_sources());
    assert_eq!(restored.net_sources().unwrap().iter().count(), NET_SOURCES_MAX);
}

#[test]
fn only_a_driver_that_knows_the_mtu_gets_frames_of_it() {
    let jumbo = rx_frame_bytes_max(MTU) - 12;
    for (features, delivered) in [(FEATURES, 0), (FEATURES | 1 << 3, 1)] {
        let mut driver = Driver::up(features);
        // As Linux does for such an MTU: pages in a chain.
        for (index, length) in [(0, 12), (1, 4000), (2, 4096), (3, 4096)] {
            let (address, last) = (0x30_0000 + 0x1000 * u64::from(index), index == 3);
            let flags = if last { DESC_WRITE } else { DESC_WRITE | DESC_NEXT };
            driver.set_descriptor(RX, index, (address, length, flags, index + 1));
        }
        driver.make_available(RX, 0);
        driver.notify(RX);
        driver.arrive(frame(1, jumbo + 1));
        driver.arrive(frame(1, jumbo));
        let counters = driver.board.net_counters();
        assert_eq!((counters.rx_frames, counters.rx_refused), (delivered, 2 - delivered));
        assert_eq!(driver.board.guest_faults().count, 0);
    }
}

/// What is saved after a reset can be restored: the request is the old driver's.
#[test]
fn a_reset_takes_the_request_back() {
    let mut driver = up(FEATURES | NEWER_FEATURES | EVENT_IDX);
    ask(&mut driver);
    assert_eq!(status(&mut driver), LINK_UP | ANNOUNCE);
    driver.board.reset();
    assert_eq!(status(&mut driver), LINK_UP);
    Board::restore(driver.board.save()).unwrap();
}
