//! What an option may be, where it is one of a few words.

use clap::ValueEnum;
use ftvmm_replication::{OnPanic, OnReset, TscMode};
use ftvmm_runtime::input::OnRecordError;

/// The role of a host at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RoleArg {
    /// Without a backup
    Solo,
    /// Runs the guest and streams its log
    Primary,
    /// Replays the primary's guest
    Backup,
    /// What the witness says: joins the host that has the guest, or waits for the other to join
    Auto,
}

/// What user mode's RDTSC and RDTSCP do; the kernel's always read guest time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tsc {
    /// Read guest time in nanoseconds
    Trap,
    /// Fault, as where a system keeps the counter from its users
    Hide,
}

impl From<Tsc> for TscMode {
    fn from(tsc: Tsc) -> Self {
        match tsc {
            Tsc::Trap => Self::Trap,
            Tsc::Hide => Self::Hide,
        }
    }
}

/// What a reset by the guest leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ResetPolicy {
    /// The machine goes back to power-on; the run goes on, protected and recorded as before
    Restart,
    /// The run ends
    End,
}

impl From<ResetPolicy> for OnReset {
    fn from(policy: ResetPolicy) -> Self {
        match policy {
            ResetPolicy::Restart => Self::Restart,
            ResetPolicy::End => Self::End,
        }
    }
}

/// What a panic of the guest's kernel leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PanicPolicy {
    /// The run ends with status 1
    End,
    /// The machine goes back to power-on
    Restart,
    /// Nothing happens; the guest does what its kernel is configured to do
    Ignore,
}

impl From<PanicPolicy> for OnPanic {
    fn from(policy: PanicPolicy) -> Self {
        match policy {
            PanicPolicy::End => Self::End,
            PanicPolicy::Restart => Self::Restart,
            PanicPolicy::Ignore => Self::Ignore,
        }
    }
}

/// When a frame may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Release {
    /// When both sides sent the same
    Compare,
    /// When the backup has the log up to the frame (VMware FT's output rule)
    Ack,
}

/// What to do after a divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnDivergence {
    /// The primary is believed and goes on alone
    Failover,
    /// Both stop
    Halt,
    /// One side's state replaces the other's, and the two go on; frames are held meanwhile
    Resync,
}

/// What a broken way to the guest's clients leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnLinkDown {
    /// The hosts change roles
    Switch,
    /// Nothing: a line in the log and in the status
    Ignore,
}

/// Whose execution a resync keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Believe {
    /// It took the inputs and spoke to the client; the backup is the copy
    Primary,
    /// For a primary whose host is the more suspect one
    Backup,
}

/// What happens when a recording cannot be written any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RecordError {
    /// The guest goes on, unrecorded; the run ends with status 1
    Continue,
    /// The guest stops
    Stop,
}

impl From<RecordError> for OnRecordError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Continue => Self::Continue,
            RecordError::Stop => Self::Stop,
        }
    }
}

/// What a failure of the primary's disk leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnDiskError {
    /// The guest gets an I/O error, on both hosts
    Report,
    /// This host leaves and the other one goes on
    Failover,
}
