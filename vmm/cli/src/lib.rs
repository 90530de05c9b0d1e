//! The `ftvmm` command: from arguments to an exit status.

// These macros panic when standard output or standard error is closed.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod again;
mod args;
mod channel_arg;
mod choices;
mod contain;
mod contain_args;
mod control;
mod diff;
mod disassembly;
mod disk;
mod disk_arg;
pub mod doctor;
mod from_header;
pub mod guest;
mod guest_source;
mod live_host;
mod logs;
mod net_arg;
mod outcome;
mod pair;
mod print;
mod progress_bar;
mod recording;
mod replay;
mod replay_start;
pub mod report;
mod roles;
mod run;
mod solo;
mod start;
mod witness;
mod witness_arg;
mod written;

use std::backtrace::BacktraceStatus;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use ftvmm_host::channel::key_file;
use ftvmm_host::disk::DiskError;
use ftvmm_host::profile;
use ftvmm_host::user_file::FileError;
use ftvmm_host::{
    HostEventsError, StandardError, TapError, finish_stderr, restore_terminal, say, spool_stderr,
};
use ftvmm_kvm::KvmError;
use ftvmm_machine::CpuError;
use ftvmm_runtime::control::ControlError;
use ftvmm_runtime::input::InputError;
use ftvmm_runtime::run_loop::RunError;
use ftvmm_runtime::snapshot::SnapshotUnusable;
use thiserror::Error;

use crate::guest::GuestError;

pub use args::{Cli, Command, OnDivergence, Release, RoleArg};

/// Exit statuses (decision 0024).
mod status {
    pub const FAILED: u8 = 1;
    pub const BAD_USAGE: u8 = 2;
    pub const DIVERGENCE: u8 = 3;
    pub const LOST_WITNESS: u8 = 4;
}

/// Everything that ends the command with a message.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The guest cannot be made.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The tap cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The host's events cannot be had.
    #[error(transparent)]
    Events(#[from] HostEventsError),
    /// The run failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A file cannot be opened, or would be lost.
    #[error(transparent)]
    Named(#[from] FileError),
    /// A file cannot be used.
    #[error("{what} '{path}': {cause}", path = path.display())]
    File {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: std::io::Error,
    },
    /// The host lacks something.
    #[error("the host refuses a {what}: {cause}")]
    Host {
        /// What it is.
        what: &'static str,
        /// The cause.
        cause: std::io::Error,
    },
    /// The control socket cannot be served.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A recording cannot be used.
    #[error("recording '{path}': {why}", path = path.display())]
    Recording {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// A snapshot cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotUnusable),
    /// A replay diverged.
    #[error("divergence: {0}")]
    Divergence(String),
    /// The guest ended badly.
    #[error("{0}")]
    GuestFailed(String),
    /// No ftvmm answers at a control socket.
    #[error("{0}")]
    Unanswered(String),
    /// The peer or the way to it failed.
    #[error("{0}")]
    Peer(String),
    /// The two sides are configured differently, or an address cannot be used.
    #[error("{0}")]
    Configuration(String),
    /// A guest would not run here as it should.
    #[error("this host is not suitable")]
    Unsuitable,
    /// Another host holds the right to be live.
    #[error("{0}")]
    LostWitness(String),
}

impl From<CpuError> for CommandError {
    fn from(error: CpuError) -> Self {
        Self::Run(error.into())
    }
}

impl From<InputError> for CommandError {
    fn from(error: InputError) -> Self {
        Self::Run(error.into())
    }
}

impl CommandError {
    fn status(&self) -> u8 {
        match self {
            Self::Guest(GuestError::Kvm(KvmError::Cpu(
                CpuError::Call { .. } | CpuError::UnknownExit { .. },
            )))
            | Self::Events(_)
            | Self::Control(ControlError::Thread(_))
            | Self::Host { .. }
            | Self::Peer(_)
            | Self::Unanswered(_)
            | Self::Unsuitable
            | Self::GuestFailed(_) => status::FAILED,
            Self::Run(RunError::Input(InputError::Divergence { .. })) | Self::Divergence(_) => {
                status::DIVERGENCE
            }
            // A damaged recording is refused alike, whether it is found before or under way.
            Self::Run(RunError::Input(
                InputError::LogRead { .. }
                | InputError::LogOrder { .. }
                | InputError::SnapshotRead { .. },
            )) => status::BAD_USAGE,
            Self::Run(_) => status::FAILED,
            Self::Guest(_)
            | Self::Disk(_)
            | Self::Tap(_)
            | Self::File { .. }
            | Self::Named(_)
            | Self::Control(ControlError::Socket { .. })
            | Self::Recording { .. }
            | Self::Snapshot(_)
            | Self::Configuration(_) => status::BAD_USAGE,
            Self::LostWitness(_) => status::LOST_WITNESS,
        }
    }
}

/// Reads the command line, does what it says, and answers with the exit status.
pub fn main() -> ExitCode {
    let parsed = Cli::command().try_get_matches().and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches)?;
        if cli.command.is_none() {
            roles::check(&matches, &cli.run)?;
        }
        Ok(cli)
    });
    let cli = match parsed {
        Ok(cli) => cli,
        Err(answer) if answer.use_stderr() => return usage(&answer),
        Err(answer) => return answered(print::print(answer.render())),
    };
    // Before the first thread: what is taken on now holds for all of them.
    if cli.command.is_none()
        && let Err(error) = contain::begin(&cli.run)
    {
        return answered(Err(error));
    }
    begin_profile(&cli);
    start_logging();
    abort_on_panic();
    let result = match cli.command {
        None => start::start(&cli.run),
        Some(Command::Replay(args)) => replay::replay(&args),
        Some(Command::Log(command)) => logs::logs(&command),
        Some(Command::Doctor(args)) => doctor(args.json),
        Some(Command::Keygen(args)) => key_file::make(&args.file)
            .map_err(|error| CommandError::Configuration(error.to_string())),
        Some(Command::Profile(args)) => control::profile(&args),
        Some(Command::Status(args)) => control::status(&args),
        Some(Command::Attach(args)) => control::attach(&args),
        Some(Command::Detach(args)) => control::bare(&args, "/detach"),
        Some(Command::Switch(args)) => control::bare(&args, "/switch"),
        Some(Command::Snapshot(args)) => control::snapshot(&args),
        Some(Command::Nmi(args)) => control::bare(&args, "/nmi"),
        Some(Command::Stop(args)) => control::bare(&args, "/stop"),
    };
    answered(result)
}

/// Before the first thread: each begins with a phase.
fn begin_profile(cli: &Cli) {
    let written = match &cli.command {
        None => &cli.run.written,
        Some(Command::Replay(args)) => &args.written,
        Some(_) => return,
    };
    if written.profile.is_some() {
        profile::begin();
    }
}

/// Prints what went wrong and returns the exit status.
fn answered(result: Result<(), CommandError>) -> ExitCode {
    let status = match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // `doctor` has already printed it.
            if !matches!(error, CommandError::Unsuitable) {
                say(&format!("ftvmm: {error}"));
            }
            ExitCode::from(error.status())
        }
    };
    finish_stderr();
    status
}

/// What is wrong with the arguments is one line like every other error.
fn usage(answer: &clap::Error) -> ExitCode {
    let text = answer.to_string();
    // clap's first paragraph says what is wrong; usage and hints follow.
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    let what = words.join(" ");
    say(&format!("ftvmm: {}; see 'ftvmm --help'", what.trim_start_matches("error: ")));
    ExitCode::from(status::BAD_USAGE)
}

/// A broken invariant must end the process whatever thread finds it: a frame released after it is
/// worse than a host lost.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(move |info| {
        restore_terminal();
        let thread = std::thread::current();
        let trace = std::backtrace::Backtrace::capture();
        let trace = match trace.status() {
            BacktraceStatus::Captured => format!("\n{trace}"),
            _ => String::new(),
        };
        say(&format!("thread '{}' {info}{trace}", thread.name().unwrap_or("unnamed")));
        // Waits only a short time, because the reader may have stopped.
        finish_stderr();
        std::process::abort();
    }));
}

fn start_logging() {
    if let Err(error) = spool_stderr() {
        say(&format!(
            "ftvmm: standard error is not buffered; a blocked reader can stop the guest: {error}"
        ));
    }
    let filter = tracing_subscriber::EnvFilter::try_from_env("FTVMM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
    tracing_subscriber::fmt()
        .with_ansi(colours)
        .with_env_filter(filter)
        .with_writer(|| StandardError)
        .init();
}

fn doctor(json: bool) -> Result<(), CommandError> {
    let diagnosis = crate::doctor::examine();
    if json {
        print::print_line(serde_json::to_string(&diagnosis).unwrap_or_default())?;
    } else {
        print::print_line(&diagnosis)?;
    }
    if diagnosis.suitable { Ok(()) } else { Err(CommandError::Unsuitable) }
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> CommandError {
    move |cause| CommandError::Host { what, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_its_exit_status() {
        let io = || std::io::Error::other("x");
        let damaged =
            InputError::SnapshotRead { cause: ftvmm_replication::SnapshotError::Read(io()) };
        let unknown_exit = CpuError::UnknownExit { reason: 17, suberror: 0, rip: 0 };
        for (error, status) in [
            (CommandError::from(InputError::Divergence { at: 1, what: "x".into() }), 3),
            (CommandError::Divergence("x".into()), 3),
            (damaged.into(), 2),
            (CpuError::NoXsave { xcr0: 7 }.into(), 1),
            (CommandError::Guest(GuestError::MemorySize { got: 1 }), 2),
            (CommandError::Guest(KvmError::Absent.into()), 2),
            (CommandError::Guest(CpuError::Call { call: "KVM_RUN", cause: io() }.into()), 1),
            (CommandError::Guest(unknown_exit.into()), 1),
            (CommandError::Guest(CpuError::NoXsave { xcr0: 7 }.into()), 2),
            (host("thing")(io()), 1),
            (CommandError::Configuration("x".into()), 2),
            (CommandError::LostWitness("x".into()), 4),
            (CommandError::Unsuitable, 1),
        ] {
            assert_eq!(error.status(), status, "{error}");
        }
    }
}
