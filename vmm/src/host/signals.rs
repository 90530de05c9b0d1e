//! SIGINT, SIGTERM and SIGHUP, on a thread of their own: whatever else hangs, they are heard.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SigSet, Signal};

use super::StopLimit;
use super::events::HostEventsError;

/// Whether who started this process had the signal ignored.
fn is_ignored(signal: Signal) -> bool {
    // SAFETY: sigaction is plain data for which all zeroes is valid; without a new action the call only writes the old one.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        let answer = libc::sigaction(signal as i32, std::ptr::null(), &mut old);
        answer == 0 && old.sa_sigaction == libc::SIG_IGN
    }
}

/// SIGINT, SIGTERM and SIGHUP, taken over.
pub struct BlockedSignals(SigSet);

impl BlockedSignals {
    /// Takes the signals over; to be called before the first thread starts, which inherits the mask. A terminal
    /// that belongs to another program then answers with an error where it would stop this one.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn block() -> Result<Self, HostEventsError> {
        let mut ours = SigSet::empty();
        ours.add(Signal::SIGINT);
        ours.add(Signal::SIGTERM);
        // A run under nohup goes on when its terminal is gone.
        if !is_ignored(Signal::SIGHUP) {
            ours.add(Signal::SIGHUP);
        }
        let mut blocked = ours;
        blocked.add(Signal::SIGTTIN);
        blocked.add(Signal::SIGTTOU);
        blocked.thread_block().map_err(std::io::Error::from)?;
        Ok(Self(ours))
    }

    /// Calls `stop` when one comes, after which the run may take `longest`, on a thread of its own, for it may wait for a lock whose holder hangs. One that comes
    /// when the run has been told to end, or while `stop` hangs, ends the process at once.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn on_signal(
        self,
        limit: Arc<StopLimit>,
        longest: Duration,
        stop: impl Fn() + Send + Sync + 'static,
    ) -> Result<(), HostEventsError> {
        let (stop, hangs) = (Arc::new(stop), Arc::new(AtomicBool::new(false)));
        let wait = move || {
            while let Ok(signal) = self.0.wait() {
                if limit.is_ordered() || hangs.swap(true, Ordering::AcqRel) {
                    limit.now(&format!("{signal} came once more"));
                }
                tracing::info!(%signal, "the run is told to end");
                limit.within(longest, "the stop");
                let (stop, hangs) = (Arc::clone(&stop), Arc::clone(&hangs));
                let called = move || {
                    stop();
                    hangs.store(false, Ordering::Release);
                };
                if let Err(error) = std::thread::Builder::new().name("stop".into()).spawn(called) {
                    tracing::error!(%error, "no thread to stop the run; ask again to end at once");
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait)?;
        Ok(())
    }
}
