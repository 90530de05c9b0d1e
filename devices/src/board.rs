//! The board: every device behind the bus as one deterministic state machine.
//!
//! It changes only by guest accesses ([`Board::pio_read`] and its three siblings), by the interrupt
//! acknowledge cycle and by [`Board::apply`], the one entry for facts from outside. The same
//! sequence of these gives the same state, the same outputs and the same answers; nothing here
//! reads a clock, a file or a random number.
//!
//! The ACPI registers take accesses of any width. The other devices are byte wide on the port bus:
//! an access of another width, and one that no device claims, reads as [`FLOATING_BUS`] and writes
//! nothing. COM2..COM4, the PCI configuration ports and the POST port 0x80 are absent in this way.

mod power;
mod report;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemory;

use crate::acpi::{AcpiPm, AcpiPmState, SCI_IRQ};
use crate::bus::{FLOATING_BUS, Register};
use crate::config::BoardConfig;
use crate::event::{Input, Output};
use crate::pic::{Pic, PicState};
use crate::pit::{Pit, PitState};
use crate::pvpanic::{PanicState, PanicWatch};
use crate::reset::{ResetPorts, ResetState};
use crate::rtc::{Rtc, RtcState};
use crate::serial::{Console, ConsoleState};
use crate::state::InvalidState;
use crate::virtio::{VirtioDevices, VirtioState};

const IRQ_TIMER: u8 = 0;
const IRQ_COM1: u8 = 4;
const IRQ_RTC: u8 = 8;

/// Everything a board remembers: plain data that may come from anywhere, checked when it becomes a
/// [`Board`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    now_ns: u64,
    pic: PicState,
    pit: PitState,
    rtc: RtcState,
    console: ConsoleState,
    reset: ResetState,
    acpi: AcpiPmState,
    virtio: VirtioState,
    panic: PanicState,
    nmi_pending: bool,
    resets: u64,
    outputs: Vec<Output>,
}

/// All devices of the virtual machine.
#[derive(Debug)]
pub struct Board {
    now_ns: u64,
    pic: Pic,
    pit: Pit,
    rtc: Rtc,
    console: Console,
    reset: ResetPorts,
    acpi: AcpiPm,
    virtio: VirtioDevices,
    panic: PanicWatch,
    nmi_pending: bool,
    resets: u64,
    outputs: Vec<Output>,
}

impl Board {
    /// A board at power-on, guest time 0.
    pub fn new(config: &BoardConfig) -> Board {
        Board {
            now_ns: 0,
            pic: Pic::new(),
            pit: Pit::new(),
            rtc: Rtc::new(config.rtc_epoch_s),
            console: Console::new(),
            reset: ResetPorts::new(),
            acpi: AcpiPm::new(),
            virtio: VirtioDevices::new(config),
            panic: PanicWatch::default(),
            nmi_pending: false,
            resets: 0,
            outputs: Vec::new(),
        }
    }

    /// Whether what an access to `port` does depends on the current time, so that time must be
    /// brought up to date (an [`Input::Time`]) before the access.
    pub fn reads_clock(port: u16) -> bool {
        Register::at(port).is_some_and(Register::reads_clock) || AcpiPm::TIMER_PORTS.contains(&port)
    }

    /// The guest reads `data.len()` bytes from `port`.
    pub fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(offset) = AcpiPm::offset(port, data.len()) {
            return self.acpi.read(offset, self.now_ns, data);
        }
        data.fill(FLOATING_BUS);
        let ([value], Some(register)) = (data, Register::at(port)) else {
            return;
        };
        *value = match register {
            Register::PicCommand(chip) => self.pic.read_command(chip),
            Register::PicData(chip) => self.pic.read_data(chip),
            Register::PicElcr(chip) => self.pic.read_elcr(chip),
            Register::PitCounter(counter) => self.pit.read_counter(counter),
            Register::PortB => self.pit.read_port_b(),
            Register::I8042Command => self.reset.read_i8042_status(),
            Register::RtcData => self.rtc.read_data(),
            Register::Com1(offset) => self.console.read(offset),
            Register::ResetControl => self.reset.read_reset_control(),
            Register::Panic => self.panic.read(),
            Register::PitControl | Register::RtcIndex => FLOATING_BUS,
        };
        self.update_lines_and_outputs();
    }

    /// The guest writes `data` to `port`.
    pub fn pio_write(&mut self, port: u16, data: &[u8]) {
        if let Some(offset) = AcpiPm::offset(port, data.len()) {
            self.acpi.write(offset, data);
            return self.update_lines_and_outputs();
        }
        let (&[value], Some(register)) = (data, Register::at(port)) else {
            return;
        };
        match register {
            Register::PicCommand(chip) => self.pic.write_command(chip, value),
            Register::PicData(chip) => self.pic.write_data(chip, value),
            Register::PicElcr(chip) => self.pic.write_elcr(chip, value),
            Register::PitCounter(counter) => self.pit.write_counter(counter, value),
            Register::PitControl => self.pit.write_control(value),
            Register::PortB => self.pit.write_port_b(value),
            Register::I8042Command => self.reset.write_i8042_command(value),
            Register::RtcIndex => self.rtc.write_index(value),
            Register::RtcData => self.rtc.write_data(value),
            Register::Com1(offset) => self.console.write(offset, value),
            Register::ResetControl => self.reset.write_reset_control(value),
            Register::Panic => self.panic.write(value),
        }
        self.update_lines_and_outputs();
    }

    /// The guest reads `data.len()` bytes from guest-physical address `addr`, which is not RAM.
    pub fn mmio_read<M: GuestMemory>(&mut self, _mem: &M, addr: u64, data: &mut [u8]) {
        data.fill(FLOATING_BUS);
        if let Some((_, offset, device)) = self.virtio.at::<M>(addr, data.len()) {
            device.read(offset, data);
        }
    }

    /// The guest writes `data` to guest-physical address `addr`, which is not RAM. A queue
    /// notification is served before this returns: buffers are used and frames have become
    /// outputs.
    pub fn mmio_write<M: GuestMemory>(&mut self, mem: &M, addr: u64, data: &[u8]) {
        let Some((slot, offset, device)) = self.virtio.at(addr, data.len()) else {
            return;
        };
        if device.write(mem, offset, data, &mut self.outputs) {
            self.pic.set_line(slot.irq, false);
        }
        self.update_lines_and_outputs();
    }

    /// A fact from outside reaches the devices: the only way one can. A time smaller than the last
    /// one is taken as the last one.
    pub fn apply<M: GuestMemory>(&mut self, mem: &M, input: Input) {
        match input {
            Input::Time { now_ns } => {
                self.now_ns = self.now_ns.max(now_ns);
                self.pit.advance(self.now_ns);
                self.rtc.advance(self.now_ns);
            }
            Input::NetRx { frame } => {
                if let Some(net) = &mut self.virtio.net {
                    net.receive(mem, frame);
                }
            }
            Input::ConsoleRx { bytes } => self.console.enqueue(&bytes),
            Input::Entropy { bytes } => self.virtio.entropy.supply(mem, &bytes),
            Input::DiskDone { id, outcome } => {
                if let Some(disk) = &mut self.virtio.disk {
                    disk.complete(mem, id, outcome, &mut self.outputs);
                }
            }
            Input::PowerButton => self.acpi.press_power_button(),
            Input::Nmi => self.nmi_pending = true,
            Input::ConsoleBreak => self.console.send_break(),
            Input::NetAnnounce => {
                if let Some(net) = &mut self.virtio.net {
                    net.announce();
                }
            }
            Input::NewIdentity { generation_id, unix_s } => {
                self.take_identity(mem, generation_id, unix_s);
            }
        }
        self.update_lines_and_outputs();
    }

    /// Brings interrupt lines and outputs up to date with the devices; runs after everything that
    /// can change them.
    fn update_lines_and_outputs(&mut self) {
        if self.console.take_pulse() {
            self.pic.pulse(IRQ_COM1);
        }
        self.pic.set_line(IRQ_RTC, self.rtc.interrupt_line());
        self.pic.set_line(SCI_IRQ, self.acpi.interrupt_line());
        for (slot, transport) in self.virtio.transports() {
            self.pic.set_line(slot.irq, transport.interrupt_line());
        }
        // A tick the guest has not taken yet lets every other interrupt go first: late ticks must
        // not keep all others from a guest that is behind, and one that computes may make
        // an exit for the other, but none after its tick.
        if self.pic.withdraw(IRQ_TIMER) {
            self.pit.take_back_tick();
        }
        let others_wait = self.pic.interrupt_pending();
        if self.pit.owes_tick() && self.pic.is_idle(IRQ_TIMER) && !others_wait {
            self.pit.take_owed_tick();
            self.pic.pulse(IRQ_TIMER);
        }
        if !self.console.printed().is_empty() {
            self.collect_printed();
        }
    }

    /// Printed bytes join the last output when that is console output too, so that a line is one
    /// output.
    fn collect_printed(&mut self) {
        let printed = self.console.printed();
        self.panic.see(printed);
        match self.outputs.last_mut() {
            Some(Output::Console(bytes)) => bytes.extend_from_slice(printed),
            _ => self.outputs.push(Output::Console(printed.to_vec())),
        }
        self.console.clear_printed();
    }

    /// What the guest has sent since the last call, in order.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// The processor's interrupt acknowledge cycle: the vector to deliver, `None` when no interrupt
    /// is asked for.
    pub fn acknowledge_interrupt(&mut self) -> Option<u8> {
        if !self.pic.interrupt_pending() {
            return None;
        }
        let vector = self.pic.acknowledge();
        self.update_lines_and_outputs();
        Some(vector)
    }

    /// Everything the board remembers, outputs not taken yet included.
    pub fn save(&self) -> BoardState {
        let Board {
            now_ns,
            pic,
            pit,
            rtc,
            console,
            reset,
            acpi,
            virtio,
            panic,
            nmi_pending,
            resets,
            outputs,
        } = self;
        BoardState {
            now_ns: *now_ns,
            pic: pic.save(),
            pit: pit.save(),
            rtc: rtc.save(),
            console: console.save(),
            reset: reset.save(),
            acpi: acpi.save(),
            virtio: virtio.save(),
            panic: panic.save(),
            nmi_pending: *nmi_pending,
            resets: *resets,
            outputs: outputs.clone(),
        }
    }

    /// The board that `state` was saved from.
    ///
    /// # Errors
    /// [`InvalidState`] when no board could have been in that state.
    pub fn restore(state: BoardState) -> Result<Board, InvalidState> {
        let BoardState {
            now_ns,
            pic,
            pit,
            rtc,
            console,
            reset,
            acpi,
            virtio,
            panic,
            nmi_pending,
            resets,
            outputs,
        } = state;
        let board = Board {
            now_ns,
            pic: Pic::try_from(pic)?,
            pit: Pit::try_from(pit)?,
            rtc: Rtc::try_from(rtc)?,
            console: Console::try_from(console)?,
            reset: ResetPorts::try_from(reset)?,
            acpi: AcpiPm::try_from(acpi)?,
            virtio: VirtioDevices::restore(virtio)?,
            panic: PanicWatch::try_from(panic)?,
            nmi_pending,
            resets,
            outputs,
        };
        InvalidState::check(board.pit.now_ns() == now_ns, "pit.now_ns")?;
        InvalidState::check(board.rtc.shows_guest_time(now_ns), "rtc.now_s")?;
        Ok(board)
    }
}

impl TryFrom<BoardState> for Board {
    type Error = InvalidState;

    fn try_from(state: BoardState) -> Result<Board, InvalidState> {
        Board::restore(state)
    }
}

#[cfg(test)]
mod tests;
