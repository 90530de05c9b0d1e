//! The serial console, COM1: a National Semiconductor PC16550D ("PC16550D Universal Asynchronous
//! Receiver/Transmitter with FIFOs", §8), registers by vm-superio's [`Serial`].
//!
//! | port | name | access | reset | meaning |
//! |------|------|--------|-------|---------|
//! | 0x3f8 | RBR / THR / DLL | rw | 0 / – / 0x0c | data; divisor low with LCR.DLAB |
//! | 0x3f9 | IER / DLM | rw | 0 | interrupt enable; divisor high with LCR.DLAB |
//! | 0x3fa | IIR / FCR | r / w | 0xc1 / – | interrupt identification / FIFO control (ignored) |
//! | 0x3fb | LCR | rw | 0x03 | line control |
//! | 0x3fc | MCR | rw | 0x08 | modem control, loopback |
//! | 0x3fd | LSR | r | 0x60 | line status; transmitter always empty |
//! | 0x3fe | MSR | r | 0xb0 | modem status, constant outside loopback |
//! | 0x3ff | SCR | rw | 0 | scratch |
//!
//! **Interrupts.** The PIC input is edge triggered and vm-superio gives a trigger each time an IIR
//! bit becomes set, so a trigger is a pulse that the PIC latches. vm-superio clears IIR's data bit
//! with every data read, although more bytes may wait; a driver that stops in the middle would
//! never be told of the rest. So its FIFO is given one byte at a time and the others wait in a
//! backlog here: every byte has a trigger of its own and none can be forgotten.
//!
//! **Break.** It waits its turn among the typed bytes, as a zero byte with LSR.BI (bit 4), which a
//! read of LSR clears.
//!
//! Not emulated: baud rate, parity, modem and line-status interrupts, FIFO control (trigger levels,
//! clearing).
//!
//! From outside: typed bytes, through [`Console::enqueue`], and breaks; [`BACKLOG_BYTES_MAX`] of
//! them wait, more are dropped and counted.

use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::state::InvalidState;

/// Most typed bytes that wait for the guest.
pub const BACKLOG_BYTES_MAX: usize = 64 * 1024;

/// Line status register, offset and data-ready bit (data sheet, §8.4).
const LSR_OFFSET: u8 = 5;
const LSR_DATA_READY: u8 = 0x01;
const LSR_BREAK: u8 = 0x10;
/// What stands for a break among the typed bytes.
const BREAK: u16 = 0x100;

/// Remembers that the UART asked for an interrupt since the last look.
#[derive(Debug, Default)]
struct PulseFlag(Cell<bool>);

impl Trigger for PulseFlag {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// Collects what the guest prints.
#[derive(Debug, Default)]
struct Printed(Vec<u8>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The registers of vm-superio's UART, in a form that can be saved.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct SerialStateDef {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// What the console remembers; plain data, checked when it becomes a [`Console`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    #[serde(with = "SerialStateDef")]
    uart: SerialState,
    backlog: Vec<u16>,
    /// The byte in the UART is a break, and the guest has not read so.
    in_break: bool,
    dropped_bytes: u64,
}

/// COM1 with its input backlog.
#[derive(Debug)]
pub(crate) struct Console {
    uart: Serial<PulseFlag, NoEvents, Printed>,
    backlog: VecDeque<u16>,
    in_break: bool,
    dropped_bytes: u64,
}

impl TryFrom<ConsoleState> for Console {
    type Error = InvalidState;

    fn try_from(state: ConsoleState) -> Result<Self, InvalidState> {
        let ConsoleState { uart, backlog, in_break, dropped_bytes } = state;
        let known = backlog.iter().all(|item| *item <= BREAK);
        InvalidState::check(known, "serial.backlog")?;
        InvalidState::check(backlog.len() <= BACKLOG_BYTES_MAX, "serial.backlog")?;
        let uart = Serial::from_state(&uart, PulseFlag::default(), NoEvents, Printed::default())
            .map_err(|_| InvalidState { field: "serial.uart.in_buffer" })?;
        // vm-superio triggers for what is pending; the saved PIC has latched that already.
        uart.interrupt_evt().0.set(false);
        Ok(Console { uart, backlog: backlog.into(), in_break, dropped_bytes })
    }
}

impl Console {
    pub(crate) fn new() -> Self {
        Console {
            uart: Serial::new(PulseFlag::default(), Printed::default()),
            backlog: VecDeque::new(),
            in_break: false,
            dropped_bytes: 0,
        }
    }

    /// The UART as at power-on; what was typed before is lost.
    pub(crate) fn reset(&mut self) {
        *self = Console { dropped_bytes: self.dropped_bytes, ..Console::new() };
    }

    pub(crate) fn save(&self) -> ConsoleState {
        let Console { uart, backlog, in_break, dropped_bytes } = self;
        ConsoleState {
            uart: uart.state(),
            backlog: backlog.iter().copied().collect(),
            in_break: *in_break,
            dropped_bytes: *dropped_bytes,
        }
    }

    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        let mut value = self.uart.read(offset);
        if offset == LSR_OFFSET && std::mem::take(&mut self.in_break) {
            value |= LSR_BREAK;
        }
        self.feed();
        value
    }

    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        // Neither the trigger nor the writer can fail, so there is no error to look at.
        let _ = self.uart.write(offset, value);
        self.feed();
    }

    /// Bytes typed at the console.
    pub(crate) fn enqueue(&mut self, bytes: &[u8]) {
        let room = BACKLOG_BYTES_MAX - self.backlog.len();
        let kept = bytes.len().min(room);
        self.backlog.extend(bytes[..kept].iter().copied().map(u16::from));
        self.dropped_bytes += (bytes.len() - kept) as u64;
        self.feed();
    }

    /// The line is held in its other state for longer than a byte.
    pub(crate) fn send_break(&mut self) {
        if self.backlog.len() < BACKLOG_BYTES_MAX {
            self.backlog.push_back(BREAK);
        }
        self.feed();
    }

    /// Gives the UART the next byte when its FIFO is empty. In loopback the UART takes none.
    fn feed(&mut self) {
        let Some(&item) = self.backlog.front() else {
            return;
        };
        // Reading the line status has no side effect in vm-superio.
        let is_empty = self.uart.read(LSR_OFFSET) & LSR_DATA_READY == 0;
        if is_empty && matches!(self.uart.enqueue_raw_bytes(&[item as u8]), Ok(1)) {
            self.backlog.pop_front();
            self.in_break = item == BREAK;
        }
    }

    /// Whether the UART asked for an interrupt since the last call.
    pub(crate) fn take_pulse(&mut self) -> bool {
        self.uart.interrupt_evt().0.take()
    }

    /// What the guest printed since the last call to [`Console::clear_printed`].
    pub(crate) fn printed(&self) -> &[u8] {
        &self.uart.writer().0
    }

    pub(crate) fn clear_printed(&mut self) {
        self.uart.writer_mut().0.clear();
    }

    /// Typed bytes that were dropped because the backlog was full.
    pub(crate) fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes
    }
}

#[cfg(test)]
mod tests;
