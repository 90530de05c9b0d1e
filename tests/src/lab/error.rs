//! What can go wrong in a lab.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::packages::PackageError;

/// Why the lab could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A package is missing and could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// Namespaces and taps are root's.
    #[error("the lab needs root: it makes network namespaces, bridges and taps")]
    NeedsRoot,
    /// The file system or the process table refused.
    #[error("{what}: {source}")]
    Io {
        /// A path or a program.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program that sets the lab up said no.
    #[error("`{command}` failed: {said}")]
    CommandFailed {
        /// What was run.
        command: String,
        /// Its standard error.
        said: String,
    },
    /// A file that the build should have made is not there.
    #[error("{} is not built; try: {command}", path.display())]
    NotBuilt {
        /// Where it was looked for.
        path: PathBuf,
        /// What makes it.
        command: &'static str,
    },
    /// A kernel module is not part of the kernel package.
    #[error("the lab kernel has no module {module}")]
    NoModule {
        /// Its name without path and suffix.
        module: String,
    },
    /// The host was killed, crashed or never came up.
    #[error("host {host} is gone while {doing}\n{tails}")]
    HostGone {
        /// Name of the host.
        host: String,
        /// What was waited for.
        doing: String,
        /// Last lines of every log of the lab.
        tails: String,
    },
    /// What only an emulated host can do.
    #[error("host {host} is this machine, which cannot be paused")]
    NotEmulated {
        /// Name of the host.
        host: String,
    },
    /// Nothing was heard from any host for too long.
    #[error("the lab fell silent for {silence:?} while {doing}\n{tails}")]
    Silent {
        /// The bound that was passed.
        silence: Duration,
        /// What was waited for.
        doing: String,
        /// Last lines of every log of the lab.
        tails: String,
    },
    /// The agent could not start the program.
    #[error("host {host} cannot run {program}: {reason}")]
    Refused {
        /// Name of the host.
        host: String,
        /// What should have run.
        program: String,
        /// What the host's system said.
        reason: String,
    },
    /// A command of the lab's own ended badly inside a host.
    #[error("on host {host}, {doing} failed: {said}")]
    HostCommandFailed {
        /// Name of the host.
        host: String,
        /// What was attempted.
        doing: String,
        /// What the command wrote.
        said: String,
    },
    /// `FTVMM_BACKEND` says something else than `lab` or `local`.
    #[error("FTVMM_BACKEND is {got:?}, expected \"lab\" or \"local\"")]
    UnknownBackend {
        /// What it says.
        got: String,
    },
    /// `ftvmm doctor --json` did not answer as agreed.
    #[error("cannot judge this machine: {reason}")]
    NoDiagnosis {
        /// What was wrong with the answer.
        reason: String,
    },
}

/// Attaches the path or program to a system error.
pub fn at(what: impl AsRef<Path>) -> impl FnOnce(io::Error) -> LabError {
    let what = what.as_ref().display().to_string();
    move |source| LabError::Io { what, source }
}
