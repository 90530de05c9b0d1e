//! What the run loop and its neighbours say to each other: where the guest stands, what is to be
//! done there, what came of it, and why a run ends.

use ftvmm_devices::{Input, Output};
use ftvmm_machine::machine_state::MachineState;
use ftvmm_machine::situation::{RunMode, RunSituation, StopCause};
use ftvmm_replication::{
    Check, EndReason, MemoryCheckMode, Ordinal, OutputDigest, Slice, StatePart,
};

use crate::input_error::InputError;

/// What to do at an exit.
#[derive(Debug)]
pub enum Step {
    /// Apply this, then ask again.
    Apply(Input),
    /// Measure the execution, answer with [`Answer::Measured`], then ask again.
    Measure {
        /// What to do about memory.
        memory: MemoryCheckMode,
    },
    /// Between two exits: make this point an exit ordinal of its own and answer with its state,
    /// [`Answer::Captured`]; then ask again, for inputs.
    Capture,
    /// Put the guest into the state of this slice, which is the next exit ordinal; then ask again.
    Load(Vec<Slice>),
    /// Answer with the whole machine as it stands here, [`Answer::Saved`]; then ask again. Only at
    /// an exit that leaves nothing to complete: a slice, or a halted guest.
    SaveState,
    /// Put this part of a state in place, answer with [`Answer::Restored`], then ask again. After
    /// the last part the guest stands where it says.
    RestoreState(StatePart),
    /// Ask again.
    Again,
    /// There is no more for this exit.
    Proceed,
    /// End the run here, before the exit is answered.
    Stop(StopCause),
}

/// What came of a [`Step`] that asks for something.
pub enum Answer {
    /// Of [`Step::Measure`].
    Measured {
        /// The exit at which the guest stands.
        at: Ordinal,
        /// What was measured.
        check: Check,
    },
    /// Of [`Step::Capture`].
    Captured {
        /// The slice's ordinal.
        at: Ordinal,
        /// Its parts.
        parts: Vec<Slice>,
    },
    /// Of [`Step::SaveState`].
    Saved(Box<MachineState>),
    /// Of [`Step::RestoreState`].
    Restored {
        /// What is in place now.
        part: StatePart,
        /// After the last part: where the guest stands.
        stands: Option<Standpoint>,
    },
}

/// Where a guest stands whose state was restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standpoint {
    /// The exit ordinal.
    pub at: Ordinal,
    /// Guest time, in nanoseconds since power-on.
    pub guest_ns: u64,
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
    /// The next thing to do in this situation. May block: while the guest is halted, and while it
    /// is not yet known what happens at this exit.
    ///
    /// # Errors
    /// When the source is broken, or its inputs do not fit this guest (a divergence).
    fn next(&mut self, situation: &RunSituation) -> Result<Step, InputError>;

    /// Takes what came of the last step, when that asked for something.
    ///
    /// # Errors
    /// When it is not what a recording says (a divergence), or it cannot go where it is to go.
    fn answer(&mut self, answer: Answer) -> Result<(), InputError>;

    /// The guest leaves exit `at`; how far may it run? `interrupt_waits` says that the guest could
    /// not take an interrupt here that is pending.
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
