//! The options of containment (decision 0034).

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// What a system call leads to that a thread has no use for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Seccomp {
    /// The process ends with status 148 and the number of the call
    #[default]
    On,
    /// The kernel logs it, and the call is made
    Log,
    /// Nothing
    Off,
}

/// Whether files are confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Landlock {
    /// To the folders that the command line names
    #[default]
    On,
    /// No
    Off,
}

/// The options.
#[derive(Clone, Debug, Args)]
pub struct ContainArgs {
    /// What a system call leads to that a thread has no use for
    #[arg(long, value_enum, default_value_t = Seccomp::On)]
    pub seccomp: Seccomp,
    /// Confine files to the folders that this command line names
    #[arg(long, value_enum, default_value_t = Landlock::On)]
    pub landlock: Landlock,
    /// Folder into which snapshots go [default: the folder of --control]
    #[arg(long, value_name = "DIR", requires = "control")]
    pub snapshot_dir: Option<PathBuf>,
    /// Become this user, for ever, before anything is opened
    #[arg(long, value_name = "NAME|UID[:GROUP]")]
    pub user: Option<String>,
    /// Make this folder the root of all paths, before anything is opened
    #[arg(long, value_name = "DIR")]
    pub chroot: Option<PathBuf>,
}
