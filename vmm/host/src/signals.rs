//! SIGINT, SIGTERM and SIGHUP, received on a thread of their own, so that they work whatever else
//! hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SigSet, Signal};

use super::StopLimit;
use super::events::HostEventsError;
use crate::contain::Thread;

/// Whether the signal was ignored when this process started.
fn is_ignored(signal: Signal) -> bool {
    // SAFETY: sigaction is plain data for which all zeroes is valid; without a new action the call
    // only writes the old one.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        let answer = libc::sigaction(signal as i32, std::ptr::null(), &mut old);
        answer == 0 && old.sa_sigaction == libc::SIG_IGN
    }
}

/// Whether a signal to stop has come before.
#[derive(Default)]
struct Asker {
    has_asked: bool,
}

impl Asker {
    /// Whether this signal means that the end under way takes too long. The first one never does:
    /// the run may be ending for a reason of its own (its guest switched itself off, another
    /// host won the term), with a report to write.
    fn is_impatient(&mut self, is_ending: bool) -> bool {
        std::mem::replace(&mut self.has_asked, true) && is_ending
    }
}

/// SIGINT, SIGTERM and SIGHUP, taken over.
pub struct BlockedSignals(SigSet);

impl BlockedSignals {
    /// Takes the signals over; to be called before the first thread starts, which inherits the
    /// mask. A terminal that belongs to another program then answers with an error where it
    /// would stop this one.
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

    /// Calls `stop` when one comes, after which the run may take `longest`, on a thread of its own,
    /// for it may wait for a lock whose holder hangs. A later one that comes when the run has
    /// been told to end, or while `stop` hangs, ends the process at once.
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
        let mut asker = Asker::default();
        let wait = move || {
            while let Ok(signal) = self.0.wait() {
                if asker.is_impatient(limit.is_ordered() || hangs.load(Ordering::Acquire)) {
                    limit.now(&format!("{signal} came once more"));
                }
                hangs.store(true, Ordering::Release);
                tracing::info!(%signal, "the run is told to end");
                limit.within(longest, "the stop");
                let (stop, hangs) = (Arc::clone(&stop), Arc::clone(&hangs));
                let called = move || {
                    stop();
                    hangs.store(false, Ordering::Release);
                };
                if let Err(error) = Thread::Stop.start(called) {
                    tracing::error!(%error, "no thread to stop the run; ask again to end at once");
                }
            }
        };
        Thread::Signals.start(wait)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_ends_by_itself_may_finish_when_it_is_asked_to_end() {
        let mut asker = Asker::default();
        assert!(!asker.is_impatient(true));
        assert!(asker.is_impatient(true));
    }

    #[test]
    fn asking_again_is_impatient_when_the_run_was_told_to_end() {
        let mut asker = Asker::default();
        // The guest's power button; then the end; then at once.
        assert!(!asker.is_impatient(false));
        assert!(!asker.is_impatient(false));
        assert!(asker.is_impatient(true));
    }
}
