//! The run loop. It serves every role: a role is a choice of where inputs come from and where outputs go,
//! and the loop does not know which.
//!
//! ```text
//! exit → inputs for this ordinal → Machine::apply → Machine::handle → outputs → sink → interrupt
//! ```
//!
//! Inputs come before the exit is answered, so that a clock the guest reads shows the sample taken at that
//! very exit. Only synchronous exits have an ordinal. A recorded run that must give an input to a guest that
//! makes none stops it anywhere and makes that point one: a slice, whose state goes into the log.

use ftvmm_devices::{Input, Output};
use ftvmm_replication::{
    Check, EndReason, MemoryLook, Ordinal, OutputDigest, Slice, SnapshotMark, StatePart,
};
use thiserror::Error;

use crate::input::InputError;
use crate::kvm::{Exit, KvmError};
use crate::machine::{Handled, Machine, RestartError};
use crate::machine_state::{MachineState, StateError};
use crate::page_tracker::LoadError;

/// Where the guest stands and what it would take; all an [`InputSource`] may know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Situation {
    /// The exit ordinal, or `None` between two exits (after a kick or an interrupt window).
    pub at: Option<Ordinal>,
    /// The last exit ordinal.
    pub last: Ordinal,
    /// Running digest of all exits so far.
    pub chain: u64,
    /// The guest is about to read a clock.
    pub reads_clock: bool,
    /// The clock is the time stamp counter.
    pub reads_counter: bool,
    /// Guest time at which the next timer event is due, in nanoseconds since power-on.
    pub deadline_ns: Option<u64>,
    /// The guest's timer owes it ticks: they come one at a time, so it falls behind while they wait.
    pub owes_ticks: bool,
    /// The guest executed HLT and nothing wakes it yet: the source should wait for an input.
    pub halted: bool,
    /// At an exit: the guest stands where interrupts are enabled.
    pub interrupts_enabled: bool,
    /// The network card has buffers for frames.
    pub takes_frames: bool,
    /// The guest is in its kernel and has sent nothing yet.
    pub booting: bool,
    /// The guest listens to its power button.
    pub hears_power_button: bool,
    /// Random bytes the guest's entropy source could take.
    pub entropy_wanted_bytes: u64,
    /// Between two exits: an interrupt could be delivered here.
    pub takes_interrupt: bool,
}

/// What to do at an exit.
#[derive(Debug)]
pub enum Step {
    /// Apply this, then ask again.
    Apply(Input),
    /// Measure the execution and tell [`InputSource::measured`].
    Measure {
        /// What to do about memory.
        memory: MemoryLook,
    },
    /// Between two exits: make this point an exit ordinal of its own and tell its state to
    /// [`InputSource::captured`]; then ask again, for inputs.
    Capture,
    /// Put the guest into the state of this slice, which is the next exit ordinal; then ask again.
    Load(Vec<Slice>),
    /// Tell [`InputSource::state_taken`] the whole machine as it stands here; then ask again. Only at an exit
    /// that leaves nothing to complete: a slice, or a halted guest.
    TakeState,
    /// Put this part of a state in place. After the last one the guest stands where it says; ask again.
    PutState(StatePart),
    /// Ask again.
    Again,
    /// There is no more for this exit.
    Proceed,
    /// End the run here, before the exit is answered.
    Stop(StopCause),
}

/// How far the guest may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunMode {
    /// To its next exit, or until it is kicked.
    Free,
    /// Likewise, or to where it can take an interrupt.
    UntilInterruptible,
    /// Not at all: the log says that a slice follows.
    Not,
    /// As it likes: nothing is recorded, so inputs and interrupts also reach it between exits.
    Unrecorded,
}

/// Why a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopCause {
    /// The guest switched itself off.
    GuestPowerOff,
    /// The guest reset itself.
    GuestReset,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest halted with interrupts disabled: nothing can wake it.
    GuestHalted,
    /// The guest's CPU shut down after a triple fault.
    GuestTripleFault,
    /// The user asked for it.
    Requested,
    /// The recording ends here.
    EndOfLog,
    /// The replication protocol said so.
    Protocol,
}

/// Where a run ended.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    /// Why.
    pub cause: StopCause,
    /// The last exit ordinal reached.
    pub at: Ordinal,
    /// True when the guest stood at that exit, so that a replay can end at the same point.
    pub at_exit: bool,
}

impl Ending {
    /// The first exit the guest did not get past: a replay ends there too.
    pub fn first_incomplete(&self) -> Ordinal {
        match self.cause {
            StopCause::GuestPowerOff
            | StopCause::GuestReset
            | StopCause::GuestPanic
            | StopCause::GuestHalted
            | StopCause::GuestTripleFault => self.at.next(),
            StopCause::Requested | StopCause::EndOfLog | StopCause::Protocol => self.at,
        }
    }

    /// True when the guest ended itself.
    pub fn by_guest(&self) -> bool {
        self.first_incomplete() != self.at
    }

    /// The reason as recordings name it.
    pub fn reason(&self) -> EndReason {
        match self.cause {
            StopCause::GuestPowerOff | StopCause::GuestHalted => EndReason::PowerOff,
            StopCause::GuestReset => EndReason::Reset,
            StopCause::GuestPanic => EndReason::Panic,
            StopCause::GuestTripleFault => EndReason::Shutdown,
            StopCause::Requested | StopCause::EndOfLog | StopCause::Protocol => {
                EndReason::HostRequest
            }
        }
    }
}

/// Where inputs come from.
pub trait InputSource {
    /// The next thing to do in this situation. May block: while the guest is halted, and while it is not yet
    /// known what happens at this exit.
    ///
    /// # Errors
    /// When the source is broken, or its inputs do not fit this guest (a divergence).
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError>;

    /// Takes the answer to [`Step::Measure`].
    ///
    /// # Errors
    /// When it is not what a recording says (a divergence), or the log is broken.
    fn measured(&mut self, _at: Ordinal, _check: Check) -> Result<(), InputError> {
        Ok(())
    }

    /// Takes the answer to [`Step::Capture`]: the parts of the slice that is exit `at`.
    ///
    /// # Errors
    /// When the log is broken.
    fn captured(&mut self, _at: Ordinal, _parts: Vec<Slice>) -> Result<(), InputError> {
        Ok(())
    }

    /// Takes the answer to [`Step::TakeState`].
    ///
    /// # Errors
    /// When it cannot go where it is to go.
    fn state_taken(&mut self, _state: MachineState) -> Result<(), InputError> {
        Ok(())
    }

    /// The state as it stands at exit `at` goes into a snapshot.
    ///
    /// # Errors
    /// When the log is broken.
    fn saved(&mut self, _at: Ordinal, _mark: SnapshotMark) -> Result<(), InputError> {
        Ok(())
    }

    /// [`Step::PutState`] is done. For the last part: where the guest stands, and its time.
    fn state_put(&mut self, _part: &StatePart, _stands: Option<(Ordinal, u64)>) {}

    /// The guest leaves exit `at`; how far may it run? `interrupt_waits` says that the guest could not take
    /// an interrupt here that is pending.
    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode;
}

/// Where outputs go.
pub trait OutputSink {
    /// Takes what the guest sent at exit `at`; a frame of a logged guest has a `digest`.
    ///
    /// # Errors
    /// When the sink is broken.
    fn emit(
        &mut self,
        at: Ordinal,
        digest: Option<OutputDigest>,
        output: Output,
    ) -> Result<(), InputError>;
}

/// Why a run failed.
#[derive(Debug, Error)]
pub enum RunError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A slice cannot be taken over.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The machine cannot go back to power-on.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// A state cannot be put in place.
    #[error(transparent)]
    State(#[from] StateError),
    /// Inputs or outputs failed.
    #[error(transparent)]
    Input(#[from] InputError),
}

/// Runs `machine` until it ends itself, its inputs end it, or something fails.
///
/// # Errors
/// When KVM or the input source fails.
pub fn run(
    machine: &mut Machine,
    inputs: &mut dyn InputSource,
    outputs: &mut dyn OutputSink,
) -> Result<Ending, RunError> {
    let mut at = Ordinal(0);
    loop {
        let mode = inputs.run_mode(at, machine.interrupt_waits());
        let mut exit = machine.run(mode)?;
        if exit.is_synchronous() {
            at = at.next();
        }
        loop {
            match inputs.next(&machine.situation(at, exit)?)? {
                Step::Apply(input) => machine.apply(input),
                Step::Measure { memory } => inputs.measured(at, machine.measure(memory)?)?,
                Step::Capture => {
                    (at, exit) = (at.next(), Exit::Slice);
                    inputs.captured(at, machine.capture()?)?;
                }
                Step::Load(parts) => {
                    // A guest that ran past the slice made an exit that never was.
                    if !exit.is_synchronous() {
                        at = at.next();
                    }
                    exit = Exit::Slice;
                    machine.load(&parts)?;
                }
                Step::TakeState => {
                    if let Some(state) = machine.state(at, exit)? {
                        inputs.state_taken(state)?;
                    }
                }
                Step::PutState(part) => {
                    let stands = machine.take_state(&part)?;
                    (at, exit) = stands.unwrap_or((at, exit));
                    inputs.state_put(&part, stands.map(|(at, _)| (at, machine.board().now_ns())));
                }
                Step::Again => {}
                Step::Proceed => break,
                Step::Stop(cause) => {
                    return Ok(Ending { cause, at, at_exit: exit.is_synchronous() });
                }
            }
        }
        if !exit.is_synchronous() && mode != RunMode::Unrecorded {
            continue;
        }
        let ended = machine.handle(at, exit)?;
        for output in machine.take_outputs() {
            let digest = machine.digest_output(at, &output);
            outputs.emit(at, digest, output)?;
        }
        match ended {
            Handled::GoesOn => {}
            Handled::Restarts => machine.restart(at)?,
            Handled::Ended(cause) => {
                return Ok(Ending { cause, at, at_exit: exit.is_synchronous() });
            }
        }
        machine.deliver_interrupt()?;
    }
}
