//! The host's clocks: the only place where host time is read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ftvmm_replication::HostNs;
use nix::time::{ClockId, clock_gettime};

/// A host clock that starts at zero and never goes back.
#[derive(Clone, Copy, Debug)]
pub struct HostClock {
    start_ns: u64,
}

impl HostClock {
    /// A clock that reads zero now.
    pub fn host_start() -> Self {
        Self { start_ns: monotonic_ns() }
    }

    /// What it shows now.
    pub fn host_now(&self) -> HostNs {
        HostNs(self.host_now_ns())
    }

    /// [`Self::host_now`] as plain nanoseconds since the start.
    pub fn host_now_ns(&self) -> u64 {
        monotonic_ns() - self.start_ns
    }
}

/// The clock of `std::time::Instant`, whose own checked arithmetic is too slow for a clock that is
/// read several times per exit.
fn monotonic_ns() -> u64 {
    #[allow(clippy::disallowed_methods, reason = "this module is where host time is read")]
    #[allow(clippy::expect_used, reason = "clock_gettime(2): only a clock that is not there fails")]
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has CLOCK_MONOTONIC");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Seconds since the Unix epoch, for the guest's real-time clock at power-on; logged in the
/// recording's header.
#[allow(clippy::disallowed_methods, reason = "this module is where host time is read")]
pub fn host_unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Holds the calling thread for so long.
pub fn sleep_ms(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}
