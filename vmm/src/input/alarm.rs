//! The timer that interrupts a running guest.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::timerfd::TimerFd;

use crate::host::set_timer;

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
        let after = at_ns.map(|at| Duration::from_nanos(at.saturating_sub(now_ns)));
        set_timer(&self.timer, after);
    }
}
