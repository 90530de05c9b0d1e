//! The timer that interrupts a running guest: when it is to fire, and the timer itself.

use std::sync::Arc;
use std::time::Duration;

use ftvmm_host::set_timer;
use ftvmm_replication::GuestNs;
use nix::sys::timerfd::TimerFd;

use super::sampling::SAMPLE_NS;

/// Interrupts a running guest when its timer is due, or long overdue where the run is recorded.
pub struct GuestTimer {
    timer: Arc<TimerFd>,
}

impl GuestTimer {
    /// For `timer`; the thread that waits for it calls [`super::InputQueue::timer_due`].
    pub fn new(timer: Arc<TimerFd>) -> Self {
        Self { timer }
    }

    pub(super) fn set(&self, setting: Setting) {
        set_timer(&self.timer, setting.after);
    }
}

/// How the timer is to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// It fires after so long; `None` stops it.
    pub(super) after: Option<Duration>,
}

/// Decides when the timer fires. The caller sets it as [`Self::take_setting`] says.
#[derive(Debug, Default)]
pub(super) struct TimerPlan {
    set_for: Option<GuestNs>,
    /// When the guest has had its time to switch itself off; fires then at the latest.
    grace_until: Option<GuestNs>,
    setting: Option<Setting>,
}

impl TimerPlan {
    /// Fires at `at`, and when the guest's grace is over. A timer that is set for a time to come
    /// is left alone.
    pub(super) fn set(&mut self, at: Option<GuestNs>, now: GuestNs) {
        let grace = self.grace_until.filter(|until| *until > now);
        // Samples are whole microseconds: at an earlier one the timer would not be due yet.
        let at =
            at.into_iter().chain(grace).min().map(|at| GuestNs(at.0.next_multiple_of(SAMPLE_NS)));
        if self.set_for == at && at.is_none_or(|at| at > now) {
            return;
        }
        self.set_for = at;
        self.setting = Some(Setting { after: at.map(|at| at.since(now)) });
    }

    /// The guest has until then to switch itself off; for ever with `None`.
    pub(super) fn give_grace(&mut self, until: Option<GuestNs>) {
        self.grace_until = until;
    }

    /// What the caller has to do to the timer, once.
    pub(super) fn take_setting(&mut self) -> Option<Setting> {
        self.setting.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1000;

    fn setting_of(plan: &mut TimerPlan, at_ns: Option<u64>, now_ns: u64) -> Option<Option<u64>> {
        plan.set(at_ns.map(GuestNs), GuestNs(now_ns));
        plan.take_setting().map(|setting| setting.after.map(|after| after.as_nanos() as u64))
    }

    #[test]
    fn the_timer_is_touched_only_when_something_changes() {
        let mut plan = TimerPlan::default();
        assert_eq!(setting_of(&mut plan, None, 0), None);
        assert_eq!(setting_of(&mut plan, Some(5 * US), US), Some(Some(4 * US)));
        assert_eq!(setting_of(&mut plan, Some(5 * US), 2 * US), None, "to come");
        assert_eq!(setting_of(&mut plan, Some(5 * US), 5 * US), Some(Some(0)), "it has fired");
        assert_eq!(setting_of(&mut plan, None, 5 * US), Some(None));
        assert_eq!(setting_of(&mut plan, None, 6 * US), None);
    }

    #[test]
    fn it_fires_where_a_sample_shows_the_time() {
        let mut plan = TimerPlan::default();
        assert_eq!(setting_of(&mut plan, Some(4 * US + 1), 0), Some(Some(5 * US)));
    }

    #[test]
    fn it_fires_at_the_end_of_the_grace_at_the_latest() {
        let mut plan = TimerPlan::default();
        plan.give_grace(Some(GuestNs(7 * US)));
        assert_eq!(setting_of(&mut plan, None, 0), Some(Some(7 * US)));
        assert_eq!(setting_of(&mut plan, Some(9 * US), 0), None);
        assert_eq!(setting_of(&mut plan, Some(3 * US), 0), Some(Some(3 * US)));
        assert_eq!(setting_of(&mut plan, Some(9 * US), 7 * US), Some(Some(2 * US)), "it is over");
        plan.give_grace(None);
        assert_eq!(setting_of(&mut plan, None, 0), Some(None));
    }
}
