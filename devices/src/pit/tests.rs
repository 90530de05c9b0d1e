//! The timer as a whole: the clock's arithmetic, owed ticks, port 0x61 and the read-back command.

use proptest::prelude::*;

use super::*;

fn program(pit: &mut Pit, counter: u8, mode: u8, count: u16) {
    pit.write_control(counter << 6 | 0x30 | mode << 1);
    pit.write_counter(usize::from(counter), count as u8);
    pit.write_counter(usize::from(counter), (count >> 8) as u8);
}

fn take_all(pit: &mut Pit) -> u32 {
    let mut taken = 0;
    while pit.take_owed_tick() {
        taken += 1;
    }
    taken
}

proptest! {
    #[test]
    fn ticks_are_exact(now_ns: u64) {
        let exact = u128::from(now_ns) * u128::from(PIT_HZ) / u128::from(NS_PER_S);
        prop_assert_eq!(u128::from(ticks_at(now_ns)), exact);
    }

    #[test]
    fn a_tick_begins_at_its_first_nanosecond(tick in 1..=ticks_at(u64::MAX)) {
        let at_ns = ns_of_tick(tick).unwrap();
        prop_assert_eq!(ticks_at(at_ns), tick);
        prop_assert_eq!(ticks_at(at_ns - 1), tick - 1);
    }

    #[test]
    fn how_time_is_cut_does_not_matter(
        count in 2..5000u16,
        mut cuts in prop::collection::vec(0..50_000_000u64, 0..20),
    ) {
        let mut whole = Pit::new();
        program(&mut whole, 0, 2, count);
        let mut cut = Pit::new();
        program(&mut cut, 0, 2, count);
        cuts.sort_unstable();
        cuts.iter().for_each(|now_ns| cut.advance(*now_ns));
        whole.advance(50_000_000);
        cut.advance(50_000_000);
        prop_assert_eq!(cut.save(), whole.save());
    }
}

#[test]
fn the_end_of_time_is_no_deadline() {
    assert_eq!(ns_of_tick(ticks_at(u64::MAX) + 1), None);
    let mut pit = Pit::new();
    pit.advance(u64::MAX);
    program(&mut pit, 0, 2, 5000);
    assert_eq!(pit.next_edge_ns(), None);
}

#[test]
fn owed_ticks_are_kept_up_to_the_cap() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1193);
    pit.advance(ns_of_tick(1 + 1193 * 100).unwrap());
    assert_eq!((take_all(&mut pit), pit.lost_ticks()), (100, 0));
    pit.advance(ns_of_tick(1 + 1193 * (100 + u64::from(OWED_TICKS_MAX) + 7)).unwrap());
    assert_eq!((take_all(&mut pit), pit.lost_ticks()), (OWED_TICKS_MAX, 7));
    pit.advance(ns_of_tick(1 + 1193 * 20_000).unwrap());
    program(&mut pit, 0, 2, 1193);
    assert!(!pit.owes_tick(), "a new program forgets what the old one owed");
}

#[test]
fn raising_out0_by_programming_is_a_tick() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 0, 1000);
    assert!(!pit.owes_tick());
    pit.write_control(0x34);
    assert!(pit.owes_tick());
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1000);
    pit.write_control(0x34);
    program(&mut pit, 1, 0, 1000);
    pit.write_control(0x74);
    assert!(!pit.owes_tick());
}

#[test]
fn one_shot_of_linux_fires_once() {
    // pit_next_event(): mode 4, low then high.
    let mut pit = Pit::new();
    program(&mut pit, 0, 4, 1000);
    assert_eq!(pit.next_edge_ns(), ns_of_tick(1002));
    pit.advance(NS_PER_S);
    assert_eq!(take_all(&mut pit), 1);
    assert_eq!(pit.next_edge_ns(), None);
}

#[test]
fn port_b_gates_counter_2_and_shows_its_out() {
    let mut pit = Pit::new();
    pit.write_port_b(0xff);
    assert_eq!(pit.read_port_b(), 0x2f, "counter 2 is not programmed: OUT high");
    // pit_calibrate_tsc(): gate off, mode 0, gate on, wait for OUT.
    pit.write_port_b(0x00);
    program(&mut pit, 2, 0, 1000);
    pit.advance(ns_of_tick(5000).unwrap());
    assert_eq!(pit.read_port_b() & 0x20, 0);
    pit.write_port_b(0x01);
    pit.advance(ns_of_tick(6000).unwrap());
    assert_eq!(pit.read_port_b() & 0x21, 0x01);
    pit.advance(ns_of_tick(6001).unwrap());
    assert_eq!(pit.read_port_b() & 0x21, 0x21);
}

#[test]
fn refresh_bit_toggles() {
    let mut pit = Pit::new();
    let mut toggles = 0;
    for micros in 1..=1000 {
        let before = pit.read_port_b() & 0x10;
        pit.advance(micros * 1000);
        toggles += u32::from(pit.read_port_b() & 0x10 != before);
    }
    assert_eq!(toggles, 66);
}

#[test]
fn read_back_latches_what_it_selects() {
    for (command, selected) in [(0xc2, [true, false, false]), (0xce, [true, true, true])] {
        let mut pit = Pit::new();
        (0..3).for_each(|counter| program(&mut pit, counter, 2, 1000));
        pit.write_port_b(1);
        pit.advance(ns_of_tick(11).unwrap());
        pit.write_control(command);
        pit.advance(ns_of_tick(501).unwrap());
        for (counter, is_latched) in selected.into_iter().enumerate() {
            let first = pit.read_counter(counter);
            if !is_latched {
                assert_eq!(u16::from_le_bytes([first, pit.read_counter(counter)]), 500);
                continue;
            }
            assert_eq!(first, 0b1011_0100, "status");
            let count = [pit.read_counter(counter), pit.read_counter(counter)];
            assert_eq!(u16::from_le_bytes(count), 990);
        }
    }
}

#[test]
fn read_back_bits_choose_status_or_count() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1000);
    pit.advance(ns_of_tick(11).unwrap());
    pit.write_control(0xe2); // status only
    assert_eq!(pit.read_counter(0), 0b1011_0100);
    pit.write_control(0xd2); // count only
    pit.advance(ns_of_tick(500).unwrap());
    assert_eq!(u16::from_le_bytes([pit.read_counter(0), pit.read_counter(0)]), 990);
}

#[test]
fn saved_state_round_trips_and_is_checked() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1193);
    program(&mut pit, 1, 3, 18);
    pit.write_port_b(0x03);
    program(&mut pit, 2, 3, 1331);
    pit.advance(20 * NS_PER_S);
    let state = pit.save();
    assert!(state.owed_ticks > 0 && state.lost_ticks > 0);
    let mut restored = Pit::try_from(state.clone()).unwrap();
    assert_eq!(restored.save(), state);
    restored.advance(21 * NS_PER_S);
    pit.advance(21 * NS_PER_S);
    assert_eq!(restored.save(), pit.save());

    let mut bad = state.clone();
    bad.port_b = 0x10;
    assert_eq!(Pit::try_from(bad).unwrap_err().field, "pit.port_b");
    let mut bad = state;
    bad.owed_ticks = OWED_TICKS_MAX + 1;
    assert_eq!(Pit::try_from(bad).unwrap_err().field, "pit.owed_ticks");
}
