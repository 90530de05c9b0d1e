//! The machine: CPU, memory and devices. A deterministic function of the guest image and the inputs
//! that [`Machine::apply`] was given.

mod digest;
mod firmware;
mod restart;

use std::rc::Rc;
use std::sync::Arc;

use ftvmm_devices::{Board, Input, NetCounters, Output};
use ftvmm_replication::encoding::encode;
use ftvmm_replication::state::unpack_pages;
use ftvmm_replication::{
    Check, CpuCheck, End, EndReason, MemoryCheckMode, Ordinal, OutputDigest, Slice, StatePart,
};

use crate::cpu::{Cpu, CpuError};
use crate::cpu_state::CpuState;
use crate::efer::{self, EFER};
use crate::exit::{Direction, Exit};
use crate::exit_chain::ExitChain;
use crate::fault::Fault;
use crate::machine_state::{MachineState, ResumePoint, SliceState, StateError};
use crate::memory::Memory;
use crate::msr::MsrBank;
use crate::net_watch::NetWatch;
use crate::page_tracker::{LoadError, MemoryCopy, PageTracker};
use crate::situation::{RunMode, RunSituation, StopCause};
use crate::tsc::TscTrap;
use crate::virtual_machine::{Handled, RestartError, VirtualMachine};

pub use firmware::act_as_firmware;
pub use restart::Start;
use restart::Verdict;

/// What the exit chain takes for the address of MSR 0; no device is there.
const MSR_ADDRESS: u64 = 1 << 63;
/// What the exit chain takes for the address of a slice: no port and no device is there.
const SLICE_ADDRESS: u64 = u64::MAX;

/// What the exit chain takes for the address of a request to the disk: what is written is compared
/// like what is sent.
const DISK_ADDRESS: u64 = u64::MAX - 1;
/// What the digest of outputs takes for the address of a frame and of the console.
const FRAME_OUTPUT: u64 = 1;
const CONSOLE_OUTPUT: u64 = 2;

/// One guest.
pub struct Machine<C> {
    vcpu: C,
    memory: Rc<Memory>,
    board: Board,
    tsc: TscTrap,
    msrs: MsrBank,
    chain: ExitChain,
    /// A digest of all outputs, made in the same way.
    outputs: ExitChain,
    inputs: u64,
    slices: u64,
    pages: Option<PageTracker>,
    /// The fault to inject, and how to block the thread for it.
    fault: Option<(Fault, fn(u64))>,
    start: Start,
    /// Guest time at which a reset was last logged.
    told_ns: Option<u64>,
    network: Option<Arc<NetWatch>>,
    published: NetCounters,
}

impl From<Verdict> for Handled {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::GoOn => Self::GoesOn,
            Verdict::Restart => Self::Restarts,
            Verdict::End(cause) => Self::Ended(cause),
        }
    }
}

impl<C: Cpu> Machine<C> {
    /// Puts a machine together from a vCPU that stands at the kernel's entry.
    /// `pages` is there when the guest has a log, written or read.
    pub fn new(
        vcpu: C,
        memory: Rc<Memory>,
        board: Board,
        tsc: TscTrap,
        msrs: MsrBank,
        pages: Option<PageTracker>,
        start: Start,
    ) -> Self {
        Self {
            vcpu,
            memory,
            board,
            tsc,
            msrs,
            chain: ExitChain::default(),
            outputs: ExitChain::default(),
            inputs: 0,
            slices: 0,
            pages,
            fault: None,
            start,
            told_ns: None,
            network: None,
            published: NetCounters::default(),
        }
    }

    /// Flips a bit when the guest gets to the fault's exit, or has `sleep_ms` hold it there.
    pub fn schedule(&mut self, fault: Fault, sleep_ms: fn(u64)) {
        self.fault = Some((fault, sleep_ms));
    }

    /// Keeps `network` up to date with the guest's card.
    pub fn show_network(&mut self, network: Arc<NetWatch>) {
        self.network = Some(network);
    }

    /// Called wherever the card may have changed: by an input, an access, a state, a reset. Where
    /// the guest sends from changes only when it has sent, so the counters tell.
    fn publish_network(&mut self) {
        let counters = self.board.net_counters();
        if let (Some(network), Some(sources)) = (&self.network, self.board.net_sources())
            && counters != self.published
        {
            network.publish(&counters, sources);
            self.published = counters;
        }
    }

    /// The CPU, for its kicker and its state.
    pub fn vcpu(&mut self) -> &mut C {
        &mut self.vcpu
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Rc<Memory> {
        &self.memory
    }

    /// The devices.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The traps of the time stamp counter.
    pub fn tsc(&self) -> &TscTrap {
        &self.tsc
    }

    /// The model-specific registers KVM does not keep.
    pub fn msrs(&self) -> &MsrBank {
        &self.msrs
    }

    /// Whether the guest stands in its kernel and has sent nothing yet.
    fn is_booting(&self) -> Result<bool, CpuError> {
        let nobody_waits = !self.board.has_transmitted();
        Ok(nobody_waits && self.vcpu.exit_sregs()?.cs.selector & 3 == 0)
    }

    /// The copy of memory, for a transfer; only of a guest with a log.
    pub fn memory_copy(&self) -> Option<Arc<MemoryCopy>> {
        self.pages.as_ref().map(|pages| pages.copy().clone())
    }

    /// Slices captured or loaded so far.
    pub fn slices(&self) -> u64 {
        self.slices
    }

    /// Inputs applied so far.
    pub fn inputs(&self) -> u64 {
        self.inputs
    }

    /// Whether the halted guest goes on for a non-maskable interrupt.
    fn wakes_by_nmi(&self) -> Result<bool, CpuError> {
        Ok(self.board.nmi_pending() && !self.vcpu.masks_nmis()?)
    }

    fn reads_clock(&self, exit: Exit) -> bool {
        match exit {
            Exit::Pio { port, .. } => TscTrap::reads_clock(exit) || Board::reads_clock(port),
            Exit::Msr(access) => self.msrs.reads_clock(access),
            _ => false,
        }
    }

    fn access_ports(&mut self, port: u16, direction: Direction, size_bytes: u8) {
        for access in self.vcpu.pio_data().chunks_exact_mut(usize::from(size_bytes)) {
            match direction {
                Direction::Read => self.board.pio_read(port, access),
                Direction::Write => self.board.pio_write(port, access),
            }
        }
    }
}

impl<C: Cpu> VirtualMachine for Machine<C> {
    fn run(&mut self, mode: RunMode) -> Result<Exit, CpuError> {
        // Until the guest is a few instructions further, no interrupt may come.
        let through_a_hook = self.tsc.holds_interrupts();
        match mode {
            RunMode::UntilInterruptible | RunMode::Unrecorded if through_a_hook => {
                self.vcpu.run(false)
            }
            RunMode::Free => self.vcpu.run(false),
            RunMode::UntilInterruptible => self.vcpu.run(true),
            RunMode::Unrecorded => self.vcpu.run(self.board.interrupt_pending()),
            RunMode::Not => {
                self.vcpu.complete_io()?;
                Ok(Exit::Interrupted)
            }
        }
    }

    fn interrupt_waits(&self) -> bool {
        self.board.interrupt_waits()
    }

    fn situation(&mut self, at: Ordinal, exit: Exit) -> Result<RunSituation, CpuError> {
        let interrupts_enabled = self.vcpu.interrupts_enabled();
        Ok(RunSituation {
            at: exit.is_synchronous().then_some(at),
            last: at,
            chain: self.chain.digest(),
            reads_clock: self.reads_clock(exit),
            reads_counter: TscTrap::reads_clock(exit),
            deadline_ns: self.board.next_deadline_ns(),
            owes_ticks: self.board.owes_ticks(),
            interrupts_enabled,
            halted: exit == Exit::Hlt
                && interrupts_enabled
                && !self.board.interrupt_pending()
                && !self.wakes_by_nmi()?,
            hears_power_button: self.board.hears_power_button(),
            takes_frames: self.board.network_ready(),
            booting: self.is_booting()?,
            entropy_wanted_bytes: self.board.entropy_wanted_bytes(),
            // Asked only between two exits, because it may cost an ioctl.
            takes_interrupt: !exit.is_synchronous() && self.vcpu.can_take_interrupt()?,
        })
    }

    // The one way in for everything the guest cannot compute itself.
    fn apply(&mut self, input: Input) {
        self.inputs += 1;
        let is_of_network = matches!(input, Input::NetRx { .. } | Input::NetAnnounce);
        self.board.apply(&*self.memory, input);
        if is_of_network {
            self.publish_network();
        }
    }

    fn measure(&mut self, memory: MemoryCheckMode) -> Result<Check, CpuError> {
        let memory = match &mut self.pages {
            Some(pages) => pages.check(memory)?,
            None => None,
        };
        let state = CpuState::of(&self.vcpu.state()?);
        let code = self.vcpu.code_at_rip(&self.memory)?;
        let cpu = CpuCheck { digest: state.digest(), registers: *state.registers(), code };
        Ok(Check { chain: self.chain.digest(), cpu, memory })
    }

    // A slice does not hold the devices: their state follows from the exits.
    fn capture(&mut self) -> Result<Vec<Slice>, CpuError> {
        let Some(tracker) = &mut self.pages else { return Ok(Vec::new()) };
        let (parts, memory_digest) = tracker.capture()?;
        let state = SliceState { vcpu: self.vcpu.save()?, memory_digest };
        let mut parts: Vec<_> = parts.into_iter().map(|pages| Slice { pages, cpu: None }).collect();
        if let Some(last) = parts.last_mut() {
            last.cpu = Some(state.encode());
        }
        self.slices += 1;
        Ok(parts)
    }

    fn load(&mut self, parts: &[Slice]) -> Result<(), LoadError> {
        let state = parts.last().and_then(|last| last.cpu.as_deref());
        let state = state.and_then(SliceState::decode).ok_or(LoadError::Processor)?;
        self.vcpu.restore(&state.vcpu)?;
        if let Some(tracker) = &mut self.pages {
            let own = tracker.load(parts.iter().map(|part| part.pages.as_slice()))?;
            let theirs = state.memory_digest;
            if own != theirs {
                return Err(LoadError::Digest { own, theirs });
            }
        }
        self.slices += 1;
        Ok(())
    }

    fn save(&mut self, at: Ordinal, exit: Exit) -> Result<Option<MachineState>, CpuError> {
        let (Some(resume_point), Some(pages)) = (ResumePoint::of(exit), &mut self.pages) else {
            return Ok(None);
        };
        let memory_digest = pages.renew_copy()?;
        Ok(Some(MachineState {
            at,
            resume_point,
            vcpu: self.vcpu.save()?,
            board: self.board.save(),
            tsc: self.tsc.save(),
            chain: self.chain.digest(),
            outputs: self.outputs.digest(),
            inputs: self.inputs,
            slices: self.slices,
            memory_digest,
            disk_answers: Vec::new(),
        }))
    }

    fn restore(&mut self, part: &StatePart) -> Result<Option<(Ordinal, Exit)>, StateError> {
        let pages = self.pages.as_mut().ok_or(StateError::NotTracked)?;
        match part {
            StatePart::Outline { .. } => pages.clear(),
            StatePart::Pages(packed) => {
                let mut refused = Ok(());
                unpack_pages(packed, |page, content| {
                    if refused.is_ok() {
                        refused = pages.put(page, content);
                    }
                })?;
                refused?;
            }
            StatePart::Blocks(_) => {}
            StatePart::Machine(bytes) => {
                let state = MachineState::decode(bytes)?;
                let (own, theirs) = (pages.put_done()?, state.memory_digest);
                if own != theirs {
                    return Err(StateError::Digest { own, theirs });
                }
                self.vcpu.restore(&state.vcpu)?;
                self.board = Board::restore(state.board)?;
                self.tsc.restore(state.tsc);
                self.chain = ExitChain::resumed(state.chain);
                self.outputs = ExitChain::resumed(state.outputs);
                (self.inputs, self.slices) = (state.inputs, state.slices);
                self.publish_network();
                return Ok(Some((state.at, state.resume_point.exit())));
            }
        }
        Ok(None)
    }

    fn now_ns(&self) -> u64 {
        self.board.now_ns()
    }

    fn handle(&mut self, at: Ordinal, exit: Exit) -> Result<Handled, CpuError> {
        if let Some((fault, sleep_ms)) = self.fault.take_if(|(fault, _)| fault.at == at) {
            fault.inject(&self.vcpu, &self.memory, sleep_ms)?;
        }
        if exit.is_synchronous() {
            let now_ns = self.board.now_ns();
            if let Some(trap) = self.tsc.at_exit(at, exit, now_ns, &mut self.vcpu, &self.memory)? {
                self.chain.link(at, trap.port.into(), &trap.data.to_le_bytes());
                return Ok(Handled::GoesOn);
            }
        }
        match exit {
            Exit::Pio { port, direction, size_bytes, .. } => {
                self.access_ports(port, direction, size_bytes);
                self.chain.link(at, port.into(), self.vcpu.pio_data());
            }
            Exit::Mmio { addr, direction, .. } => {
                let data = self.vcpu.mmio_data();
                match direction {
                    Direction::Read => self.board.mmio_read(&*self.memory, addr, data),
                    Direction::Write => self.board.mmio_write(&*self.memory, addr, data),
                }
                self.chain.link(at, addr, data);
                self.publish_network();
            }
            Exit::Msr(access) => {
                let answer = if access.index == EFER {
                    self.tsc.at_efer(&mut self.vcpu, &self.memory)?;
                    efer::answer(access, &self.vcpu)?
                } else {
                    self.msrs.answer(access, self.board.now_ns())
                };
                self.vcpu.answer_msr(answer);
                let data = [access.written.unwrap_or(0), answer.unwrap_or(0)].map(u64::to_le_bytes);
                let fault = [u8::from(answer.is_none())];
                let address = MSR_ADDRESS | u64::from(access.index);
                self.chain.link(at, address, &[data.as_flattened(), &fault].concat());
            }
            Exit::Hlt => {
                if !self.vcpu.interrupts_enabled() && !self.wakes_by_nmi()? {
                    return Ok(Handled::Ended(StopCause::GuestHalted));
                }
            }
            Exit::Shutdown => return Ok(self.verdict_of_shutdown().into()),
            Exit::Slice => self.chain.link(at, SLICE_ADDRESS, &[]),
            Exit::Interrupted | Exit::WindowOpen => {}
        }
        let event = self.board.power_event();
        Ok(event.map_or(Handled::GoesOn, |event| self.verdict(event).into()))
    }

    fn take_outputs(&mut self) -> Vec<Output> {
        self.board.take_outputs()
    }

    // A guest without a log is not compared. Reading its frames once more cost one instruction of
    // twenty in a download.
    fn digest_output(&mut self, at: Ordinal, output: &Output) -> Option<OutputDigest> {
        match output {
            Output::Frame(frame) => {
                self.pages.as_ref()?;
                let digest = OutputDigest::of(at, self.chain.digest(), frame);
                self.outputs.link(at, FRAME_OUTPUT, &digest.0);
                return Some(digest);
            }
            Output::Console(bytes) => self.outputs.link(at, CONSOLE_OUTPUT, bytes),
            Output::Disk(request) => {
                let request = encode(request);
                self.chain.link(at, DISK_ADDRESS, &request);
                self.outputs.link(at, DISK_ADDRESS, &request);
            }
        }
        None
    }

    fn restart(&mut self, at: Ordinal) -> Result<(), RestartError> {
        self.power_on_again(at)
    }

    fn deliver_interrupt(&mut self) -> Result<(), CpuError> {
        let held = self.tsc.holds_interrupts();
        if self.board.nmi_pending() && !held && self.vcpu.accepts_nmi()? {
            self.board.nmi_taken();
            return self.vcpu.inject_nmi();
        }
        if self.board.interrupt_pending()
            && !held
            && self.vcpu.accepts_interrupt()?
            && let Some(vector) = self.board.acknowledge_interrupt()
        {
            self.vcpu.inject(vector)?;
        }
        Ok(())
    }

    fn end(&self, reason: EndReason) -> Result<End, CpuError> {
        let state_digest = self.state_digest()?;
        let [chain, outputs] = [self.chain, self.outputs].map(ExitChain::digest);
        Ok(End { state_digest, chain, outputs, reason })
    }
}

#[cfg(test)]
mod tests;
