//! The machine on a processor that stops for what the test says.

mod devices;
mod exits;
mod interrupts;
mod power;
mod slices;
mod state;

use ftvmm_devices::Input;
use serde_json::json;

use crate::exit::{Direction, Exit};
use crate::tests::Guest;
use crate::virtual_machine::VirtualMachine;

/// A read of one byte.
fn port_read(port: u16) -> Exit {
    Exit::Pio { port, direction: Direction::Read, size_bytes: 1, count: 1 }
}

/// Sets up the interrupt controller with vectors from 0x30 on and all lines open, and presses the
/// power button, whose interrupt is line 9 of the slave (vector 0x39).
fn with_an_interrupt(guest: &mut Guest) {
    let writes = [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 4),
        (0x21, 1),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 2),
        (0xa1, 1),
        (0x21, 0),
        (0xa1, 0),
    ];
    for (port, value) in writes {
        guest.out(port, value);
    }
    // Counter 0 of the 8254 in mode 2 with 1193 counts: a tick each millisecond, line 0.
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        guest.out(port, value);
    }
    guest.machine.apply(Input::Time { now_ns: 1_100_000 });
}

/// The guest is between the two instructions of a hooked function.
fn halfway_through_a_hook(guest: &mut Guest, halfway: bool) {
    let place = |address: u64| json!({ "address": address, "original": [0x90, 0x90] });
    let hook = json!({ "first": place(1 << 63), "second": place(3 << 62), "halfway": halfway });
    let state = json!({
        "guest_tsd": false, "entry": null, "seen": { "pages": null }, "hooks": [hook],
        "other_kernel": null,
    });
    guest.machine.tsc.restore(serde_json::from_value(state).unwrap());
}
