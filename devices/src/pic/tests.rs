//! The 8259A pair against its data sheet; section names are the data sheet's.

use super::*;

const FIRST: usize = 0;
const SECOND: usize = 1;
const BASE: u8 = 0x30;

/// Initialised as a PC does, nothing masked; `icw4` for both chips.
fn initialised(icw4: u8) -> Pic {
    let mut pic = Pic::new();
    for (chip, base, wiring) in [(FIRST, BASE, 0x04), (SECOND, BASE + 8, 0x02)] {
        pic.write_command(chip, 0x11);
        pic.write_data(chip, base);
        pic.write_data(chip, wiring);
        pic.write_data(chip, icw4);
    }
    pic
}

fn pic() -> Pic {
    initialised(0x01)
}

fn raise(pic: &mut Pic, irqs: &[u8]) {
    for irq in irqs {
        pic.set_line(*irq, true);
    }
}

/// Every IRQ the processor would be given in turn, without any EOI.
fn acknowledge_all(pic: &mut Pic) -> Vec<u8> {
    let mut irqs = Vec::new();
    while pic.interrupt_pending() {
        irqs.push(pic.acknowledge() - BASE);
        assert!(irqs.len() <= 16);
    }
    irqs
}

fn read_requests(pic: &mut Pic, chip: usize) -> u8 {
    pic.write_command(chip, 0x0a);
    pic.read_command(chip)
}

fn read_in_service(pic: &mut Pic, chip: usize) -> u8 {
    pic.write_command(chip, 0x0b);
    pic.read_command(chip)
}

#[test]
fn masked_until_initialised() {
    let mut pic = Pic::new();
    raise(&mut pic, &[0, 1, 8]);
    assert!(!pic.interrupt_pending());
    assert_eq!((pic.read_data(FIRST), pic.read_data(SECOND)), (0xff, 0xff));
}

#[test]
fn initialization_words_follow_icw1() {
    for (icw1, words, mask) in [
        (0x11u8, &[0x20u8, 0x04, 0x01, 0x5a][..], 0x5a),
        (0x10, &[0x20, 0x04, 0x5a], 0x5a),
        (0x13, &[0x20, 0x01, 0x5a], 0x5a),
        (0x12, &[0x20, 0x5a], 0x5a),
    ] {
        let mut pic = Pic::new();
        pic.write_command(FIRST, icw1);
        for word in words {
            pic.write_data(FIRST, *word);
        }
        assert_eq!(pic.read_data(FIRST), mask, "ICW1 {icw1:#x}");
    }
}

#[test]
fn icw1_clears_mask_service_and_edges() {
    let mut pic = pic();
    raise(&mut pic, &[3]);
    pic.acknowledge();
    raise(&mut pic, &[5]);
    pic.write_data(FIRST, 0xff);
    pic.write_command(FIRST, 0x68); // special mask mode
    pic.write_command(FIRST, 0xc3); // priority to 4
    pic = Pic::try_from(pic.save()).unwrap();
    for (value, data) in [(0x11, false), (BASE, true), (0x04, true), (0x01, true)] {
        if data { pic.write_data(FIRST, value) } else { pic.write_command(FIRST, value) }
    }
    assert_eq!(pic.read_data(FIRST), 0);
    assert_eq!(read_requests(&mut pic, FIRST), 0, "a line that is high must rise again");
    assert_eq!(read_in_service(&mut pic, FIRST), 0);
    assert!(!pic.interrupt_pending());
    pic.set_line(5, false);
    raise(&mut pic, &[5, 0]);
    assert_eq!(pic.acknowledge(), BASE, "input 0 is highest again");
}

#[test]
fn fully_nested_mode_serves_in_priority_order() {
    let mut pic = pic();
    raise(&mut pic, &[7, 3, 12, 1, 9, 0]);
    let mut served = Vec::new();
    while pic.interrupt_pending() {
        let irq = pic.acknowledge() - BASE;
        served.push(irq);
        if irq >= 8 {
            pic.write_command(SECOND, 0x20);
        }
        pic.write_command(FIRST, 0x20);
    }
    assert_eq!(served, [0, 1, 9, 12, 3, 7]);
}

#[test]
fn only_higher_priorities_interrupt_a_service() {
    let mut pic = pic();
    raise(&mut pic, &[4]);
    assert_eq!(pic.acknowledge(), BASE + 4);
    raise(&mut pic, &[5, 4]);
    assert!(!pic.interrupt_pending());
    raise(&mut pic, &[3]);
    assert_eq!(pic.acknowledge(), BASE + 3);
    assert_eq!(read_in_service(&mut pic, FIRST), 0b0001_1000);
    pic.write_command(FIRST, 0x20);
    assert_eq!(read_in_service(&mut pic, FIRST), 0b0001_0000, "EOI ends the most urgent");
    assert!(!pic.interrupt_pending());
    pic.write_command(FIRST, 0x64);
    assert_eq!(pic.acknowledge(), BASE + 5);
}

#[test]
fn requests_are_edges_and_stay_until_acknowledged() {
    let mut pic = pic();
    pic.set_line(5, true);
    pic.set_line(5, false);
    assert_eq!(read_requests(&mut pic, FIRST), 0b10_0000);
    assert_eq!(acknowledge_all(&mut pic), [5]);
    pic.write_command(FIRST, 0x65);
    pic.set_line(5, true);
    assert_eq!(acknowledge_all(&mut pic), [5]);
    pic.write_command(FIRST, 0x65);
    pic.set_line(5, true);
    assert!(!pic.interrupt_pending(), "still high: no edge");
}

#[test]
fn level_triggered_inputs_follow_their_line() {
    let mut pic = pic();
    pic.write_elcr(FIRST, 0xff);
    pic.write_elcr(SECOND, 0xff);
    assert_eq!((pic.read_elcr(FIRST), pic.read_elcr(SECOND)), (0xf8, 0xde));
    pic.set_line(5, true);
    assert_eq!(pic.acknowledge(), BASE + 5);
    pic.write_command(FIRST, 0x65);
    assert!(pic.interrupt_pending(), "the line is still high");
    pic.set_line(5, false);
    assert!(!pic.interrupt_pending());
    pic.pulse(5);
    assert_eq!(acknowledge_all(&mut pic), [5], "a pulse is latched all the same");
}

#[test]
fn masking_holds_a_request_back() {
    let mut pic = pic();
    pic.write_data(FIRST, 0b0001_0000);
    raise(&mut pic, &[4]);
    assert!(!pic.interrupt_pending());
    pic.write_data(FIRST, 0);
    assert_eq!(acknowledge_all(&mut pic), [4]);
}

#[test]
fn cascaded_service_needs_both_eois() {
    let mut pic = pic();
    raise(&mut pic, &[10]);
    assert_eq!(pic.acknowledge(), BASE + 10);
    assert_eq!(read_in_service(&mut pic, FIRST), 0b100);
    assert_eq!(read_in_service(&mut pic, SECOND), 0b100);
    raise(&mut pic, &[11, 3]);
    pic.write_command(FIRST, 0x62);
    assert_eq!(pic.acknowledge(), BASE + 3, "11 is blocked by 10 in the second chip");
    pic.write_command(FIRST, 0x63);
    assert!(!pic.interrupt_pending());
    pic.write_command(SECOND, 0x62);
    assert_eq!(pic.acknowledge(), BASE + 11);
}

#[test]
fn a_second_request_of_the_second_chip_is_a_new_edge() {
    // Auto-EOI: the second chip's INT would stay high over the acknowledge.
    let mut pic = initialised(0x03);
    raise(&mut pic, &[8, 9, 15]);
    assert_eq!(acknowledge_all(&mut pic), [8, 9, 15]);
}

#[test]
fn vanished_requests_are_spurious() {
    let mut pic = pic();
    pic.write_elcr(SECOND, 0x02);
    assert_eq!(pic.acknowledge(), BASE + 7);
    assert_eq!(read_in_service(&mut pic, FIRST), 0, "spurious input 7 is not in service");
    pic.set_line(9, true);
    pic.set_line(9, false);
    assert_eq!(pic.acknowledge(), BASE + 8 + 7);
    assert_eq!(read_in_service(&mut pic, SECOND), 0);
    assert_eq!(read_in_service(&mut pic, FIRST), 0b100, "the first chip has served its input 2");
}

#[test]
fn automatic_eoi_leaves_nothing_in_service() {
    let mut pic = initialised(0x03);
    raise(&mut pic, &[6, 2, 1]);
    assert_eq!(pic.acknowledge(), BASE + 1);
    assert_eq!(read_in_service(&mut pic, FIRST), 0);
}

#[test]
fn rotation() {
    // Inputs 0, 3 and 5 always want to be served; each ends its service with the given command.
    for (name, icw4, before, end, served) in [
        ("none", 1, &[][..], 0x20, [0, 0, 0, 0]),
        ("on non-specific EOI", 1, &[], 0xa0, [0, 3, 5, 0]),
        ("set priority: 3 is lowest", 1, &[0xc3], 0x20, [5, 5, 5, 5]),
        ("on automatic EOI", 3, &[0x80], 0x40, [0, 3, 5, 0]),
        ("on automatic EOI, switched off again", 3, &[0x80, 0x00], 0x40, [0, 0, 0, 0]),
    ] {
        let mut pic = initialised(icw4);
        before.iter().for_each(|command| pic.write_command(FIRST, *command));
        raise(&mut pic, &[0, 3, 5]);
        let seen = served.map(|_| {
            let irq = pic.acknowledge() - BASE;
            pic.write_command(FIRST, end);
            pic.set_line(irq, false);
            pic.set_line(irq, true);
            irq
        });
        assert_eq!(seen, served, "{name}");
    }
}

#[test]
fn specific_rotation_makes_its_level_the_lowest() {
    let mut pic = pic();
    raise(&mut pic, &[5]);
    pic.acknowledge();
    pic.write_command(FIRST, 0xe5);
    assert_eq!(read_in_service(&mut pic, FIRST), 0);
    raise(&mut pic, &[0, 6, 7]);
    assert_eq!(pic.acknowledge(), BASE + 6, "after 5 comes 6");
}

#[test]
fn special_mask_mode_lets_lower_priorities_through() {
    let mut pic = pic();
    raise(&mut pic, &[1]);
    pic.acknowledge();
    raise(&mut pic, &[6]);
    pic.write_data(FIRST, 0b10);
    assert!(!pic.interrupt_pending());
    pic.write_command(FIRST, 0x68);
    assert_eq!(pic.acknowledge(), BASE + 6);
    pic.write_command(FIRST, 0x20);
    assert_eq!(read_in_service(&mut pic, FIRST), 0b10, "non-specific EOI spares masked levels");
    pic.write_command(FIRST, 0x48);
    raise(&mut pic, &[7]);
    assert!(!pic.interrupt_pending());
}

#[test]
fn special_fully_nested_mode_lets_the_second_chip_in_again() {
    for (icw4, pending) in [(0x01, false), (0x11, true)] {
        let mut pic = initialised(icw4);
        raise(&mut pic, &[12]);
        pic.acknowledge();
        raise(&mut pic, &[9]);
        assert_eq!(pic.interrupt_pending(), pending);
    }
}

#[test]
fn poll_command_acknowledges_by_reading() {
    let mut pic = pic();
    raise(&mut pic, &[4, 6]);
    pic.write_command(FIRST, 0x0c);
    assert_eq!(pic.read_command(FIRST), 0x84);
    assert_eq!(read_in_service(&mut pic, FIRST), 0b1_0000);
    pic.write_command(FIRST, 0x0c);
    assert_eq!(pic.read_data(FIRST), 0, "6 is blocked by 4");
    assert_eq!(read_requests(&mut pic, FIRST), 0b100_0000, "one poll, one read");
    raise(&mut pic, &[13]);
    pic.write_command(SECOND, 0x0c);
    assert_eq!(pic.read_command(SECOND), 0x85);
}

#[test]
fn linux_finds_the_chip_by_its_mask() {
    let mut pic = Pic::new();
    pic.write_data(SECOND, 0xff);
    pic.write_data(FIRST, 0xfb);
    assert_eq!(pic.read_data(FIRST), 0xfb);
}

#[test]
fn saved_state_round_trips_and_is_checked() {
    let mut pic = initialised(0x13);
    pic.write_elcr(FIRST, 0x20);
    pic.write_data(FIRST, 0x40);
    pic.write_command(FIRST, 0x80);
    pic.write_command(FIRST, 0x6b);
    pic.write_command(SECOND, 0xc2);
    pic.write_command(SECOND, 0x0f);
    raise(&mut pic, &[1, 5, 9]);
    pic.write_command(SECOND, 0x1b);
    raise(&mut pic, &[14]);
    let state = pic.save();
    assert_eq!(Pic::try_from(state.clone()).unwrap().save(), state);

    let refused = |change: fn(&mut PicState), field| {
        let mut bad = state.clone();
        change(&mut bad);
        assert_eq!(Pic::try_from(bad).unwrap_err().field, field);
    };
    refused(|state| state.chips[0].highest = 8, "pic.highest");
    refused(|state| state.chips[1].vector_base = 0x31, "pic.vector_base");
    refused(|state| state.chips[0].level_triggered = 0x01, "pic.level_triggered");
    refused(|state| state.chips[0].lines ^= 1 << CASCADE_INPUT, "pic.cascade");
}
