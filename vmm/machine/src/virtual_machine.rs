//! What the run loop needs of a machine. `machine::Machine` is the one on KVM; tests have
//! another.

use ftvmm_devices::{Input, Output};
use ftvmm_replication::{
    Check, End, EndReason, MemoryCheckMode, Ordinal, OutputDigest, Slice, StatePart,
};
use thiserror::Error;

use crate::boot::BootError;
use crate::cpu::CpuError;
use crate::exit::Exit;
use crate::machine_state::{MachineState, StateError};
use crate::page_tracker::LoadError;
use crate::situation::{RunMode, RunSituation, StopCause};

/// What an exit leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// The guest goes on.
    GoesOn,
    /// The machine is to go back to power-on ([`VirtualMachine::restart`]).
    Restarts,
    /// The guest has ended.
    Ended(StopCause),
}

/// Why a machine cannot go back to power-on.
#[derive(Debug, Error)]
pub enum RestartError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] CpuError),
    /// What was loaded before cannot be loaded again.
    #[error("after the guest's reset: {0}")]
    Boot(#[from] BootError),
}

/// One guest, as the run loop sees it.
pub trait VirtualMachine {
    /// Runs the guest to its next exit, or as far as `mode` allows.
    ///
    /// # Errors
    /// When KVM fails.
    fn run(&mut self, mode: RunMode) -> Result<Exit, CpuError>;

    /// Whether an interrupt waits that the guest could not take where it stood.
    fn interrupt_waits(&self) -> bool;

    /// Where the guest stands after `exit`; `at` is the last exit ordinal.
    ///
    /// # Errors
    /// When KVM fails.
    fn situation(&mut self, at: Ordinal, exit: Exit) -> Result<RunSituation, CpuError>;

    /// Applies an input.
    fn apply(&mut self, input: Input);

    /// What a replay must agree with, here.
    ///
    /// # Errors
    /// When KVM fails.
    fn measure(&mut self, memory: MemoryCheckMode) -> Result<Check, CpuError>;

    /// The state of a guest that was stopped between two exits, as the parts of a slice.
    ///
    /// # Errors
    /// When KVM fails.
    fn capture(&mut self) -> Result<Vec<Slice>, CpuError>;

    /// Puts the guest into the state of a slice, wherever it stands since the last exit.
    ///
    /// # Errors
    /// When KVM fails or the slice is none of this guest.
    fn load(&mut self, parts: &[Slice]) -> Result<(), LoadError>;

    /// The whole machine as it stands at `exit` `at`; `None` when that leaves something to
    /// complete, and for a guest whose memory is not tracked.
    ///
    /// # Errors
    /// When KVM fails.
    fn save(&mut self, at: Ordinal, exit: Exit) -> Result<Option<MachineState>, CpuError>;

    /// Puts a part of a state in place, whatever the guest was doing; after the last one, where the
    /// guest stands.
    ///
    /// # Errors
    /// When KVM fails or the state does not belong to this guest.
    fn restore(&mut self, part: &StatePart) -> Result<Option<(Ordinal, Exit)>, StateError>;

    /// Guest time, in nanoseconds since power-on.
    fn now_ns(&self) -> u64;

    /// Answers an exit.
    ///
    /// # Errors
    /// When KVM fails.
    fn handle(&mut self, at: Ordinal, exit: Exit) -> Result<Handled, CpuError>;

    /// What the guest sent since the last call.
    fn take_outputs(&mut self) -> Vec<Output>;

    /// Adds an output of exit `at` to the digests; for a frame of a logged guest, its own digest.
    fn digest_output(&mut self, at: Ordinal, output: &Output) -> Option<OutputDigest>;

    /// Goes back to power-on, at exit `at`. What the guest has sent must have been taken.
    ///
    /// # Errors
    /// When KVM refuses.
    fn restart(&mut self, at: Ordinal) -> Result<(), RestartError>;

    /// Hands the guest its most urgent interrupt if it can take one here.
    ///
    /// # Errors
    /// When KVM fails.
    fn deliver_interrupt(&mut self) -> Result<(), CpuError>;

    /// How the guest ends where it stands, for `reason`.
    ///
    /// # Errors
    /// When KVM fails.
    fn end(&self, reason: EndReason) -> Result<End, CpuError>;
}
