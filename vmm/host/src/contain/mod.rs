//! Containment (decision 0034): each thread has a filter of system calls, and the process reaches
//! only the files it still needs.
//!
//! A thread is started under its rules ([`Thread::start`]), and the main thread puts itself under
//! its own when set-up is over ([`try_enter`]). Until [`configure`] says otherwise, nothing is
//! contained: tools and tests are not.

pub mod calls;
mod filter;
mod identity;
mod paths;
mod violation;

use std::cell::Cell;
use std::io::Write;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use landlock::RulesetCreated;
use thiserror::Error;

pub use calls::Thread;
pub use identity::{IdentityError, User, change_root, make_devices};
pub use paths::{Reach, landlock_here};

/// What a refused system call leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The process ends.
    On,
    /// The kernel logs it.
    Log,
    /// There are no filters.
    #[default]
    Off,
}

/// Why a process cannot be contained.
#[derive(Debug, Error)]
pub enum ContainError {
    /// seccomp refuses.
    #[error("thread '{thread}' cannot have its seccomp filter: {cause}")]
    Filter {
        /// Whose filter.
        thread: &'static str,
        /// What the library or the kernel said.
        cause: seccompiler::Error,
    },
    /// Landlock refuses.
    #[error("Landlock refuses its rules: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The rules cannot be handed on.
    #[error("Landlock's rules cannot be handed to a thread: {0}")]
    Rules(std::io::Error),
    /// The handler cannot be installed.
    #[error("SIGSYS cannot be handled: {0}")]
    Handler(#[from] nix::Error),
}

struct Contained {
    mode: Mode,
    rules: Option<RulesetCreated>,
}

static CONTAINED: OnceLock<Contained> = OnceLock::new();

thread_local! {
    /// Landlock holds for this thread, by its own doing or its parent's: a thread inherits it
    /// (Documentation/userspace-api/landlock.rst, "Inheritance"). The rules are handed over by a
    /// descriptor, and a host that has none left must still start a thread that claims a term.
    static IS_CONFINED: Cell<bool> = const { Cell::new(false) };
}

/// Says how the threads of this process are contained that are started from now on. To be
/// called once, before the first thread is started.
///
/// # Errors
/// When the kernel refuses.
pub fn configure(mode: Mode, reach: Option<&Reach>) -> Result<(), ContainError> {
    if mode == Mode::On {
        violation::report_violations()?;
    }
    let rules = reach.map(paths::rules).transpose()?;
    let _ = CONTAINED.set(Contained { mode, rules });
    Ok(())
}

/// Puts the calling thread under the rules of `thread`, for ever.
///
/// # Errors
/// When the kernel refuses.
pub fn try_enter(thread: Thread) -> Result<(), ContainError> {
    let Some(Contained { mode, rules }) = CONTAINED.get() else { return Ok(()) };
    if let Some(rules) = rules
        && !IS_CONFINED.get()
    {
        let status = rules.try_clone().map_err(ContainError::Rules)?.restrict_self()?;
        if thread == Thread::Vcpu && !paths::enforced(status.ruleset) {
            tracing::warn!("this kernel has no Landlock; files are not confined");
        }
        IS_CONFINED.set(true);
    }
    if *mode == Mode::Off {
        return Ok(());
    }
    violation::name_thread(thread.name())?;
    let failed = |cause| ContainError::Filter { thread: thread.name(), cause };
    let [allowed, absent] = filter::programs(thread, *mode).map_err(failed)?;
    // The second needs seccomp(2) again, which not every thread has afterwards.
    seccompiler::apply_filter(&absent).map_err(failed)?;
    seccompiler::apply_filter(&allowed).map_err(failed)
}

impl Thread {
    /// Starts this thread: under its name and its rules.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::io::Result<JoinHandle<T>> {
        let is_confined = IS_CONFINED.get();
        #[allow(clippy::disallowed_methods, reason = "the one place where threads are started")]
        std::thread::Builder::new().name(self.name().into()).spawn(move || {
            IS_CONFINED.set(is_confined);
            enter(self);
            work()
        })
    }
}

/// As [`try_enter`]; a thread that cannot be contained ends the process.
fn enter(thread: Thread) {
    if let Err(error) = try_enter(thread) {
        let _ = writeln!(std::io::stderr(), "ftvmm: {error}");
        std::process::abort();
    }
}
