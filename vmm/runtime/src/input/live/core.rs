//! Decides which inputs a live guest gets, in which order, and how long it sleeps. Does no I/O: the
//! host's time and the arrived inputs are arguments, and [`Next`] tells the caller what to do.

use ftvmm_devices::Input;
use ftvmm_machine::disk_completion::Completion;
use ftvmm_machine::situation::{RunMode, RunSituation};
use ftvmm_replication::{GuestClock, GuestNs, HostNs, Ordinal};

use super::shutdown::{grace_until, mind_grace, mind_shutdown};
use super::slices::{SlicePolicy, Stopped};
use crate::input::guest_timer::{Setting, TimerPlan};
use crate::input::input_queue::{Pending, Shutdown, Urgency};
use crate::input::sampling::Sampler;
use crate::input::slice_pacing::InputDelays;
use crate::step::Step;

/// Random bytes per exit: more than Linux asks for at a time, little enough that no guest can flood
/// its log.
const ENTROPY_BYTES_MAX: u64 = 256;

/// What the caller does.
#[derive(Debug)]
pub(super) enum Next {
    /// Hand out this step.
    Step(Step),
    /// Give the guest so many random bytes.
    Entropy { bytes: u64 },
    /// Give the guest a new identity.
    NewIdentity,
    /// There is no more for this exit, which the guest leaves at `now`.
    Leave { now: HostNs },
    /// The guest sleeps: wait until something arrives, at most until then; then call
    /// [`LiveCore::wake`].
    Wait { until: Option<HostNs> },
}

/// The host as it is at a call.
pub(super) struct Host<'a> {
    pub(super) now: HostNs,
    /// Nothing is recorded: inputs reach the guest between exits too.
    pub(super) is_unrecorded: bool,
    pub(super) pending: &'a mut Pending,
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct LiveCore {
    sampler: Sampler,
    slices: SlicePolicy,
    timer: TimerPlan,
    /// The guest was restored and must get a new identity.
    identity_wanted: bool,
    sampled_at: Option<Ordinal>,
    entropy_at: Option<Ordinal>,
}

impl LiveCore {
    /// For a guest that has seen guest time up to `last`.
    pub(super) fn new(clock: GuestClock, last: GuestNs, delays: InputDelays) -> Self {
        Self {
            sampler: Sampler::new(clock, last),
            slices: SlicePolicy::new(delays),
            timer: TimerPlan::default(),
            identity_wanted: false,
            sampled_at: None,
            entropy_at: None,
        }
    }

    pub(super) fn renew_identity(&mut self) {
        self.identity_wanted = true;
    }

    /// Goes on with another clock, after the guest has seen guest time up to `last`.
    pub(super) fn resume(&mut self, clock: GuestClock, last: GuestNs) {
        self.sampler.resume(clock, last);
        self.slices.resume();
        self.timer.give_grace(None);
        self.timer.set(None, GuestNs(0));
    }

    /// How the caller has to set the timer, after each call of another method.
    pub(super) fn take_setting(&mut self) -> Option<Setting> {
        self.timer.take_setting()
    }

    /// The next thing to do in this situation.
    pub(super) fn next(&mut self, situation: &RunSituation, host: Host<'_>) -> Next {
        self.slices.see(situation);
        if situation.at.is_none() && !host.is_unrecorded {
            return Next::Step(self.between_exits(situation, host));
        }
        self.slices.reach_exit();
        self.at_exit(situation, host)
    }

    /// After [`Next::Wait`], in the same situation.
    pub(super) fn wake(&mut self, situation: &RunSituation, host: Host<'_>) -> Next {
        if situation.deadline_ns.is_none() {
            self.sampler.rests(host.now);
        }
        self.at_exit(situation, host)
    }

    /// The guest goes on: how far may it run? `now` is asked at most once.
    pub(super) fn leave(
        &mut self,
        interrupt_waits: bool,
        is_unrecorded: bool,
        now: impl FnOnce() -> HostNs,
    ) -> RunMode {
        let now = || self.sampler.now(now());
        self.slices.leave(interrupt_waits, is_unrecorded, now, &mut self.timer)
    }

    /// A recorded run was stopped between two exits: what now?
    fn between_exits(&mut self, situation: &RunSituation, host: Host<'_>) -> Step {
        let Host { now, pending, .. } = host;
        pending.deadline_passed |= mind_grace(pending, now);
        if let Some((cause, Urgency::Now)) = pending.stop {
            return Step::Stop(cause);
        }
        let arrived = pending.deadline_passed
            && (pending.stop.is_some()
                || pending.disk_completed()
                || pending.announce
                || !pending.console.is_empty()
                || !pending.signals.is_empty()
                || pending.shutdown == Shutdown::Wanted
                || (situation.takes_frames && !pending.frames.is_empty()));
        let stopped = Stopped {
            now: self.sampler.now(now),
            arrived,
            ends: pending.stop.is_some(),
            takes_interrupt: situation.takes_interrupt,
            tick: self.tick(situation),
        };
        match self.slices.begins_slice(stopped, &mut self.timer) {
            true => Step::Capture,
            false => Step::Proceed,
        }
    }

    /// Takes what waits, for an exit.
    fn at_exit(&mut self, situation: &RunSituation, host: Host<'_>) -> Next {
        let Host { now, is_unrecorded, pending } = host;
        if std::mem::take(&mut self.identity_wanted) {
            return Next::NewIdentity;
        }
        let times = (now, self.sampler.now(now));
        mind_shutdown(pending, situation.hears_power_button, &mut self.timer, times);
        if let Some((cause, _)) = pending.stop {
            return Next::Step(Step::Stop(cause));
        }
        let reading = self.sampler.read(situation, self.slices.is_in_slice(), now);
        if situation.reads_clock && self.sampled_at != situation.at {
            return self.sample(reading.now, situation, now);
        }
        if let Some(bytes) = self.entropy_bytes(situation) {
            return Next::Entropy { bytes };
        }
        if let Some(input) = take_arrived(pending, situation.takes_frames) {
            self.slices.gives_input();
            return Next::Step(Step::Apply(input));
        }
        pending.deadline_passed &= !pending.is_empty();
        // A guest that is far behind moves to a distant timer in steps, even if it reads no clock
        // in between.
        let steps_on = reading.is_behind
            && situation.deadline_ns.is_some()
            && self.slices.is_in_slice()
            && self.sampled_at != situation.at;
        // After what came from outside: its interrupt is to come before the tick's
        // (`Board::update_lines_and_outputs`).
        if (reading.is_due || steps_on) && reading.now > self.sampler.last() {
            return self.sample(reading.now, situation, now);
        }
        if !situation.halted {
            let timer_at = match reading.is_held {
                true => Some(reading.clock.saturating_add_ns(self.slices.inputs_ns())),
                false if is_unrecorded => self.tick(situation),
                false => self.slices.timer_at(self.tick(situation), reading.clock),
            };
            self.timer.set(timer_at, reading.clock);
            return Next::Leave { now: self.sampler.host_at(reading.clock) };
        }
        if std::mem::take(&mut pending.attention) {
            return Next::Step(Step::Again);
        }
        let until_due = |at| now.saturating_add_ns(GuestNs(at).since_ns(reading.now).max(1));
        let due = situation.deadline_ns.map(until_due);
        Next::Wait { until: due.into_iter().chain(grace_until(pending)).min() }
    }

    fn sample(&mut self, told: GuestNs, situation: &RunSituation, now: HostNs) -> Next {
        self.sampled_at = situation.at;
        self.sampler.tell(told, situation, now);
        Next::Step(Step::Apply(Input::Time { now_ns: told.0 }))
    }

    /// Random bytes for the guest at this exit. At a slice there are none: their interrupt would
    /// come before that of the input for which the slice was made.
    fn entropy_bytes(&mut self, situation: &RunSituation) -> Option<u64> {
        let is_wanted = situation.entropy_wanted_bytes > 0
            && situation.at.is_some()
            && self.entropy_at != situation.at
            && !self.slices.is_in_slice();
        if !is_wanted {
            return None;
        }
        self.entropy_at = situation.at;
        Some(ENTROPY_BYTES_MAX.min(situation.entropy_wanted_bytes))
    }

    /// When the guest's timer is due by its clock.
    fn tick(&self, situation: &RunSituation) -> Option<GuestNs> {
        situation.deadline_ns.map(|at| self.sampler.clock_at(GuestNs(at)))
    }
}

/// The next of what came from outside.
fn take_arrived(pending: &mut Pending, takes_frames: bool) -> Option<Input> {
    if let Some(signal) = pending.signals.pop_front() {
        return Some(signal);
    }
    if let Some(Completion { id, outcome, .. }) = pending.take_disk_completion() {
        return Some(Input::DiskDone { id, outcome });
    }
    if takes_frames && let Some(frame) = pending.frames.pop_front() {
        return Some(Input::NetRx { frame });
    }
    if std::mem::take(&mut pending.announce) {
        return Some(Input::NetAnnounce);
    }
    if pending.console.is_empty() {
        return None;
    }
    Some(Input::ConsoleRx { bytes: pending.console.drain(..).collect() })
}
