//! Why inputs or outputs cannot go on.

use std::path::PathBuf;

use thiserror::Error;

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
    #[error("recording '{path}' cannot be written on after exit {at}: \
             {cause}", path = path.display())]
    LogWrite {
        /// The file.
        path: PathBuf,
        /// The last exit the guest has left.
        at: u64,
        /// The cause.
        cause: ftvmm_replication::LogError,
    },
    /// The log cannot be read.
    #[error("{cause}")]
    LogRead {
        /// The cause.
        cause: ftvmm_replication::LogError,
    },
    /// The snapshot cannot be read.
    #[error("{cause}")]
    SnapshotRead {
        /// The cause.
        cause: ftvmm_replication::SnapshotError,
    },
    /// The log's groups do not follow each other.
    #[error("the log is out of order: {cause}")]
    LogOrder {
        /// The cause.
        cause: ftvmm_replication::CursorError,
    },
    /// The host gives no random bytes.
    #[error("the host gives no random bytes: {cause}")]
    Entropy {
        /// The cause.
        cause: getrandom::Error,
    },
    /// The disk cannot be read for a state.
    #[error("the disk cannot be copied: {cause}")]
    Disk {
        /// The cause.
        cause: std::io::Error,
    },
    /// The network card's host side failed.
    #[error("the tap cannot be written: {cause}")]
    Tap {
        /// The cause.
        cause: std::io::Error,
    },
}
