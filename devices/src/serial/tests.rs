//! What is added to vm-superio's UART: pulses, the backlog, saving. The UART's registers are
//! vm-superio's to test; how Linux drives them is in `tests/pc.rs`.

use super::*;

const DATA: u8 = 0;
const IER: u8 = 1;
const IIR: u8 = 2;
const MCR: u8 = 4;
const IER_RECEIVED: u8 = 0x01;
const IER_EMPTY: u8 = 0x02;
const MCR_LOOP: u8 = 0x10;

#[test]
fn registers_after_reset() {
    let mut console = Console::new();
    for (offset, value) in
        [(0, 0), (1, 0), (2, 0xc1), (3, 0x03), (4, 0x08), (5, 0x60), (6, 0xb0), (7, 0)]
    {
        assert_eq!(console.read(offset), value, "register {offset}");
    }
    assert!(!console.take_pulse());
}

#[test]
fn every_typed_byte_has_its_own_pulse_and_identification() {
    let mut console = Console::new();
    console.write(IER, IER_RECEIVED);
    console.enqueue(b"abc");
    for byte in b"abc" {
        assert!(console.take_pulse());
        assert!(!console.take_pulse());
        assert_eq!(console.read(LSR_OFFSET) & LSR_DATA_READY, LSR_DATA_READY);
        assert_eq!(console.read(IIR), 0xc4);
        assert_eq!(console.read(DATA), *byte);
    }
    assert!(!console.take_pulse());
    assert_eq!(console.read(LSR_OFFSET) & LSR_DATA_READY, 0);
}

#[test]
fn an_enabled_empty_transmitter_interrupts_at_once_and_after_each_byte() {
    let mut console = Console::new();
    console.write(DATA, b'x');
    assert!(!console.take_pulse());
    console.write(IER, IER_EMPTY);
    assert!(console.take_pulse());
    assert_eq!(console.read(IIR), 0xc2);
    assert_eq!(console.read(IIR), 0xc1, "reading clears it");
    console.write(DATA, b'y');
    assert!(console.take_pulse());
    assert_eq!(console.printed(), b"xy");
    console.clear_printed();
    assert_eq!(console.printed(), b"");
}

#[test]
fn typed_bytes_wait_out_loopback() {
    let mut console = Console::new();
    console.write(MCR, MCR_LOOP);
    console.enqueue(b"typed");
    console.write(DATA, b'l');
    assert_eq!(console.read(DATA), b'l');
    assert_eq!(console.read(LSR_OFFSET) & LSR_DATA_READY, 0);
    assert_eq!(console.printed(), b"");
    console.write(MCR, 0);
    let typed = [(); 5].map(|()| console.read(DATA));
    assert_eq!(&typed, b"typed");
}

#[test]
fn backlog_is_bounded_and_drops_are_counted() {
    let mut console = Console::new();
    console.enqueue(&vec![1; BACKLOG_BYTES_MAX]);
    console.enqueue(&[2; 10]);
    // One byte moved on into the UART, which left room for one more.
    assert_eq!(console.dropped_bytes(), 9);
    let bytes: Vec<u8> = (0..=BACKLOG_BYTES_MAX).map(|_| console.read(DATA)).collect();
    assert_eq!((bytes[BACKLOG_BYTES_MAX - 1], bytes[BACKLOG_BYTES_MAX]), (1, 2));
    assert_eq!(console.read(LSR_OFFSET) & LSR_DATA_READY, 0);
}

#[test]
fn saved_state_round_trips_without_a_second_pulse() {
    let mut console = Console::new();
    for (offset, value) in [(3, 0x83), (0, 0x18), (1, 0x01), (3, 0x1b), (1, 0x07), (4, 0x0b)] {
        console.write(offset, value);
    }
    console.write(7, 0x77);
    console.enqueue(&vec![b'z'; BACKLOG_BYTES_MAX]);
    console.enqueue(b"dropped");
    console.take_pulse();
    let state = console.save();
    let mut restored = Console::try_from(state.clone()).unwrap();
    assert_eq!(restored.save(), state);
    assert!(!restored.take_pulse());

    let mut bad = state.clone();
    bad.backlog.push(0);
    assert_eq!(Console::try_from(bad).unwrap_err().field, "serial.backlog");
    let mut bad = state.clone();
    bad.backlog[0] = BREAK + 1;
    assert_eq!(Console::try_from(bad).unwrap_err().field, "serial.backlog");
    let mut bad = state;
    bad.uart.in_buffer = vec![0; 65];
    assert_eq!(Console::try_from(bad).unwrap_err().field, "serial.uart.in_buffer");
}

/// serial8250_handle_irq(): the line status, then the byte.
#[test]
fn a_break_is_a_zero_byte_with_its_bit_in_its_place_among_the_typed() {
    let mut console = Console::new();
    console.write(IER, IER_RECEIVED);
    console.enqueue(b"a");
    console.send_break();
    console.enqueue(b"b");
    let mut received = Vec::new();
    while console.take_pulse() {
        let status = console.read(LSR_OFFSET);
        assert_eq!(console.read(LSR_OFFSET) & LSR_BREAK, 0, "a read clears it");
        received.push((status & LSR_BREAK != 0, console.read(DATA)));
    }
    assert_eq!(received, [(false, b'a'), (true, 0), (false, b'b')]);
}
