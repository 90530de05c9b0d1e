//! The board: every device behind the bus as one deterministic state machine.
//!
//! It changes only by guest accesses ([`Board::pio_read`] and its three siblings), by the interrupt acknowledge cycle
//! and by [`Board::apply`], the one entry for facts from outside. The same sequence of these gives the same state, the
//! same outputs and the same answers; nothing here reads a clock, a file or a random number.
//!
//! The ACPI registers take accesses of any width. The other devices are byte wide on the port bus: an access of another
//! width, and one that no device claims, reads as [`FLOATING_BUS`] and writes nothing. COM2..COM4, the PCI configuration
//! ports and the POST port 0x80 are absent in this way.

mod power;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemory;

use crate::acpi::{AcpiPm, AcpiPmState, SCI_IRQ};
use crate::event::{Input, Output};
use crate::fault::GuestFaults;
use crate::net_sources::NetSources;
use crate::pic::{Pic, PicState};
use crate::pit::{Pit, PitState};
use crate::pvpanic::{PVPANIC_PORT, PanicState, PanicWatch};
use crate::reset::{ResetPorts, ResetState};
use crate::rtc::{Rtc, RtcState};
use crate::serial::{Console, ConsoleState};
use crate::state::InvalidState;
use crate::virtio_blk::{DiskCounters, VirtioBlk, VirtioBlkState};
use crate::virtio_entropy::{VirtioEntropy, VirtioEntropyState};
use crate::virtio_net::{NetConfig, NetCounters, VirtioNet, VirtioNetState};
use crate::virtio_slot::{VIRTIO_BLK_SLOT, VIRTIO_ENTROPY_SLOT, VIRTIO_NET_SLOT};

/// What every byte of an access reads as when no device answers: the bus is pulled high.
pub const FLOATING_BUS: u8 = 0xff;

const IRQ_TIMER: u8 = 0;
const IRQ_COM1: u8 = 4;
const IRQ_RTC: u8 = 8;

/// What a board is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoardConfig {
    /// Time of day at power-on, in Unix seconds.
    pub rtc_epoch_s: u64,
    /// The network card; `None` leaves it out.
    pub net: Option<NetConfig>,
    /// Size of the disk, a multiple of [`crate::SECTOR_BYTES`]; `None` leaves the disk out.
    pub disk_bytes: Option<u64>,
}

/// Everything a board remembers: plain data that may come from anywhere, checked when it becomes a [`Board`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    now_ns: u64,
    pic: PicState,
    pit: PitState,
    rtc: RtcState,
    console: ConsoleState,
    reset: ResetState,
    acpi: AcpiPmState,
    net: Option<VirtioNetState>,
    entropy: VirtioEntropyState,
    disk: Option<VirtioBlkState>,
    panic: PanicState,
    nmi_pending: bool,
    resets: u64,
    outputs: Vec<Output>,
}

/// Which device register a port is.
#[derive(Clone, Copy)]
enum Register {
    PicCommand(usize),
    PicData(usize),
    PicElcr(usize),
    PitCounter(usize),
    PitControl,
    PortB,
    I8042Command,
    RtcIndex,
    RtcData,
    Com1(u8),
    ResetControl,
    Panic,
}

/// The port map.
fn register_at(port: u16) -> Option<Register> {
    Some(match port {
        0x20 => Register::PicCommand(0),
        0x21 => Register::PicData(0),
        0xa0 => Register::PicCommand(1),
        0xa1 => Register::PicData(1),
        0x4d0 => Register::PicElcr(0),
        0x4d1 => Register::PicElcr(1),
        0x40..=0x42 => Register::PitCounter(usize::from(port - 0x40)),
        0x43 => Register::PitControl,
        0x61 => Register::PortB,
        0x64 => Register::I8042Command,
        0x70 => Register::RtcIndex,
        0x71 => Register::RtcData,
        0x3f8..=0x3ff => Register::Com1((port - 0x3f8) as u8),
        0xcf9 => Register::ResetControl,
        PVPANIC_PORT => Register::Panic,
        _ => return None,
    })
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
    net: Option<VirtioNet>,
    entropy: VirtioEntropy,
    disk: Option<VirtioBlk>,
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
            net: config.net.map(VirtioNet::new),
            entropy: VirtioEntropy::new(),
            disk: config.disk_bytes.map(VirtioBlk::new),
            panic: PanicWatch::default(),
            nmi_pending: false,
            resets: 0,
            outputs: Vec::new(),
        }
    }

    /// Whether what an access to `port` does depends on the current time, so that time must be brought up to date
    /// (an [`Input::Time`]) before the access.
    pub fn reads_clock(port: u16) -> bool {
        matches!(port, 0x40..=0x43 | 0x61 | 0x71) || AcpiPm::TIMER_PORTS.contains(&port)
    }

    /// The guest reads `data.len()` bytes from `port`.
    pub fn pio_read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(offset) = AcpiPm::offset(port, data.len()) {
            return self.acpi.read(offset, self.now_ns, data);
        }
        data.fill(FLOATING_BUS);
        let ([value], Some(register)) = (data, register_at(port)) else {
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
        self.settle();
    }

    /// The guest writes `data` to `port`.
    pub fn pio_write(&mut self, port: u16, data: &[u8]) {
        if let Some(offset) = AcpiPm::offset(port, data.len()) {
            self.acpi.write(offset, data);
            return self.settle();
        }
        let (&[value], Some(register)) = (data, register_at(port)) else {
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
        self.settle();
    }

    /// The guest reads `data.len()` bytes from guest-physical address `addr`, which is not RAM.
    pub fn mmio_read<M: GuestMemory>(&mut self, _mem: &M, addr: u64, data: &mut [u8]) {
        data.fill(FLOATING_BUS);
        if let (Some(net), Some(offset)) = (&self.net, VIRTIO_NET_SLOT.offset(addr, data.len())) {
            net.read(offset, data);
        } else if let Some(offset) = VIRTIO_ENTROPY_SLOT.offset(addr, data.len()) {
            self.entropy.read(offset, data);
        } else if let (Some(disk), Some(offset)) =
            (&self.disk, VIRTIO_BLK_SLOT.offset(addr, data.len()))
        {
            disk.read(offset, data);
        }
    }

    /// The guest writes `data` to guest-physical address `addr`, which is not RAM. A queue notification is served
    /// before this returns: buffers are used and frames have become outputs.
    pub fn mmio_write<M: GuestMemory>(&mut self, mem: &M, addr: u64, data: &[u8]) {
        if let (Some(net), Some(offset)) = (&mut self.net, VIRTIO_NET_SLOT.offset(addr, data.len()))
        {
            let acknowledged = net.write(mem, offset, data, &mut self.outputs);
            if acknowledged {
                self.pic.set_line(VIRTIO_NET_SLOT.irq, false);
            }
            self.settle();
        } else if let Some(offset) = VIRTIO_ENTROPY_SLOT.offset(addr, data.len()) {
            let acknowledged = self.entropy.write(mem, offset, data);
            if acknowledged {
                self.pic.set_line(VIRTIO_ENTROPY_SLOT.irq, false);
            }
            self.settle();
        } else if let (Some(disk), Some(offset)) =
            (&mut self.disk, VIRTIO_BLK_SLOT.offset(addr, data.len()))
        {
            let acknowledged = disk.write(mem, offset, data, &mut self.outputs);
            if acknowledged {
                self.pic.set_line(VIRTIO_BLK_SLOT.irq, false);
            }
            self.settle();
        }
    }

    /// A fact from outside reaches the devices: the only way one can. A time smaller than the last one is taken as
    /// the last one.
    pub fn apply<M: GuestMemory>(&mut self, mem: &M, input: Input) {
        match input {
            Input::Time { now_ns } => {
                self.now_ns = self.now_ns.max(now_ns);
                self.pit.advance(self.now_ns);
                self.rtc.advance(self.now_ns);
            }
            Input::NetRx { frame } => {
                if let Some(net) = &mut self.net {
                    net.receive(mem, frame);
                }
            }
            Input::ConsoleRx { bytes } => self.console.enqueue(&bytes),
            Input::Entropy { bytes } => self.entropy.supply(mem, &bytes),
            Input::DiskDone { id, outcome } => {
                if let Some(disk) = &mut self.disk {
                    disk.complete(mem, id, outcome, &mut self.outputs);
                }
            }
            Input::PowerButton => self.acpi.press_power_button(),
            Input::Nmi => self.nmi_pending = true,
            Input::ConsoleBreak => self.console.send_break(),
            Input::NetAnnounce => {
                if let Some(net) = &mut self.net {
                    net.announce();
                }
            }
            Input::NewIdentity { generation_id, unix_s } => {
                self.take_identity(mem, generation_id, unix_s);
            }
        }
        self.settle();
    }

    /// Brings interrupt lines and outputs up to date with the devices; runs after everything that can change them.
    fn settle(&mut self) {
        if self.console.take_pulse() {
            self.pic.pulse(IRQ_COM1);
        }
        if let Some(net) = &self.net {
            self.pic.set_line(VIRTIO_NET_SLOT.irq, net.interrupt_line());
        }
        self.pic.set_line(IRQ_RTC, self.rtc.interrupt_line());
        self.pic.set_line(SCI_IRQ, self.acpi.interrupt_line());
        self.pic.set_line(VIRTIO_ENTROPY_SLOT.irq, self.entropy.interrupt_line());
        if let Some(disk) = &self.disk {
            self.pic.set_line(VIRTIO_BLK_SLOT.irq, disk.interrupt_line());
        }
        // A tick the guest has not taken yet lets every other interrupt go first: late ticks must not keep all others
        // from a guest that is behind, and one that computes may make an exit for the other, but none after its tick.
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

    /// Printed bytes join the last output when that is console output too, so that a line is one output.
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

    /// Guest time of the next interrupt of timer or clock, in nanoseconds since power-on.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        match (self.pit.next_edge_ns(), self.rtc.next_event_ns()) {
            (Some(tick_ns), Some(alarm_ns)) => Some(tick_ns.min(alarm_ns)),
            (tick_ns, alarm_ns) => tick_ns.or(alarm_ns),
        }
    }

    /// Guest time, in nanoseconds since power-on.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Whether the interrupt controller asks the processor for an interrupt.
    pub fn interrupt_pending(&self) -> bool {
        self.pic.interrupt_pending()
    }

    /// Whether any device waits for its interrupt to be served: one is pending, or a more urgent one is being served.
    pub fn interrupt_waits(&self) -> bool {
        self.pic.request_waits()
    }

    /// The processor's interrupt acknowledge cycle: the vector to deliver, `None` when no interrupt is asked for.
    pub fn acknowledge_interrupt(&mut self) -> Option<u8> {
        if !self.pic.interrupt_pending() {
            return None;
        }
        let vector = self.pic.acknowledge();
        self.settle();
        Some(vector)
    }

    /// Whether a received frame would reach the guest now: its driver is up and has taken every frame so far. While
    /// this is false the host does well to keep frames to itself.
    pub fn network_ready(&self) -> bool {
        self.net.as_ref().is_some_and(VirtioNet::is_ready)
    }

    /// Whether the guest has sent nothing yet: nobody outside can have asked it for anything.
    pub fn is_unheard_of(&self) -> bool {
        self.net.as_ref().is_none_or(|net| net.counters().tx_frames == 0)
    }

    /// Most random bytes an [`Input::Entropy`] could give the guest now; 0 while it asks for none.
    pub fn entropy_wanted_bytes(&self) -> u64 {
        self.entropy.wanted_bytes()
    }

    /// Random bytes the guest has got so far.
    pub fn entropy_supplied_bytes(&self) -> u64 {
        self.entropy.supplied_bytes()
    }

    /// What the guest has done wrong towards its devices so far.
    pub fn guest_faults(&self) -> GuestFaults {
        let net = self.net.as_ref().map(|net| *net.faults()).unwrap_or_default();
        let disk = self.disk.as_ref().map(|disk| *disk.faults()).unwrap_or_default();
        net.and(*self.entropy.faults()).and(disk)
    }

    /// What the guest has asked of its disk so far.
    pub fn disk_counters(&self) -> DiskCounters {
        self.disk.as_ref().map(|disk| *disk.counters()).unwrap_or_default()
    }

    /// Frames that passed the network card, and those that did not.
    pub fn net_counters(&self) -> NetCounters {
        self.net.as_ref().map(|net| *net.counters()).unwrap_or_default()
    }

    /// The addresses the guest has sent from; `None` without a network card.
    pub fn net_sources(&self) -> Option<&NetSources> {
        self.net.as_ref().map(VirtioNet::sources)
    }

    /// Whether timer ticks wait behind one the guest has not finished with. A timer that is programmed for each tick
    /// never owes one.
    pub fn owes_ticks(&self) -> bool {
        self.pit.owes_tick()
    }

    /// Timer ticks the guest will never see because it left [`crate::OWED_TICKS_MAX`] of them waiting.
    pub fn lost_ticks(&self) -> u64 {
        self.pit.lost_ticks()
    }

    /// Typed bytes the guest will never see because it left [`crate::BACKLOG_BYTES_MAX`] of them waiting.
    pub fn dropped_console_bytes(&self) -> u64 {
        self.console.dropped_bytes()
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
            net,
            entropy,
            disk,
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
            net: net.as_ref().map(VirtioNet::save),
            entropy: entropy.save(),
            disk: disk.as_ref().map(VirtioBlk::save),
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
            net,
            entropy,
            disk,
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
            net: net.map(VirtioNet::try_from).transpose()?,
            entropy: VirtioEntropy::try_from(entropy)?,
            disk: disk.map(VirtioBlk::try_from).transpose()?,
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
