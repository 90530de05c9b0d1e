//! What can be asked of a running ftvmm.

use std::net::SocketAddr;
use std::path::Path;

use ftvmm_machine::net_watch::NetworkReport;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::transfer::{SaveError, Saved};

/// Answers for the run. Called from several threads at once; only what is said to may block.
pub trait Operator: Send + Sync {
    /// How the run is. Never waits for the guest.
    fn status(&self) -> Status;

    /// Accepts a backup at this address. Answers when the address is listened on.
    ///
    /// # Errors
    /// [`Refused`] where no backup can be accepted.
    fn attach(&self, _listen: SocketAddr) -> Result<(), Refused> {
        Err(Refused::not_now("this guest takes no backup"))
    }

    /// Lets the backup go; the guest goes on unprotected. Blocks until it does.
    ///
    /// # Errors
    /// [`Refused`] where there is no backup to let go.
    fn detach(&self) -> Result<(), Refused> {
        Err(Refused::not_now("this guest has no backup"))
    }

    /// The two hosts change roles. Blocks until they have.
    ///
    /// # Errors
    /// [`Refused`] where there is no backup that follows.
    fn switch(&self) -> Result<(), Refused> {
        Err(Refused::not_now("this guest has no backup to change roles with"))
    }

    /// Writes the guest's state to a new file in the folder for snapshots; the guest goes on.
    /// Blocks until the file is complete.
    ///
    /// # Errors
    /// [`Refused`] where the guest has no state yet, or the file cannot be written.
    fn snapshot(&self, _path: &Path) -> Result<SnapshotSummary, Refused> {
        Err(Refused::not_now("this guest's state cannot be saved"))
    }

    /// Sends the guest a non-maskable interrupt. Answers at once.
    ///
    /// # Errors
    /// [`Refused`] where another host is active.
    fn nmi(&self) -> Result<(), Refused> {
        Err(Refused::not_now("this guest takes no interrupt"))
    }

    /// Ends the run in good order, as SIGTERM does: a guest that listens to its power button has
    /// its grace. Asked again, the guest ends at its next exit. Answers at once.
    ///
    /// # Errors
    /// [`Refused`] where the run cannot be ended.
    fn stop(&self) -> Result<(), Refused>;
}

/// Why something is not done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// The run is not where it could be.
    #[error("not possible now: {why}")]
    NotNow {
        /// What is in the way.
        why: String,
    },
    /// An argument cannot be used.
    #[error("{why}")]
    BadArgument {
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// It was begun and failed; the guest is as before.
    #[error("{why}")]
    Failed {
        /// The cause.
        why: String,
    },
}

impl From<SaveError> for Refused {
    fn from(error: SaveError) -> Self {
        let why = error.to_string();
        match error {
            SaveError::Exists { .. }
            | SaveError::Elsewhere { .. }
            | SaveError::Open(_)
            | SaveError::Create { .. } => Self::BadArgument { why },
            SaveError::Busy => Self::NotNow { why },
            SaveError::NotStopped | SaveError::Write { .. } => Self::Failed { why },
        }
    }
}

impl From<Saved> for SnapshotSummary {
    fn from(saved: Saved) -> Self {
        Self { exit: saved.at.0, bytes: saved.bytes }
    }
}

impl Refused {
    /// The run is not where it could be.
    pub fn not_now(why: impl Into<String>) -> Self {
        Self::NotNow { why: why.into() }
    }
}

/// The part this host plays now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlRole {
    /// The guest was started without any protection.
    #[default]
    Solo,
    /// This host is active.
    Primary,
    /// This host follows the other.
    Backup,
}

/// Whether both hosts see the same witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlWitness {
    /// Each has found the last number that the other has written there.
    Common,
    /// One has not. A backup does not take over then.
    Apart,
}

impl ControlWitness {
    /// What the last proof comes to.
    #[must_use]
    pub fn of(is_common: bool) -> Self {
        if is_common { Self::Common } else { Self::Apart }
    }
}

/// How the run is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// The part this host plays now.
    pub role: ControlRole,
    /// The session's state by its name in docs/protocol.md; `Running` for a guest without one.
    pub state: String,
    /// True while the death of the active host would cost nothing.
    pub protected: bool,
    /// True while this host may send the guest's frames: it is alone in its term, or within the
    /// lease of its backup. False on a primary that was away, until it knows whether it still is
    /// the primary.
    #[serde(default)]
    pub transmits: bool,
    /// The term in which this host is active, or follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<u64>,
    /// The other host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    /// Where a backup may connect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Ordinal of the guest's last exit.
    pub exit: u64,
    /// For how long this host has held the guest's processor, in milliseconds, while it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck_ms: Option<u64>,
    /// Frames the guest sent.
    pub outputs: u64,
    /// What became of the frames for the guest and of its own.
    pub network: NetworkReport,
    /// Bytes of log written, sent or received.
    pub log_bytes: u64,
    /// Exits the backup was sent and has not executed, as far as this host knows.
    pub lag_exits: u64,
    /// Divergences found.
    pub divergences: u64,
    /// Take-overs by this host.
    pub takeovers: u64,
    /// How long the last take-over by this host took, from giving the peer up to the first live
    /// exit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takeover_us: Option<u64>,
    /// The way from this host to the guest's clients: `up`, or what is broken. Absent for a guest
    /// without a card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Whether the other host's is whole, as it says, while it is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_link_up: Option<bool>,
    /// Whether both hosts see the same witness, from the first proof of the last connection on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<ControlWitness>,
    /// Bytes the guest printed that nobody read in time: this host dropped them and let the guest
    /// go on.
    pub console_dropped_bytes: u64,
    /// Since this ftvmm was started, in milliseconds.
    pub uptime_ms: u64,
    /// The backup that is being attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attach: Option<AttachProgress>,
    /// The last backup that was attached to this host, or this host as the last backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_attach: Option<AttachSummary>,
}

/// How far the transfer to a new backup is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachProgress {
    /// What is being sent, in a word.
    pub phase: String,
    /// Iteration of pre-copy, from 1.
    pub round: u32,
    /// Bytes sent or received so far.
    pub bytes: u64,
    /// Bytes it will be, as far as is known now.
    pub total_bytes: u64,
    /// Rate.
    pub bytes_per_second: u64,
}

/// How a transfer went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachSummary {
    /// From the connection to protection, in milliseconds.
    pub duration_ms: u64,
    /// How long the guest stood still, in microseconds.
    pub stopped_us: u64,
    /// What one copy of all its memory takes on this host, in microseconds, from a sample.
    pub memory_copy_us: u64,
    /// Bytes sent or received.
    pub bytes: u64,
    /// Iterations of pre-copy.
    pub rounds: u32,
}

/// What a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSummary {
    /// Ordinal of the exit at which it was taken.
    pub exit: u64,
    /// Length of the file.
    pub bytes: u64,
}
