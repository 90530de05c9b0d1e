//! The clock against the MC146818 data sheet and Linux's `mc146818-lib.c`.

use super::*;

/// 2023-11-14 22:13:20 UTC, a Tuesday.
const EPOCH_S: u64 = 1_700_000_000;

fn get(rtc: &mut Rtc, index: u8) -> u8 {
    rtc.write_index(index);
    rtc.read_data()
}

fn set(rtc: &mut Rtc, index: u8, value: u8) {
    rtc.write_index(index);
    rtc.write_data(value);
}

/// Century, year, month, day, hour, minute, second, day of week.
fn registers(rtc: &mut Rtc) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, DAY_OF_WEEK].map(|index| get(rtc, index))
}

#[test]
fn time_in_every_format() {
    for (mode, expected) in [
        (REG_B_24_HOUR, [0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20, 3]),
        (0, [0x20, 0x23, 0x11, 0x14, 0x90, 0x13, 0x20, 3]),
        (REG_B_24_HOUR | REG_B_BINARY, [20, 23, 11, 14, 22, 13, 20, 3]),
        (REG_B_BINARY, [20, 23, 11, 14, 0x80 | 10, 13, 20, 3]),
    ] {
        let mut rtc = Rtc::new(EPOCH_S);
        set(&mut rtc, REG_B, mode);
        assert_eq!(registers(&mut rtc), expected, "mode {mode:#x}");
    }
}

#[test]
fn twelve_hour_clock() {
    for (hour, shown) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
        let mut rtc = Rtc::new(hour * 3600);
        set(&mut rtc, REG_B, 0);
        assert_eq!(get(&mut rtc, HOURS), shown);
        set(&mut rtc, HOURS, 0x07);
        set(&mut rtc, HOURS, shown);
        set(&mut rtc, REG_B, REG_B_24_HOUR | REG_B_BINARY);
        assert_eq!(u64::from(get(&mut rtc, HOURS)), hour);
    }
}

#[test]
fn time_passes_with_guest_time_only() {
    let mut rtc = Rtc::new(EPOCH_S);
    rtc.advance(NS_PER_S - 1);
    assert_eq!(get(&mut rtc, SECONDS), 0x20);
    rtc.advance(NS_PER_S);
    assert_eq!(get(&mut rtc, SECONDS), 0x21);
    rtc.advance(6_401 * NS_PER_S);
    assert_eq!(registers(&mut rtc), [0x20, 0x23, 0x11, 0x15, 0x00, 0x00, 0x01, 4]);
}

#[test]
fn setting_the_clock_as_linux_does() {
    // mc146818_set_time(): SET, the fields, SET off. 29 February only exists once the year is
    // right.
    let mut rtc = Rtc::new(EPOCH_S);
    rtc.advance(100 * NS_PER_S);
    set(&mut rtc, REG_B, REG_B_SET | REG_B_24_HOUR);
    for (index, value) in
        [(DAY, 0x29), (MONTH, 0x02), (YEAR, 0x24), (CENTURY, 0x20), (HOURS, 0x23), (MINUTES, 0x59)]
    {
        set(&mut rtc, index, value);
    }
    set(&mut rtc, SECONDS, 0x58);
    rtc.advance(200 * NS_PER_S);
    assert_eq!(get(&mut rtc, SECONDS), 0x58, "SET holds the clock");
    set(&mut rtc, REG_B, REG_B_24_HOUR);
    rtc.advance(203 * NS_PER_S);
    assert_eq!(registers(&mut rtc), [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x01, 6]);
}

#[test]
fn one_field_can_be_set_while_the_clock_runs() {
    let mut rtc = Rtc::new(EPOCH_S);
    set(&mut rtc, MINUTES, 0x45);
    rtc.advance(NS_PER_S);
    assert_eq!(registers(&mut rtc), [0x20, 0x23, 0x11, 0x14, 0x22, 0x45, 0x21, 3]);
    set(&mut rtc, MONTH, 0x13);
    set(&mut rtc, DAY, 0x00);
    set(&mut rtc, DAY_OF_WEEK, 0x07);
    assert_eq!(registers(&mut rtc), [0x20, 0x23, 0x11, 0x14, 0x22, 0x45, 0x21, 3]);
}

#[test]
fn control_registers() {
    let mut rtc = Rtc::new(EPOCH_S);
    for (index, reset, written, read) in [
        (REG_A, 0x26, 0xff, 0x7f),
        (REG_B, 0x02, 0x7f, 0x7f),
        (REG_C, 0x00, 0xff, 0x00),
        (REG_D, 0x80, 0x00, 0x80),
        (0x0e, 0x00, 0x5a, 0x5a),
        (0x01, 0x00, 0x33, 0x33),
        (0x7f, 0x00, 0xa5, 0xa5),
    ] {
        assert_eq!(get(&mut rtc, index), reset, "register {index:#x}");
        set(&mut rtc, index, written);
        assert_eq!(get(&mut rtc, index), read, "register {index:#x}");
    }
    assert_eq!(get(&mut rtc, 0x80 | 0x0e), 0x5a, "bit 7 is the NMI mask");
}

#[test]
fn no_byte_written_anywhere_can_upset_it() {
    let mut rtc = Rtc::new(UNIX_S_MAX + 1);
    for now_ns in [0, u64::MAX] {
        rtc.advance(now_ns);
        for mode in [0, 0x80, 0x04, 0x84, 0x02, 0x82, 0x06, 0x86] {
            for value in 0..=u8::MAX {
                set(&mut rtc, REG_B, mode);
                for index in [SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY] {
                    set(&mut rtc, index, value);
                    registers(&mut rtc);
                }
                let state = rtc.save();
                assert_eq!(Rtc::try_from(state.clone()).unwrap().save(), state);
            }
        }
    }
}

#[test]
fn saved_state_is_checked() {
    let mut rtc = Rtc::new(EPOCH_S);
    rtc.advance(77 * NS_PER_S);
    set(&mut rtc, MINUTES, 0x45);
    set(&mut rtc, 0x40, 0x99);
    set(&mut rtc, REG_B, REG_B_SET);
    let state = rtc.save();
    let refused = |change: fn(&mut RtcState), field| {
        let mut bad = state.clone();
        change(&mut bad);
        assert_eq!(Rtc::try_from(bad).unwrap_err().field, field);
    };
    assert_eq!(Rtc::try_from(state.clone()).unwrap().save(), state);
    refused(|state| state.ram.push(0), "rtc.ram");
    refused(|state| state.index = 0x80, "rtc.index");
    refused(|state| state.epoch_s = UNIX_S_MAX + 1, "rtc.epoch_s");
    refused(|state| state.offset_s = i64::MIN, "rtc.offset_s");
    refused(|state| state.frozen = None, "rtc.frozen");
}

/// A clock at 22:13:20 with an alarm at these registers, in BCD and 24 hours.
fn with_alarm(hour: u8, minute: u8, second: u8) -> Rtc {
    let mut rtc = Rtc::new(EPOCH_S);
    for (index, value) in [(HOURS_ALARM, hour), (MINUTES_ALARM, minute), (SECONDS_ALARM, second)] {
        set(&mut rtc, index, value);
    }
    set(&mut rtc, REG_B, REG_B_24_HOUR | ALARM);
    rtc
}

#[test]
fn an_alarm_is_due_at_its_time_of_day_whatever_fits_any() {
    for ((hour, minute, second), due_s) in [
        ((0x22, 0x13, 0x25), 5),
        ((0x22, 0x13, 0x20), 24 * 3600),
        ((0x21, 0x13, 0x20), 23 * 3600),
        ((0xff, 0x13, 0x19), 3599),
        ((0xc0, 0xc0, 0x19), 59),
        ((0xff, 0xff, 0xff), 1),
        ((0xff, 0x00, 0xff), 46 * 60 + 40),
    ] {
        let mut rtc = with_alarm(hour, minute, second);
        assert_eq!(rtc.next_event_ns(), Some(due_s * NS_PER_S), "{hour:x}:{minute:x}:{second:x}");
        rtc.advance(due_s * NS_PER_S - 1);
        assert!(!rtc.interrupt_line());
        rtc.advance(due_s * NS_PER_S);
        assert!(rtc.interrupt_line());
        assert_eq!(get(&mut rtc, REG_C), REG_C_IRQ | ALARM | UPDATE);
        assert!(!rtc.interrupt_line(), "a read of C ends it");
        assert_eq!(get(&mut rtc, REG_C), 0);
    }
    assert_eq!(with_alarm(0x99, 0, 0).next_event_ns(), None, "no time fits");
}

#[test]
fn an_alarm_passed_over_in_one_step_rings_and_one_that_is_off_only_shows() {
    let mut rtc = with_alarm(0x22, 0x13, 0x25);
    rtc.advance(100 * NS_PER_S);
    assert!(rtc.interrupt_line());
    let mut rtc = with_alarm(0x22, 0x13, 0x25);
    set(&mut rtc, REG_B, REG_B_24_HOUR);
    assert_eq!(rtc.next_event_ns(), None);
    rtc.advance(100 * NS_PER_S);
    assert!(!rtc.interrupt_line());
    assert_eq!(get(&mut rtc, REG_C), ALARM | UPDATE);
}

#[test]
fn a_reset_keeps_time_and_alarm_and_asks_for_nothing() {
    let mut rtc = with_alarm(0x22, 0x13, 0x25);
    rtc.advance(5 * NS_PER_S);
    rtc.reset();
    assert!(!rtc.interrupt_line() && rtc.next_event_ns().is_none());
    assert_eq!(get(&mut rtc, SECONDS), 0x25);
    assert_eq!(get(&mut rtc, SECONDS_ALARM), 0x25);
}

#[test]
fn a_new_time_of_day_keeps_what_the_guest_set_on_top() {
    let mut rtc = Rtc::new(EPOCH_S);
    rtc.advance(10 * NS_PER_S);
    set(&mut rtc, HOURS, 0x23);
    rtc.set_undisturbed(EPOCH_S + 3 * 24 * 3600);
    assert_eq!(registers(&mut rtc)[3..], [0x17, 0x23, 0x13, 0x20, 6]);
    rtc.set_undisturbed(u64::MAX);
    assert!(Rtc::try_from(rtc.save()).is_ok());
}
