//! The PM timer and the sleep and reset registers, as a guest uses them.

use proptest::prelude::*;

use super::*;

const TIMER: usize = (PM_TIMER_PORT - PM1A_EVENT_PORT) as usize;
const CONTROL: usize = (PM1A_CONTROL_PORT - PM1A_EVENT_PORT) as usize;
const NS_PER_HOUR: u64 = 3600 * 1_000_000_000;

fn timer(registers: &AcpiPm, now_ns: u64) -> u32 {
    let mut data = [0; 4];
    registers.read(TIMER, now_ns, &mut data);
    u32::from_le_bytes(data)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 50 },
        ..ProptestConfig::default()
    })]

    /// Linux takes 24 bits of the count, which wrap every 4.7 s, and adds up the differences.
    #[test]
    fn an_hour_of_readings_at_any_instants_follows_guest_time_to_a_microsecond(
        gaps_ns in prop::collection::vec(0..4_600_000_000u64, 1600..2000),
        start_ns in 0..u64::MAX / 2,
    ) {
        const MASK: u32 = (1 << 24) - 1;
        let registers = AcpiPm::new();
        let mut now_ns = start_ns;
        let (mut last, mut counted) = (timer(&registers, now_ns), 0u64);
        for gap_ns in gaps_ns {
            now_ns += gap_ns;
            let count = timer(&registers, now_ns);
            counted += u64::from(count.wrapping_sub(last) & MASK);
            last = count;
            let shown_ns = (u128::from(counted) * NS_PER_S / u128::from(PM_TIMER_HZ)) as u64;
            prop_assert!(shown_ns.abs_diff(now_ns - start_ns) < 1000, "{shown_ns} at {now_ns}");
        }
        prop_assert!(now_ns - start_ns > NS_PER_HOUR / 2, "the readings cover too little");
    }

    #[test]
    fn time_that_goes_on_never_shows_a_smaller_count(start_ns: u32, gap_ns in 0..1000u64) {
        let registers = AcpiPm::new();
        let before = timer(&registers, u64::from(start_ns));
        prop_assert!(timer(&registers, u64::from(start_ns) + gap_ns) >= before);
    }
}

#[test]
fn a_second_is_exactly_the_frequency() {
    assert_eq!(u64::from(timer(&AcpiPm::new(), 1_000_000_000)), PM_TIMER_HZ);
    assert_eq!(u64::from(timer(&AcpiPm::new(), 999_999_999)), PM_TIMER_HZ - 1);
}

#[test]
fn every_width_sees_the_same_registers() {
    let mut registers = AcpiPm::new();
    registers.write(2, &0x0721u16.to_le_bytes());
    let now_ns = 123_456_789_012;
    let mut whole = [0; BLOCK_BYTES];
    registers.read(0, now_ns, &mut whole);
    for width in [1, 2, 4, 8] {
        for offset in 0..=BLOCK_BYTES - width {
            let mut part = vec![0; width];
            registers.read(offset, now_ns, &mut part);
            assert_eq!(part, whole[offset..offset + width]);
        }
    }
    assert_eq!(whole[..8], [0, 0, 0x21, 7, 1, 0, 0xff, 0xff]);
    assert_eq!(AcpiPm::offset(PM_TIMER_PORT, 4), Some(TIMER));
    assert_eq!(AcpiPm::offset(GPE0_PORT + 1, 2), None);
    assert_eq!(AcpiPm::offset(PM1A_EVENT_PORT - 1, 2), None);
}

/// acpi_hw_legacy_sleep(): the type alone, then the type with SLP_EN; 16 bits or two bytes.
#[test]
fn only_sleep_enable_with_the_type_of_s5_switches_off() {
    for by_byte in [false, true] {
        for sleep_type in 0..8 {
            let mut registers = AcpiPm::new();
            let selected = SCI_ENABLED | sleep_type << SLEEP_TYPE_SHIFT;
            registers.write(CONTROL, &selected.to_le_bytes());
            assert_eq!(registers.power_event(), None);
            let [low, high] = (selected | SLEEP_ENABLE).to_le_bytes();
            if by_byte {
                registers.write(CONTROL, &[low]);
                registers.write(CONTROL + 1, &[high]);
            } else {
                registers.write(CONTROL, &[low, high]);
            }
            let wanted = (sleep_type == 5).then_some(PowerEvent::PowerOff);
            assert_eq!(registers.power_event(), wanted);
        }
    }
}

#[test]
fn sleep_enable_reads_as_zero_and_sci_enable_as_one() {
    let mut registers = AcpiPm::new();
    registers.write(CONTROL, &[0, 0xff]);
    let mut control = [0; 2];
    registers.read(CONTROL, 0, &mut control);
    assert_eq!(u16::from_le_bytes(control), SLEEP_TYPE_MASK | SCI_ENABLED);
}

/// acpi_ev_fixed_event_detect(): the bit of both registers, then a one written to the status clears
/// it.
#[test]
fn the_power_button_asks_for_its_interrupt_until_its_status_is_cleared() {
    const STATUS: usize = 0;
    const ENABLE: usize = 2;
    let mut registers = AcpiPm::new();
    assert!(!registers.hears_power_button());
    registers.write(ENABLE, &POWER_BUTTON.to_le_bytes());
    assert!(registers.hears_power_button() && !registers.interrupt_line());
    registers.press_power_button();
    assert!(registers.interrupt_line());
    let mut status = [0; 2];
    registers.read(STATUS, 0, &mut status);
    assert_eq!(u16::from_le_bytes(status), POWER_BUTTON);
    registers.write(STATUS, &(!POWER_BUTTON).to_le_bytes());
    assert!(registers.interrupt_line(), "ones elsewhere clear nothing");
    registers.write(STATUS, &POWER_BUTTON.to_le_bytes());
    assert!(!registers.interrupt_line());
    registers.write(ENABLE, &[0, 0]);
    registers.press_power_button();
    assert!(!registers.interrupt_line(), "nobody listens");
}

#[test]
fn a_new_generation_asks_for_the_interrupt_of_its_event() {
    let gpe = usize::from(GPE0_PORT - PM1A_EVENT_PORT);
    let mut registers = AcpiPm::new();
    registers.announce_generation();
    assert!(!registers.interrupt_line(), "not enabled");
    registers.write(gpe + 1, &[0xff]);
    assert!(registers.interrupt_line());
    let mut both = [0; 2];
    registers.read(gpe, 0, &mut both);
    assert_eq!(both, [1, 1]);
    registers.write(gpe, &[1]);
    assert!(!registers.interrupt_line());
}

#[test]
fn saved_state_is_checked() {
    let state = AcpiPmState {
        status: POWER_BUTTON,
        gpe_status: GPES,
        gpe_enable: GPES,
        enable: ENABLE_WRITABLE,
        control: 0x1c03,
        powered_off: true,
    };
    assert_eq!(AcpiPm::try_from(state.clone()).unwrap().save(), state);
    for (bad, field) in [
        (AcpiPmState { status: 1, ..state.clone() }, "acpi.status"),
        (AcpiPmState { gpe_enable: 2, ..state.clone() }, "acpi.gpe"),
        (AcpiPmState { enable: 2, ..state.clone() }, "acpi.enable"),
        (AcpiPmState { control: 0x2001, ..state.clone() }, "acpi.control"),
        (AcpiPmState { control: 0, ..state }, "acpi.control"),
    ] {
        assert_eq!(AcpiPm::try_from(bad).unwrap_err().field, field);
    }
}
