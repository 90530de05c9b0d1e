//! When a recorded guest that makes no exit is stopped for a slice.

use ftvmm_machine::situation::{RunMode, RunSituation};
use ftvmm_replication::GuestNs;

use crate::input::guest_timer::TimerPlan;
use crate::input::slice_pacing::{InputDelays, Requester, SlicePacing};

/// What the policy waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest's next exit, or the end of an input's waiting time.
    Running,
    /// An input is overdue, but the guest cannot take an interrupt: it is stopped as soon as it
    /// can.
    WaitingForWindow {
        /// Since when something from outside waits for that.
        blocked_since: Option<GuestNs>,
    },
    /// The guest stands at a slice.
    InSlice { began: GuestNs },
}

/// Facts about a guest that was stopped between two exits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped {
    pub(super) now: GuestNs,
    /// Something from outside has waited its time.
    pub(super) arrived: bool,
    /// The run is to end, which needs no interrupt.
    pub(super) ends: bool,
    pub(super) takes_interrupt: bool,
    /// When the guest's timer is due by the clock.
    pub(super) tick: Option<GuestNs>,
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct SlicePolicy {
    phase: Phase,
    pacing: SlicePacing,
    /// Since when an interrupt waits that the guest could not take at its last exit, and its
    /// possible source.
    interrupt_since: Option<(GuestNs, Requester)>,
    /// Something came from outside, and no exit since then was without a waiting interrupt.
    gave_input: bool,
    /// The guest is behind with its timer's ticks.
    owes_ticks: bool,
    /// No client can have asked the guest for anything, and it has not come to user mode.
    booting: bool,
}

impl SlicePolicy {
    pub(super) fn new(delays: InputDelays) -> Self {
        Self {
            phase: Phase::Running,
            pacing: SlicePacing::new(delays),
            interrupt_since: None,
            gave_input: false,
            owes_ticks: false,
            booting: true,
        }
    }

    /// The clock has been replaced; times of the one before are void.
    pub(super) fn resume(&mut self) {
        self.interrupt_since = None;
        if let Phase::WaitingForWindow { blocked_since } = &mut self.phase {
            *blocked_since = None;
        }
        self.pacing.rest_no_more();
    }

    /// Notes what depends on where the guest stands.
    pub(super) fn see(&mut self, situation: &RunSituation) {
        self.booting &= situation.booting;
        self.owes_ticks = situation.owes_ticks;
    }

    /// The guest stands where it takes inputs.
    pub(super) fn reach_exit(&mut self) {
        if matches!(self.phase, Phase::WaitingForWindow { .. }) {
            self.phase = Phase::Running;
        }
    }

    /// The guest was given something from outside.
    pub(super) fn gives_input(&mut self) {
        self.gave_input = true;
    }

    pub(super) fn is_in_slice(&self) -> bool {
        matches!(self.phase, Phase::InSlice { .. })
    }

    /// Longest wait of what comes from outside.
    pub(super) fn inputs_ns(&self) -> u64 {
        self.pacing.inputs_ns()
    }

    /// A recorded guest was stopped between two exits: whether that point becomes a slice.
    pub(super) fn begins_slice(&mut self, stopped: Stopped, timer: &mut TimerPlan) -> bool {
        let Stopped { now, arrived, ends, takes_interrupt, tick } = stopped;
        let rested = arrived.then(|| self.pacing.no_slice_before(Requester::Input));
        let first = self.waits_end(tick).chain(rested).min();
        if first.is_none_or(|at| at > now) {
            timer.set(first, now);
            return false;
        }
        // The guest cannot take an interrupt here; run to the interrupt window first.
        if !takes_interrupt && !ends && !self.is_blocked_for_long(arrived, now, timer) {
            return false;
        }
        self.phase = Phase::InSlice { began: now };
        true
    }

    /// The guest cannot take an interrupt: whether it has had its time to, with something from
    /// outside waiting. It may be polling guest memory for exactly this frame, with interrupts
    /// disabled.
    fn is_blocked_for_long(&mut self, arrived: bool, now: GuestNs, timer: &mut TimerPlan) -> bool {
        let before = match self.phase {
            Phase::WaitingForWindow { blocked_since } => blocked_since,
            Phase::Running | Phase::InSlice { .. } => None,
        };
        if !arrived {
            self.phase = Phase::WaitingForWindow { blocked_since: before };
            return false;
        }
        let since = before.unwrap_or(now);
        self.phase = Phase::WaitingForWindow { blocked_since: Some(since) };
        let until = since.saturating_add_ns(self.pacing.inputs_ns() / 2);
        timer.set(Some(until), now);
        until <= now
    }

    /// When the guest has had its time to make an exit for its timer, due at `tick`, and to take
    /// the interrupt that waits.
    fn waits_end(&self, tick: Option<GuestNs>) -> impl Iterator<Item = GuestNs> {
        let ends = |(since, whom)| {
            // With the longer delay, a guest that owes ticks could never catch up.
            let whom = if self.owes_ticks && !self.booting { Requester::Input } else { whom };
            self.pacing.ends(whom, since, self.booting)
        };
        tick.map(|at| (at, Requester::Tick)).into_iter().chain(self.interrupt_since).map(ends)
    }

    /// When a guest that goes on at `now` is to be interrupted although it makes no exit. For an
    /// interrupt that has waited its time it is stopped at its window.
    pub(super) fn timer_at(&self, tick: Option<GuestNs>, now: GuestNs) -> Option<GuestNs> {
        self.waits_end(tick).filter(|at| *at > now).min()
    }

    /// The guest goes on: how far may it run? `now` is asked at most once, and only after a slice
    /// or while an interrupt waits.
    pub(super) fn leave(
        &mut self,
        interrupt_waits: bool,
        is_unrecorded: bool,
        now: impl FnOnce() -> GuestNs,
        timer: &mut TimerPlan,
    ) -> RunMode {
        if is_unrecorded || !interrupt_waits {
            // Otherwise a timer for an input from before, while the run was recorded, would fire
            // again and again.
            self.interrupt_since = None;
            self.gave_input = false;
        }
        let left = match self.phase {
            Phase::InSlice { began } => Some(began),
            Phase::Running | Phase::WaitingForWindow { .. } => None,
        };
        let is_delayed = interrupt_waits && !is_unrecorded;
        if left.is_some() || is_delayed {
            let now = now();
            if let Some(began) = left {
                self.phase = Phase::Running;
                self.pacing.slice_ends(began, now);
            }
            if is_delayed {
                self.interrupt_waits(left.is_some(), now, timer);
            }
        }
        match self.phase {
            _ if is_unrecorded => RunMode::Unrecorded,
            Phase::WaitingForWindow { .. } => RunMode::UntilInterruptible,
            Phase::Running | Phase::InSlice { .. } => RunMode::Free,
        }
    }

    /// The guest goes on at `now` without having taken an interrupt.
    fn interrupt_waits(&mut self, leaves_slice: bool, now: GuestNs, timer: &mut TimerPlan) {
        if self.gave_input {
            // What a slice was made for has waited already.
            let waited_ns = if leaves_slice { self.pacing.inputs_ns() } else { 0 };
            let since = now.saturating_sub_ns(waited_ns);
            let known = self.interrupt_since.filter(|(_, whom)| *whom == Requester::Input);
            let since = known.map_or(since, |(known, _)| known.min(since));
            self.interrupt_since = Some((since, Requester::Input));
        }
        self.interrupt_since.get_or_insert((now, Requester::Tick));
        match self.waits_end(None).min() {
            Some(ends) if ends > now => timer.set(Some(ends), now),
            _ if matches!(self.phase, Phase::WaitingForWindow { .. }) => {}
            _ => self.phase = Phase::WaitingForWindow { blocked_since: None },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn ms(ms: u64) -> GuestNs {
        GuestNs(ms * MS)
    }

    /// The policy and the timer for a guest that is up.
    fn policy() -> (SlicePolicy, TimerPlan) {
        let mut policy = SlicePolicy::new(InputDelays::default());
        policy.see(&RunSituation::default());
        (policy, TimerPlan::default())
    }

    fn at(now: GuestNs) -> Stopped {
        Stopped { now, arrived: false, ends: false, takes_interrupt: true, tick: None }
    }

    fn after_us(timer: &mut TimerPlan) -> Option<u128> {
        timer.take_setting().and_then(|setting| setting.after).map(|after| after.as_micros())
    }

    #[test]
    fn a_slice_is_taken_when_what_waits_has_waited_its_time() {
        let now = ms(1000);
        let input = Stopped { arrived: true, ..at(now) };
        let tick = |at_ms| Stopped { tick: Some(ms(at_ms)), ..at(now) };
        let computes = |stopped| Stopped { takes_interrupt: false, ..stopped };
        // What there is; whether a slice is taken, and when to look again.
        let table = [
            (at(now), false, None),
            (input, true, None),
            (tick(995), true, None),
            (tick(996), false, Some(1_000)),
            (Stopped { arrived: true, ..tick(996) }, true, None),
            (computes(tick(995)), false, None),
            (computes(input), false, Some(2_500)),
            (Stopped { ends: true, ..computes(input) }, true, None),
        ];
        for (stopped, expected, again_us) in table {
            let (mut policy, mut timer) = policy();
            assert_eq!(policy.begins_slice(stopped, &mut timer), expected, "{stopped:?}");
            assert_eq!(after_us(&mut timer), again_us, "{stopped:?}");
            assert_eq!(policy.is_in_slice(), expected, "{stopped:?}");
        }
    }

    #[test]
    fn a_tick_of_a_guest_that_boots_waits_longer() {
        let (mut policy, mut timer) =
            (SlicePolicy::new(InputDelays::default()), TimerPlan::default());
        let overdue = Stopped { tick: Some(ms(901)), ..at(ms(1000)) };
        policy.see(&RunSituation { booting: true, owes_ticks: true, ..RunSituation::default() });
        assert!(!policy.begins_slice(overdue, &mut timer));
        assert_eq!(after_us(&mut timer), Some(1_000));
        policy.see(&RunSituation::default());
        assert!(policy.begins_slice(overdue, &mut timer));
        // It does not boot again.
        policy.see(&RunSituation { booting: true, ..RunSituation::default() });
        assert!(policy.begins_slice(overdue, &mut timer));
    }

    #[test]
    fn a_guest_that_never_takes_interrupts_is_stopped_for_an_input_all_the_same() {
        let (mut policy, mut timer) = policy();
        let blocked = |us: u64| Stopped {
            arrived: true,
            takes_interrupt: false,
            ..at(GuestNs(MS * 1000 + us * 1000))
        };
        let never = || panic!("needs no time");
        assert!(!policy.begins_slice(blocked(0), &mut timer));
        assert_eq!(policy.leave(false, false, never, &mut timer), RunMode::UntilInterruptible);
        assert!(!policy.begins_slice(blocked(2_499), &mut timer));
        assert!(policy.begins_slice(blocked(2_500), &mut timer));
        // An exit ends the wait.
        let (mut policy, mut timer) = self::policy();
        assert!(!policy.begins_slice(blocked(0), &mut timer));
        policy.reach_exit();
        assert_eq!(policy.leave(false, false, never, &mut timer), RunMode::Free);
        assert!(!policy.begins_slice(blocked(2_500), &mut timer));
    }

    #[test]
    fn a_guest_is_left_alone_after_a_slice() {
        let (mut policy, mut timer) = policy();
        assert!(policy.begins_slice(Stopped { arrived: true, ..at(ms(1000)) }, &mut timer));
        policy.reach_exit();
        assert!(policy.is_in_slice());
        assert_eq!(policy.leave(false, false, || ms(1001), &mut timer), RunMode::Free);
        assert!(!policy.is_in_slice());
        let input = |now| Stopped { arrived: true, ..at(ms(now)) };
        assert!(!policy.begins_slice(input(1002), &mut timer));
        assert_eq!(after_us(&mut timer), Some(1_000));
        assert!(policy.begins_slice(input(1003), &mut timer));
    }

    #[test]
    fn an_interrupt_the_guest_does_not_take_has_its_patience() {
        // After an input, at a slice that took 1 ms; how long it has.
        let table = [(false, false, 5), (true, false, 5), (true, true, 2), (false, true, 40)];
        for case in table {
            let (after_input, at_slice, patience_ms) = case;
            let (mut policy, mut timer) = policy();
            if at_slice {
                assert!(policy.begins_slice(Stopped { arrived: true, ..at(ms(999)) }, &mut timer));
            }
            if after_input {
                policy.gives_input();
            }
            let mode = policy.leave(true, false, || ms(1000), &mut timer);
            assert_eq!(mode, RunMode::Free, "{case:?}");
            assert_eq!(after_us(&mut timer), Some(u128::from(patience_ms * 1000)), "{case:?}");
            policy.reach_exit();
            let mode = policy.leave(true, false, || ms(1000 + patience_ms), &mut timer);
            assert_eq!(mode, RunMode::UntilInterruptible, "{case:?}");
            policy.reach_exit();
            let never = || panic!("needs no time");
            assert_eq!(policy.leave(false, false, never, &mut timer), RunMode::Free, "{case:?}");
        }
    }

    #[test]
    fn nobody_is_waited_for_where_nothing_is_recorded() {
        let (mut policy, mut timer) = policy();
        let never = || panic!("needs no time");
        assert_eq!(policy.leave(true, true, never, &mut timer), RunMode::Unrecorded);
        assert_eq!(timer.take_setting(), None);
        assert!(policy.begins_slice(Stopped { arrived: true, ..at(ms(1)) }, &mut timer));
        assert_eq!(policy.leave(true, true, || ms(2), &mut timer), RunMode::Unrecorded);
        assert!(!policy.is_in_slice(), "a survivor's slice ends too");
    }
}
