//! What is refused when a board is restored, and what a guest's reset and panic come to; what the
//! board does is in `tests/pc.rs`.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::reset::PowerEvent;

fn board() -> Board {
    Board::new(&BoardConfig { rtc_epoch_s: 1_700_000_000, net: None, disk_bytes: Some(512) })
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
}

#[test]
fn devices_of_another_time_are_refused() {
    let mut at_two_seconds = board();
    at_two_seconds.apply(&memory(), Input::Time { now_ns: 2_000_000_000 });
    let state = at_two_seconds.save();
    assert_eq!(Board::restore(state.clone()).unwrap().save(), state);
    let refused = |state| Board::restore(state).unwrap_err().field;
    assert_eq!(refused(BoardState { now_ns: 2_000_000_001, ..state.clone() }), "pit.now_ns");
    let rtc = board().save().rtc;
    assert_eq!(refused(BoardState { rtc, ..state }), "rtc.now_s");
}

#[test]
fn a_reset_ends_what_asked_for_it_and_is_counted() {
    let mut board = board();
    board.apply(&memory(), Input::Nmi);
    board.pio_write(0xcf9, &[0x06]);
    assert_eq!(board.power_event(), Some(PowerEvent::Reset));
    board.reset();
    assert_eq!((board.power_event(), board.nmi_pending(), board.resets()), (None, false, 1));
}

#[test]
fn a_power_off_goes_before_a_panic() {
    let mut board = board();
    board.pio_write(0x505, &[1]);
    assert_eq!(board.power_event(), Some(PowerEvent::Panic));
    board.pio_write(0x604, &[0x00, 0x34]);
    assert_eq!(board.power_event(), Some(PowerEvent::PowerOff));
}

#[test]
fn a_card_that_is_absent_counts_nothing_and_has_sent_nothing() {
    let board = board();
    assert!(!board.network_ready() && !board.has_transmitted());
    assert_eq!((board.net_sources(), board.net_counters().rx_frames), (None, 0));
    assert_eq!(board.guest_faults(), crate::GuestFaults::default());
}

#[test]
fn the_next_deadline_is_the_sooner_of_timer_and_clock() {
    let mut board = board();
    assert_eq!(board.next_deadline_ns(), None);
    // The clock's update interrupt, once a second.
    board.pio_write(0x70, &[0x0b]);
    board.pio_write(0x71, &[0x12]);
    assert_eq!(board.next_deadline_ns(), Some(1_000_000_000));
    // The timer, every 1193 ticks: some millisecond.
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        board.pio_write(port, &[value]);
    }
    assert!(board.next_deadline_ns() < Some(1_100_000));
}
