//! Why a session cannot go on.

use std::path::PathBuf;

use crate::guest_run::GuestRunError;

/// Why a session cannot go on. A case that came out different is no error.
#[derive(Debug, thiserror::Error)]
pub enum StressError {
    /// The lab failed.
    #[error(transparent)]
    Guest(#[from] GuestRunError),
    /// The script of a case did not run on the host.
    #[error("the host could not run a case: {said}")]
    Script {
        /// What it said.
        said: String,
    },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An instruction of a bare guest cannot be encoded.
    #[error("a bare guest cannot be assembled: {0}")]
    Assembly(#[from] iced_x86::IcedError),
}
