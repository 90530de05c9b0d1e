//! A timeout for a reader or file that takes bytes, however slowly.

use std::time::Duration;

use super::clock::HostClock;

/// A timeout that starts again whenever more bytes have been written.
pub struct ProgressTimeout {
    clock: HostClock,
    timeout: Duration,
    written_bytes: u64,
    progress_ns: u64,
}

impl ProgressTimeout {
    /// Waits from now on, when so much is written.
    pub fn new(timeout: Duration, written_bytes: u64) -> Self {
        let clock = HostClock::host_start();
        Self { clock, timeout, written_bytes, progress_ns: clock.host_now_ns() }
    }

    /// The time left when so many bytes are written now; `None` when the timeout is over. A wake-up
    /// alone does not restart it.
    pub fn left(&mut self, written_bytes: u64) -> Option<Duration> {
        let now_ns = self.clock.host_now_ns();
        if written_bytes != self.written_bytes {
            (self.written_bytes, self.progress_ns) = (written_bytes, now_ns);
        }
        let passed = Duration::from_nanos(now_ns.saturating_sub(self.progress_ns));
        self.timeout.checked_sub(passed).filter(|left| !left.is_zero())
    }
}
