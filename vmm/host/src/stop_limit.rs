//! Ends the process when its orderly end takes too long.
//!
//! A thread may hang in a system call: a file on a dead server, a device that does not answer. A
//! thread cannot be ended from outside, so the process is ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::clock::HostClock;
use super::console::restore_terminal;
use super::stderr::{finish_stderr, say};
use crate::contain::Thread;
use crate::sync::{Condvar, Mutex, lock, wait, wait_timeout};

/// Longest time from the order to stop until the guest stands still.
pub const STOP_LONGEST: Duration = Duration::from_secs(15);
/// Exit status of a run that failed (docs/options.md).
const FAILED: i32 = 1;

struct Limit {
    until_ns: u64,
    what: &'static str,
}

/// Ends the process when the time is over that a stop may take.
pub struct StopLimit {
    clock: HostClock,
    limit: Mutex<Option<Limit>>,
    /// Deadline of the work after the guest stands still, also when a stop is ordered meanwhile; 0
    /// before that.
    ends_until_ns: AtomicU64,
    changed: Condvar,
    ordered: AtomicBool,
}

impl StopLimit {
    /// Nothing has been ordered yet.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let this = Arc::new(Self {
            clock: HostClock::host_start(),
            limit: Mutex::default(),
            ends_until_ns: AtomicU64::new(0),
            changed: Condvar::new(),
            ordered: AtomicBool::new(false),
        });
        let watch = Arc::clone(&this);
        Thread::StopLimit.start(move || watch.wait())?;
        Ok(this)
    }

    /// Ends the process after `longest`, unless it has ended by then; `what` says what it waited
    /// for. An earlier limit stays.
    pub fn within(&self, longest: Duration, what: &'static str) {
        let until_ns = self.clock.host_now_ns().saturating_add(longest.as_nanos() as u64);
        let until_ns = until_ns.max(self.ends_until_ns.load(Ordering::Acquire));
        let mut limit = lock(&self.limit);
        if limit.as_ref().is_none_or(|limit| until_ns < limit.until_ns) {
            *limit = Some(Limit { until_ns, what });
            self.changed.notify_all();
        }
    }

    /// The run has been ordered to end. From now on one more signal ends the process at once.
    pub fn order(&self) {
        self.ordered.store(true, Ordering::Release);
        self.within(STOP_LONGEST, "the guest's thread to stop");
    }

    /// Whether the run has been told to end.
    pub fn is_ordered(&self) -> bool {
        self.ordered.load(Ordering::Acquire)
    }

    /// A run got so far in its end; what comes next may take `longest` where a stop was ordered, or
    /// will be.
    pub fn goes_on(&self, longest: Duration, what: &'static str) {
        let until_ns = self.clock.host_now_ns().saturating_add(longest.as_nanos() as u64);
        self.ends_until_ns.store(until_ns, Ordering::Release);
        let mut limit = lock(&self.limit);
        if let Some(limit) = &mut *limit {
            *limit = Limit { until_ns, what };
            self.changed.notify_all();
        }
    }

    /// Ends the process here and now.
    pub fn now(&self, why: &str) -> ! {
        restore_terminal();
        say(&format!("ftvmm: ended at once: {why}"));
        finish_stderr();
        // SAFETY: _exit has no preconditions. Not exit(3): what runs at exit could wait for the
        // thread that hangs.
        unsafe { libc::_exit(FAILED) }
    }

    fn wait(&self) {
        let mut limit = lock(&self.limit);
        loop {
            let Some(Limit { until_ns, what }) = &*limit else {
                limit = wait(&self.changed, limit);
                continue;
            };
            let left_ns = until_ns.saturating_sub(self.clock.host_now_ns());
            if left_ns == 0 {
                let why = format!("{what} took too long");
                drop(limit);
                self.now(&why);
            }
            let left = Duration::from_nanos(left_ns);
            limit = wait_timeout(&self.changed, limit, left);
        }
    }
}
