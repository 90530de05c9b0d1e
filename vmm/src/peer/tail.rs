//! When what a guest has left behind is sent. While it makes exits, its own thread sends; a timer looks every now and then
//! whether something was left for long, as when the guest goes computing, and sends only then.

use std::time::Duration;

/// Where sending is expensive, it takes at most one part in so many of the guest's time, unless [`LONGEST`] asks for more.
const SEND_SHARE: u64 = 10;
/// Bounds of [`longest`].
const SHORTEST: Duration = Duration::from_millis(2);
const LONGEST: Duration = Duration::from_millis(5);

/// Pause between two messages, in nanoseconds, where one costs so much.
pub fn pause_ns(send_cost_ns: u64) -> u64 {
    send_cost_ns.saturating_mul(SEND_SHARE)
}

/// How long the end of a burst of exits may stay unsent: longer than the guest's own thread lets it while it makes exits and
/// [`pause_ns`] is below [`LONGEST`].
pub fn longest(send_cost_ns: u64) -> Duration {
    Duration::from_nanos(pause_ns(send_cost_ns).saturating_mul(2)).clamp(SHORTEST, LONGEST)
}

/// How long what has been unsent since then may still be; `None` when its time is over, or no exit was left since the last
/// message. The guest's thread may have sent what the timer was set for, and gone on.
pub fn left(unsent_since_ns: Option<u64>, send_cost_ns: u64, now_ns: u64) -> Option<Duration> {
    let waited = Duration::from_nanos(now_ns.saturating_sub(unsent_since_ns?));
    longest(send_cost_ns).checked_sub(waited).filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;
    const MS: u64 = 1_000_000;

    #[test]
    fn the_timer_gives_the_guests_thread_its_time_within_bounds() {
        let table = [(0, 2), (5 * US, 2), (200 * US, 4), (MS, 5), (u64::MAX, 5)];
        for (cost_ns, wanted_ms) in table {
            assert_eq!(longest(cost_ns), Duration::from_millis(wanted_ms), "{cost_ns}");
        }
    }

    #[test]
    fn the_timer_sends_only_what_has_waited_its_time() {
        let left = |since_ns, now_ns| left(since_ns, 200 * US, now_ns);
        assert_eq!(left(None, 9 * MS), None);
        assert_eq!(left(Some(4 * MS), 5 * MS), Some(Duration::from_millis(3)));
        assert_eq!(left(Some(4 * MS), 8 * MS), None);
        assert_eq!(left(Some(4 * MS), 99 * MS), None);
    }
}
