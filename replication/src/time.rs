//! Points on the two clocks there are, the host's and the guest's.
//!
//! Each has a type of its own, so that a time of one is never compared with a time of the other,
//! nor subtracted from it. [`GuestClock`] alone converts. Spans are the same on both clocks and are
//! plain nanoseconds. Nothing here reads a clock.

use core::time::Duration;

/// A point on the host's clock, in nanoseconds since that clock began.
///
/// ```compile_fail
/// use ftvmm_replication::{GuestNs, HostNs};
/// let _ = HostNs(1) < GuestNs(2);
/// ```
/// ```compile_fail
/// use ftvmm_replication::{GuestNs, HostNs};
/// let _ = HostNs(2).since_ns(GuestNs(1));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostNs(pub u64);

/// A point in guest time, in nanoseconds since power-on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestNs(pub u64);

macro_rules! point_in_time {
    ($point:ident) => {
        impl $point {
            /// Nanoseconds from `earlier` to this point; 0 when that is later.
            #[must_use]
            pub fn since_ns(self, earlier: Self) -> u64 {
                self.0.saturating_sub(earlier.0)
            }

            /// The time from `earlier` to this point; none when that is later.
            #[must_use]
            pub fn since(self, earlier: Self) -> Duration {
                Duration::from_nanos(self.since_ns(earlier))
            }

            /// The point that is `span_ns` later, or the last one there is.
            #[must_use]
            pub fn saturating_add_ns(self, span_ns: u64) -> Self {
                Self(self.0.saturating_add(span_ns))
            }

            /// The point that is `span_ns` earlier, or the clock's beginning.
            #[must_use]
            pub fn saturating_sub_ns(self, span_ns: u64) -> Self {
                Self(self.0.saturating_sub(span_ns))
            }
        }
    };
}

point_in_time!(HostNs);
point_in_time!(GuestNs);

/// Guest time as a function of host time: `host + offset`.
#[derive(Clone, Copy, Debug)]
pub struct GuestClock {
    offset_ns: i64,
}

impl GuestClock {
    /// A clock that shows `guest` when the host's shows `host`.
    #[must_use]
    pub fn anchored(host: HostNs, guest: GuestNs) -> Self {
        Self { offset_ns: guest.0.wrapping_sub(host.0) as i64 }
    }

    /// What this clock shows when the host's shows `host`.
    #[must_use]
    pub fn guest_at(self, host: HostNs) -> GuestNs {
        GuestNs(host.0.saturating_add_signed(self.offset_ns))
    }

    /// What the host's clock shows when this one shows `guest`; 0 for what is before it began.
    #[must_use]
    pub fn host_at(self, guest: GuestNs) -> HostNs {
        HostNs(guest.0.saturating_add_signed(self.offset_ns.saturating_neg()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_guest_clock_keeps_the_host_clocks_pace(
            host in 0..1u64 << 62,
            guest in 0..1u64 << 62,
            span_ns in 0..1u64 << 62,
        ) {
            let clock = GuestClock::anchored(HostNs(host), GuestNs(guest));
            prop_assert_eq!(clock.guest_at(HostNs(host)), GuestNs(guest));
            prop_assert_eq!(clock.guest_at(HostNs(host + span_ns)), GuestNs(guest + span_ns));
            prop_assert_eq!(clock.host_at(GuestNs(guest + span_ns)), HostNs(host + span_ns));
        }
    }

    #[test]
    fn no_time_is_before_its_clock_or_after_its_end() {
        let ahead = GuestClock::anchored(HostNs(0), GuestNs(7));
        assert_eq!(ahead.host_at(GuestNs(6)), HostNs(0));
        let behind = GuestClock::anchored(HostNs(7), GuestNs(0));
        assert_eq!(behind.guest_at(HostNs(6)), GuestNs(0));
        assert_eq!(HostNs(3).since_ns(HostNs(4)), 0);
        assert_eq!(HostNs(4).since(HostNs(1)), Duration::from_nanos(3));
        assert_eq!(GuestNs(3).saturating_sub_ns(4), GuestNs(0));
        assert_eq!(GuestNs(u64::MAX).saturating_add_ns(1), GuestNs(u64::MAX));
    }
}
