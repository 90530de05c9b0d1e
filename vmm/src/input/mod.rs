//! Where inputs come from: the live host, the live host with a log beside it, or a log.

mod alarm;
mod file_log;
mod live;
mod live_queue;
mod patience;
mod pulse;
mod recorded;
mod replay;
mod restored;
mod tick_hold;

use std::path::PathBuf;

use thiserror::Error;

pub use alarm::Alarm;
pub use file_log::{FileLog, FinishedLog, OnRecordError, SLICE_GROUP_BYTES};
pub use live::{GuestClock, LiveInputs};
pub use live_queue::LiveQueue;
pub use patience::InputDelays;
pub use pulse::{Look, Pulse, PulseWatch, Resting};
pub use recorded::{CheckPlan, LogSink, Recorded};
pub use replay::LogInputs;
pub use restored::Restored;

use crate::kvm::Kicker;
use crate::sync;

/// Why a source or a sink cannot go on.
#[derive(Debug, Error)]
pub enum InputError {
    /// This guest did not do what the recorded one did.
    #[error("divergence at exit {at}: {what}")]
    Divergence {
        /// The exit ordinal.
        at: u64,
        /// Recorded and seen.
        what: String,
    },
    /// The log cannot be written.
    #[error("recording '{path}' cannot be written on after exit {at}: {source}", path = path.display())]
    LogWrite {
        /// The file.
        path: PathBuf,
        /// The last exit the guest has left.
        at: u64,
        /// The cause.
        source: ftvmm_replication::LogError,
    },
    /// The log cannot be read.
    #[error("{source}")]
    LogRead {
        /// The cause.
        #[source]
        source: ftvmm_replication::LogError,
    },
    /// The snapshot cannot be read.
    #[error("{source}")]
    SnapshotRead {
        /// The cause.
        #[source]
        source: ftvmm_replication::SnapshotError,
    },
    /// The log's groups do not follow each other.
    #[error("the log is out of order: {source}")]
    LogOrder {
        /// The cause.
        source: ftvmm_replication::CursorError,
    },
    /// The host gives no random bytes.
    #[error("the host gives no random bytes: {source}")]
    Entropy {
        /// The cause.
        source: getrandom::Error,
    },
    /// The disk cannot be read for a state.
    #[error("the disk cannot be copied: {source}")]
    Disk {
        /// The cause.
        source: std::io::Error,
    },
    /// The network card's host side failed.
    #[error("the tap cannot be written: {source}")]
    Tap {
        /// The cause.
        source: std::io::Error,
    },
}
