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
    // mc146818_set_time(): SET, the fields, SET off. 29 February only exists once the year is right.
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
