//! The host's clocks: the only place where host time is read.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A host clock that starts at zero and never goes back.
#[derive(Clone, Copy, Debug)]
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock that reads zero now.
    #[allow(clippy::disallowed_methods, reason = "this module is where host time is read")]
    pub fn host_start() -> Self {
        Self { start: Instant::now() }
    }

    /// Nanoseconds since the start.
    pub fn host_now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

/// Seconds since the Unix epoch, for the guest's real-time clock at power-on; logged in the recording's header.
#[allow(clippy::disallowed_methods, reason = "this module is where host time is read")]
pub fn host_unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
