//! One counter against the 8254 data sheet's mode descriptions and its figures 15 to 20.

use super::*;

/// A counter programmed at tick 0 with `mode`, low-then-high access, and `count`.
fn counting(mode: u8, count: u16, gate: bool) -> Counter {
    let mut counter = Counter::new(gate);
    counter.program(0x30 | mode << 1);
    write(&mut counter, count, 0);
    counter
}

fn write(counter: &mut Counter, count: u16, tick: u64) {
    let [low, high] = count.to_le_bytes();
    counter.write(low, tick);
    counter.write(high, tick);
}

fn read(counter: &mut Counter, tick: u64) -> u16 {
    u16::from_le_bytes([counter.read(tick), counter.read(tick)])
}

/// OUT as the figures draw it, one character a tick from tick 1, the clock that loads the count.
fn waveform(counter: &Counter, ticks: u64) -> String {
    (1..=ticks).map(|tick| if counter.out(tick) { '#' } else { '_' }).collect()
}

#[test]
fn out_follows_the_figures() {
    for (mode, count, expected) in [
        (0, 4, "____########"),
        (2, 3, "##_##_##_##_"),
        (6, 3, "##_##_##_##_"),
        (3, 4, "##__##__##__"),
        (7, 5, "###__###__##"),
        (4, 3, "###_########"),
    ] {
        assert_eq!(waveform(&counting(mode, count, true), 12), expected, "mode {mode}");
    }
}

#[test]
fn gate_started_modes_wait_for_their_trigger() {
    for (mode, expected) in [(1, "###___######"), (5, "######_#####")] {
        let mut counter = counting(mode, 3, false);
        let mut seen = String::new();
        for tick in 1..=12 {
            if tick == 4 {
                counter.set_gate(true, 3);
            }
            if tick == 5 {
                counter.set_gate(false, 4);
            }
            seen.push(if counter.out(tick) { '#' } else { '_' });
        }
        assert_eq!(seen, expected, "mode {mode}");
    }
}

#[test]
fn a_trigger_starts_the_one_shot_over() {
    let mut counter = counting(1, 10, false);
    counter.set_gate(true, 0);
    counter.set_gate(false, 3);
    counter.set_gate(true, 6);
    assert!(!counter.out(16), "the second pulse began at tick 7");
    assert!(counter.out(17));
}

#[test]
fn values_count_down() {
    for (mode, count, values) in [
        (0, 3, [3, 2, 1, 0, 0xffff, 0xfffe]),
        (2, 3, [3, 2, 1, 3, 2, 1]),
        (3, 4, [4, 2, 4, 2, 4, 2]),
        (3, 5, [4, 2, 0, 4, 2, 4]),
        (4, 2, [2, 1, 0, 0xffff, 0xfffe, 0xfffd]),
    ] {
        let mut counter = counting(mode, count, true);
        let seen: Vec<u16> = (1..=6).map(|tick| read(&mut counter, tick)).collect();
        assert_eq!(seen, values, "mode {mode}");
    }
}

#[test]
fn count_zero_is_65536() {
    for mode in [0, 2] {
        let mut counter = counting(mode, 0, true);
        assert_eq!(counter.next_rising_edge(0), Some(65_537));
        assert_eq!(read(&mut counter, 1), 0);
        assert_eq!(read(&mut counter, 2), 0xffff);
    }
}

#[test]
fn rising_edges_are_where_out_rises() {
    for mode in 0..8 {
        for count in 2..9 {
            let counter = counting(mode, count, true);
            let rises = |tick: &u64| !counter.out(tick - 1) && counter.out(*tick);
            for tick in 0..60 {
                let next = (tick + 1..=tick + 20).find(rises);
                assert_eq!(counter.next_rising_edge(tick), next, "mode {mode}, {count}, {tick}");
                for end in tick..tick + 20 {
                    let expected = (tick + 1..=end).filter(rises).count() as u64;
                    assert_eq!(counter.rising_edges(tick, end), expected, "mode {mode}, {count}");
                }
            }
        }
    }
}

#[test]
fn a_new_count_waits_for_the_end_of_the_period() {
    for mode in [2, 3] {
        let mut counter = counting(mode, 10, true);
        assert_eq!(counter.advance(0, 4), 0);
        write(&mut counter, 4, 4);
        assert_eq!(counter.next_rising_edge(4), Some(11));
        // Edges at 11, then every 4: 15, 19, 23.
        assert_eq!(counter.advance(4, 10), 0);
        assert_eq!(counter.advance(10, 23), 4, "mode {mode}");
        assert_eq!(counter.next_rising_edge(23), Some(27));
    }
    let mut strobe = counting(4, 10, true);
    write(&mut strobe, 4, 4);
    assert_eq!(strobe.next_rising_edge(4), Some(10), "mode 4 starts over at once");
}

#[test]
fn mode_0_stops_at_the_first_byte() {
    let mut counter = counting(0, 10, true);
    assert!(counter.out(20));
    counter.write(5, 20);
    assert!(!counter.out(20));
    assert_eq!(counter.next_rising_edge(20), None);
    counter.write(0, 30);
    assert_eq!(counter.next_rising_edge(30), Some(36));
}

#[test]
fn gate_suspends_counting() {
    for mode in [0, 4] {
        let mut counter = counting(mode, 10, true);
        counter.set_gate(false, 5);
        assert_eq!(read(&mut counter, 5), 6);
        assert_eq!(read(&mut counter, 50), 6);
        assert_eq!(counter.next_rising_edge(50), None);
        counter.set_gate(true, 50);
        assert_eq!(read(&mut counter, 52), 4, "mode {mode}");
        counter.set_gate(false, 52);
        counter.set_gate(true, 52);
        assert_eq!(read(&mut counter, 53), 3);
    }
    for mode in [2, 3] {
        let mut counter = counting(mode, 10, true);
        assert!(!counter.out(10));
        counter.set_gate(false, 10);
        assert!(counter.out(10), "OUT goes high at once");
        counter.set_gate(true, 50);
        assert_eq!(read(&mut counter, 51), 10, "mode {mode} starts over");
    }
}

#[test]
fn gate_low_from_the_start_holds_a_count_back() {
    let mut counter = counting(0, 10, false);
    assert_eq!(counter.next_rising_edge(100), None);
    counter.set_gate(true, 100);
    assert_eq!(counter.next_rising_edge(100), Some(111));
}

#[test]
fn access_modes() {
    for (control, written, count) in
        [(0x10, &[7u8][..], 7), (0x20, &[7], 0x700), (0x30, &[7, 9], 0x907)]
    {
        let mut counter = Counter::new(true);
        counter.program(control);
        written.iter().for_each(|byte| {
            counter.write(*byte, 0);
        });
        counter.latch_count(1);
        let read_back: Vec<u8> = written.iter().map(|_| counter.read(5)).collect();
        assert_eq!(read_back, written);
        assert_eq!(counter.next_rising_edge(0), Some(1 + count));
    }
}

#[test]
fn a_latched_count_stays_until_it_is_read() {
    let mut counter = counting(0, 0x1234, true);
    counter.latch_count(2);
    counter.latch_count(3);
    assert_eq!(counter.read(9), 0x33);
    assert_eq!(counter.read(10), 0x12);
    assert_eq!(read(&mut counter, 11), 0x1234 - 10, "then the running count again");
    counter.latch_count(12);
    counter.program(0x34);
    write(&mut counter, 500, 12);
    assert_eq!(read(&mut counter, 13), 500, "a control word forgets it");
}

#[test]
fn status_byte() {
    let mut counter = Counter::new(true);
    counter.program(0x3f);
    counter.latch_status(0);
    assert_eq!(counter.read(0), 0b1111_1111, "OUT, null count, both bytes, mode 7, BCD");
    counter.program(0x10);
    counter.latch_status(0);
    assert_eq!(counter.read(0), 0b0101_0000);
    counter.write(3, 0);
    counter.latch_status(0);
    counter.latch_status(3);
    assert_eq!(counter.read(4), 0b0101_0000, "not loaded yet, and latched once");
    counter.latch_status(1);
    assert_eq!(counter.read(4), 0b0001_0000);
    counter.latch_count(4);
    counter.latch_status(4);
    assert_eq!(counter.read(9), 0b1001_0000, "status comes before the count");
    assert_eq!(counter.read(9), 0);
    let mut counter = counting(2, 10, true);
    write(&mut counter, 20, 5);
    counter.latch_status(6);
    assert_eq!(counter.read(6) & 0x40, 0x40, "the new count has not been taken");
    counter.advance(5, 11);
    counter.latch_status(11);
    assert_eq!(counter.read(11) & 0x40, 0);
}

#[test]
fn saved_state_round_trips_and_is_checked() {
    let mut counter = counting(2, 10, true);
    counter.latch_count(4);
    counter.latch_status(4);
    counter.read(4);
    counter.latch_status(4);
    counter.read(4);
    counter.read(4);
    write(&mut counter, 20, 5);
    counter.write(7, 5);
    counter.latch_count(5);
    counter.latch_status(5);
    let state = counter.save();
    assert_eq!(Counter::restore(state.clone(), 5, true).unwrap().save(), state);
    let refused = |change: fn(&mut PitCounterState), field| {
        let mut bad = state.clone();
        change(&mut bad);
        assert_eq!(Counter::restore(bad, 5, true).unwrap_err().field, field);
    };
    let mut stopped = counting(0, 10, true);
    stopped.set_gate(false, 5);
    let stopped = stopped.save();
    assert_eq!(Counter::restore(stopped.clone(), 5, false).unwrap().save(), stopped);
    assert!(Counter::restore(stopped, 5, true).is_err());
    refused(|state| state.mode_bits = 8, "pit.counter.mode_bits");
    refused(|state| state.count = Some(0), "pit.counter.count");
    refused(|state| state.count = Some(0x1_0001), "pit.counter.count");
    refused(|state| state.run = Some(Run { at_tick: 0, count: 0 }), "pit.counter.run.count");
    refused(|state| state.run = Some(Run { at_tick: 7, count: 9 }), "pit.counter.run.at_tick");
    refused(|state| state.successor = Some(Run { at_tick: 12, count: 9 }), SUCCESSOR);
    refused(|state| state.mode_bits = 4, SUCCESSOR);
    refused(|state| state.stopped_at_elapsed = Some(1), SUCCESSOR);
}

const SUCCESSOR: &str = "pit.counter.successor.at_tick";
