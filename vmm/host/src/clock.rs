//! The host's clocks: the only place where host time is read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ftvmm_replication::HostNs;
use nix::time::{ClockId, clock_gettime};

/// A host clock that starts at zero and never goes back.
#[derive(Clone, Copy, Debug)]
pub struct HostClock {
    clock: ClockId,
    start_ns: u64,
}

impl HostClock {
    /// A clock that reads zero now and stands still while the host is suspended.
    pub fn host_start() -> Self {
        Self::start_on(ClockId::CLOCK_MONOTONIC)
    }

    /// A clock that reads zero now and also counts while the host is suspended.
    pub fn host_start_with_suspension() -> Self {
        Self::start_on(ClockId::CLOCK_BOOTTIME)
    }

    fn start_on(clock: ClockId) -> Self {
        Self { clock, start_ns: read_ns(clock) }
    }

    /// What it shows now.
    pub fn host_now(&self) -> HostNs {
        HostNs(self.host_now_ns())
    }

    /// [`Self::host_now`] as plain nanoseconds since the start.
    pub fn host_now_ns(&self) -> u64 {
        read_ns(self.clock) - self.start_ns
    }
}

/// Not `std::time::Instant`, whose checked arithmetic is too slow for a clock that is read several
/// times per exit. The kernel answers for both clocks without a system call (vdso(7)).
fn read_ns(clock: ClockId) -> u64 {
    #[allow(clippy::disallowed_methods, reason = "this module is where host time is read")]
    #[allow(clippy::expect_used, reason = "clock_gettime(2): only a clock that is not there fails")]
    let now = clock_gettime(clock).expect("Linux has these clocks");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Seconds since the Unix epoch, for the guest's real-time clock at power-on; logged in the
/// recording's header.
#[allow(clippy::disallowed_methods, reason = "this module is where host time is read")]
pub fn host_unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Nanoseconds of processor time that this process has had (clock_gettime(2),
/// `CLOCK_PROCESS_CPUTIME_ID`).
pub fn host_cpu_ns() -> u64 {
    read_ns(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// The processor's time-stamp counter, for a profile: a clock that costs one instruction.
pub fn host_ticks() -> u64 {
    // SAFETY: RDTSC is part of x86-64 and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Holds the calling thread for so long.
pub fn sleep_ms(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}
