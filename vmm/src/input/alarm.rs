//! The timer that interrupts a running guest.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{Expiration, TimerFd};

/// Interrupts a running guest when its timer is due, or long overdue where the run is recorded.
pub struct Alarm {
    timer: Arc<TimerFd>,
    set_for_ns: Option<u64>,
}

impl Alarm {
    /// An alarm that fires `timer`; whoever waits for the timer calls [`super::LiveQueue::alarm`].
    pub fn new(timer: Arc<TimerFd>) -> Self {
        Self { timer, set_for_ns: None }
    }

    /// Both times on one clock. An alarm that is set for a time to come is left alone.
    pub(super) fn set(&mut self, at_ns: Option<u64>, now_ns: u64) {
        if self.set_for_ns == at_ns && at_ns.is_none_or(|at| at > now_ns) {
            return;
        }
        self.set_for_ns = at_ns;
        let delay = |at: u64| Duration::from_nanos(at.saturating_sub(now_ns).max(1));
        set_timer(&self.timer, at_ns.map(|at| once_after(delay(at))));
    }
}

pub(super) fn once_after(delay: Duration) -> Expiration {
    Expiration::OneShot(TimeSpec::from(delay))
}

pub(super) fn set_timer(timer: &TimerFd, expiration: Option<Expiration>) {
    let answer = match expiration {
        Some(expiration) => timer.set(expiration, TimerSetTimeFlags::empty()),
        None => timer.unset(),
    };
    if let Err(error) = answer {
        tracing::error!(%error, "a timer cannot be set");
    }
}
