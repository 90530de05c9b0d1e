//! Where the guest stands, how far it may run, and why it ends.

use ftvmm_replication::Ordinal;

/// Where the guest stands and what it would take; all an input source may know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunSituation {
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
    /// The guest's timer owes it ticks: they come one at a time, so it falls behind while they
    /// wait.
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

/// How far the guest may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunMode {
    /// To its next exit, or until it is kicked.
    Free,
    /// As [`Self::Free`], and at most to where it can take an interrupt.
    UntilInterruptible,
    /// Do not run: the log says that a slice comes next.
    Not,
    /// Freely: nothing is recorded, so inputs and interrupts also reach the guest between exits.
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
    /// The replication protocol ended the run.
    Protocol,
}
