//! How long to wait for somebody who takes bytes, however slowly.

use std::time::Duration;

use super::clock::HostClock;

/// A patience that begins anew with each sign of life: that more has been written.
pub struct ProgressTimeout {
    clock: HostClock,
    patience: Duration,
    written_bytes: u64,
    sign_ns: u64,
}

impl ProgressTimeout {
    /// Waits from now on, when so much is written.
    pub fn new(patience: Duration, written_bytes: u64) -> Self {
        let clock = HostClock::host_start();
        Self { clock, patience, written_bytes, sign_ns: clock.host_now_ns() }
    }

    /// How long still, when so much is written now; `None` when the patience is over. Being woken
    /// is no sign of life.
    pub fn left(&mut self, written_bytes: u64) -> Option<Duration> {
        let now_ns = self.clock.host_now_ns();
        if written_bytes != self.written_bytes {
            (self.written_bytes, self.sign_ns) = (written_bytes, now_ns);
        }
        let passed = Duration::from_nanos(now_ns.saturating_sub(self.sign_ns));
        self.patience.checked_sub(passed).filter(|left| !left.is_zero())
    }
}
