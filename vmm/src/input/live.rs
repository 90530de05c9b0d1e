//! Inputs from the live host: its clock, its tap, its console.
//!
//! A run that is recorded takes them at exits. When the guest makes none for too long after an input came,
//! the run is stopped anywhere and that point made a slice (decision 0008).

use std::sync::Arc;
use std::sync::MutexGuard;
use std::time::Duration;

use ftvmm_devices::Input;
use ftvmm_replication::{Ordinal, StatePart};

use super::InputError;
use super::alarm::Alarm;
use super::live_queue::{LiveQueue, Shutdown, Waiting};
use super::patience::{For, InputDelays, Patience};
use super::tick_hold::TickHold;
use crate::disk::Answer;
use crate::host::clock::{HostClock, host_unix_seconds};
use crate::host::entropy::host_random_bytes;
use crate::run_loop::{InputSource, RunMode, Situation, Step, StopCause};

/// Random bytes per exit: more than Linux asks for at a time, little enough that no guest can flood its log.
const ENTROPY_BYTES_MAX: u64 = 256;
/// How far a sample may lie behind a timer that is due, or behind the sample before it when no timer runs. After a
/// stall (a take-over, a host that slept) the guest catches up sample by sample: its kernel takes the ACPI timer's 24
/// bits for a clock that went back when it jumps by more than half of them, 2.3 s (Linux, `clocksource_delta`).
const LATE_NS_MAX: u64 = 100_000_000;
/// How many times as fast as the host's clock guest time may go while a guest that computes is behind it: its threads
/// must get on with its ticks, or it reports one that did not (Linux' watchdog, after 20 s).
const CATCH_UP: u64 = 4;
/// Resolution of the samples of the host's clock.
const SAMPLE_NS: u64 = 1000;

/// Guest time as a function of host time: `host + offset`.
#[derive(Clone, Copy, Debug)]
pub struct GuestClock {
    host: HostClock,
    offset_ns: i64,
}

impl GuestClock {
    /// A clock that shows `guest_ns` when the host's shows `host_ns`.
    pub fn anchored(host: HostClock, host_ns: u64, guest_ns: u64) -> Self {
        Self { host, offset_ns: guest_ns.wrapping_sub(host_ns) as i64 }
    }

    /// Guest time now, in nanoseconds since power-on.
    pub fn host_now_ns(&self) -> u64 {
        self.host.host_now_ns().saturating_add_signed(self.offset_ns)
    }

    /// The host's clock under it.
    pub fn host(&self) -> HostClock {
        self.host
    }
}

/// Guest time as it is sampled: in whole microseconds, so that a sample costs at most four bytes of log.
fn logged_ns(now_ns: u64) -> u64 {
    now_ns - now_ns % SAMPLE_NS
}

/// Takes from a [`LiveQueue`] and samples the host's clock.
pub struct LiveInputs {
    queue: Arc<LiveQueue>,
    clock: GuestClock,
    last_ns: u64,
    /// How far guest time was behind its clock when the guest left its last exit.
    lag_ns: u64,
    /// The host's clock at that sample.
    sampled_host_ns: u64,
    /// The guest was restored and is to learn that it is another one.
    identity_wanted: bool,
    /// Guest time at which a guest whose power button was pressed has had its time.
    grace_until_ns: Option<u64>,
    sampled_at: Option<Ordinal>,
    tick_hold: TickHold,
    entropy_at: Option<Ordinal>,
    alarm: Alarm,
    patience: Patience,
    /// Since when an interrupt waits that the guest could not take at its last exit, and whose it may be.
    interrupt_since: Option<(u64, For)>,
    /// Something came from outside, and no exit since then was without a waiting interrupt.
    gave_input: bool,
    /// The guest is behind with its timer's ticks.
    owes_ticks: bool,
    /// No client can have asked the guest for anything, and it has not come to user mode.
    booting: bool,
    /// Since when a frame waits although the guest was to take an interrupt first.
    blocked_since_ns: Option<u64>,
    /// An input is overdue, but the guest cannot take an interrupt: stop it as soon as it can.
    wants_window: bool,
    /// Guest time when a guest without a timer was last known to have waited of its own accord.
    rested_ns: u64,
}

impl LiveInputs {
    /// Live inputs for a guest that has seen guest time up to `last_ns`.
    pub fn new(
        queue: Arc<LiveQueue>,
        clock: GuestClock,
        last_ns: u64,
        alarm: Alarm,
        delays: InputDelays,
    ) -> Self {
        Self {
            queue,
            clock,
            last_ns,
            lag_ns: 0,
            sampled_host_ns: 0,
            identity_wanted: false,
            grace_until_ns: None,
            sampled_at: None,
            tick_hold: TickHold::new(),
            entropy_at: None,
            alarm,
            patience: Patience::new(delays),
            interrupt_since: None,
            gave_input: false,
            owes_ticks: false,
            booting: true,
            blocked_since_ns: None,
            wants_window: false,
            rested_ns: 0,
        }
    }

    /// The guest was restored from a snapshot, as others may have been: its first input says so.
    pub fn renew_identity(&mut self) {
        self.identity_wanted = true;
    }

    fn new_identity(&mut self) -> Result<Step, InputError> {
        self.identity_wanted = false;
        let mut generation_id = [0; 16];
        let bytes = host_random_bytes(generation_id.len() as u64)
            .map_err(|source| InputError::Entropy { source })?;
        generation_id.copy_from_slice(&bytes);
        Ok(Step::Apply(Input::NewIdentity { generation_id, unix_s: host_unix_seconds() }))
    }

    /// Goes on with another clock, after the guest has seen guest time up to `last_ns`.
    pub fn resume(&mut self, clock: GuestClock, last_ns: u64) {
        self.clock = clock;
        self.last_ns = last_ns;
        // These are times of the clock before.
        self.lag_ns = 0;
        self.interrupt_since = None;
        self.blocked_since_ns = None;
        self.grace_until_ns = None;
        self.patience.rest_no_more();
        self.tick_hold = TickHold::new();
        self.alarm.set(None, 0);
    }

    fn now_ns(&self) -> u64 {
        logged_ns(self.clock.host_now_ns()).max(self.last_ns)
    }

    /// Guest time for a sample, and how far that is behind what its clock shows; for the time stamp counter to the
    /// nanosecond: there are drivers that refuse a coarse one (Linux, `jent_entropy_init`).
    fn sample_ns(&self, situation: &Situation) -> (u64, u64) {
        // A guest at its tick has no timer for some exits: the old one is over, the next one not yet set.
        let due_ns = situation.deadline_ns.unwrap_or(self.rested_ns).max(self.last_ns);
        let latest_ns = logged_ns(due_ns.saturating_add(LATE_NS_MAX));
        let now_ns = if situation.reads_counter {
            self.clock.host_now_ns().max(self.last_ns)
        } else {
            self.now_ns()
        };
        if now_ns <= latest_ns {
            return (now_ns, 0);
        }
        let told_ns = if situation.halted {
            // All its threads have had their turn when it halts.
            latest_ns
        } else {
            let passed_ns = self.host_now_ns().saturating_sub(self.sampled_host_ns);
            let step_ns = passed_ns.saturating_mul(CATCH_UP).min(LATE_NS_MAX);
            logged_ns(self.last_ns.saturating_add(step_ns)).max(self.last_ns)
        };
        (told_ns, now_ns.saturating_sub(told_ns))
    }

    fn sample(&mut self, now_ns: u64, deadline_ns: Option<u64>) -> Step {
        if deadline_ns.is_some_and(|at| at <= now_ns) {
            self.tick_hold.ticked();
        }
        // Readings so close that a step rounds down to nothing must add up, or guest time stands still.
        if now_ns > self.last_ns {
            self.sampled_host_ns = self.host_now_ns();
        }
        self.last_ns = now_ns;
        Step::Apply(Input::Time { now_ns })
    }

    /// A recorded run was stopped between two exits: what now?
    fn between_exits(&mut self, situation: &Situation, waiting: &mut Waiting) -> Step {
        waiting.overdue |= self.mind_grace(waiting);
        if let Some(cause) = waiting.stop.filter(|_| waiting.stop_at_once) {
            return Step::Stop(cause);
        }
        let arrived = waiting.overdue
            && (waiting.stop.is_some()
                || waiting.disk_answered()
                || waiting.announce
                || !waiting.console.is_empty()
                || !waiting.signals.is_empty()
                || waiting.shutdown == Shutdown::Wanted
                || (situation.takes_frames && !waiting.frames.is_empty()));
        let now_ns = self.now_ns();
        let rested_ns = arrived.then(|| self.patience.rests_until_ns(For::Input));
        let first_ns = self.patience_ends_ns(situation.deadline_ns).chain(rested_ns).min();
        if first_ns.is_none_or(|at| at > now_ns) {
            self.set_alarm(first_ns, now_ns);
            return Step::Proceed;
        }
        // An input now would only wait for the guest to take its interrupt.
        self.wants_window = !situation.takes_interrupt && waiting.stop.is_none();
        if self.wants_window && !(arrived && self.is_blocked_for_long(now_ns)) {
            return Step::Proceed;
        }
        self.patience.slice_begins(now_ns);
        Step::Capture
    }

    /// Whether a guest that computes with interrupts disabled has had its time to take one. It may be waiting in memory
    /// for the very frame that waits for it.
    fn is_blocked_for_long(&mut self, now_ns: u64) -> bool {
        let since_ns = *self.blocked_since_ns.get_or_insert(now_ns);
        let until_ns = since_ns + self.patience.inputs_ns() / 2;
        self.set_alarm(Some(until_ns), now_ns);
        until_ns <= now_ns
    }

    /// Presses the power button when the run is to end, and ends it when nobody listens or the guest has had its time.
    fn mind_shutdown(&mut self, waiting: &mut Waiting, heard: bool) {
        match waiting.shutdown {
            Shutdown::No => {}
            Shutdown::Wanted if heard => {
                let grace_ns = u64::try_from(self.queue.grace().as_nanos()).unwrap_or(u64::MAX);
                let until_host_ns = self.host_now_ns().saturating_add(grace_ns);
                waiting.shutdown = Shutdown::Grace { until_host_ns };
                // Not before it is over by the host's clock.
                self.grace_until_ns = Some(self.now_ns().saturating_add(grace_ns));
                waiting.signals.push_back(Input::PowerButton);
                tracing::info!(
                    seconds = grace_ns / 1_000_000_000,
                    "the guest's power button is pressed"
                );
            }
            Shutdown::Wanted => waiting.stop = waiting.stop.or(Some(StopCause::Requested)),
            Shutdown::Grace { .. } => {
                self.mind_grace(waiting);
            }
        }
    }

    /// Ends the run when the guest has had its time to switch itself off; whether it has had it.
    fn mind_grace(&self, waiting: &mut Waiting) -> bool {
        let Shutdown::Grace { until_host_ns } = waiting.shutdown else { return false };
        let is_over = self.host_now_ns() >= until_host_ns;
        if is_over && waiting.stop.is_none() {
            tracing::warn!("the guest did not switch itself off; the run ends");
            waiting.stop = Some(StopCause::Requested);
        }
        is_over
    }

    fn grace_left(&self, waiting: &Waiting) -> Option<Duration> {
        match waiting.shutdown {
            Shutdown::Grace { until_host_ns } => {
                Some(Duration::from_nanos(until_host_ns.saturating_sub(self.host_now_ns()).max(1)))
            }
            _ => None,
        }
    }

    fn host_now_ns(&self) -> u64 {
        self.clock.host().host_now_ns()
    }

    /// When the guest has had its time to make an exit for its timer, and to take the interrupt that waits.
    fn patience_ends_ns(&self, deadline_ns: Option<u64>) -> impl Iterator<Item = u64> {
        let tick = deadline_ns.map(|at| (at.saturating_add(self.lag_ns), For::Tick));
        let ends = |(since_ns, whom)| {
            // One that is behind could never catch up.
            let whom = if self.owes_ticks && !self.booting { For::Input } else { whom };
            self.patience.ends_ns(whom, since_ns, self.booting)
        };
        tick.into_iter().chain(self.interrupt_since).map(ends)
    }

    /// The guest goes on at `now_ns` of its clock: interrupts it when its timer is due, one that is recorded only when it makes no exit by itself.
    fn set_guest_alarm(&mut self, deadline_ns: Option<u64>, now_ns: u64) {
        let at_ns = match self.queue.is_unrecorded() {
            true => deadline_ns.map(|at| at.saturating_add(self.lag_ns)),
            // For an interrupt that has waited its time the guest is stopped at its window.
            false => self.patience_ends_ns(deadline_ns).filter(|at| *at > now_ns).min(),
        };
        self.set_alarm(at_ns, now_ns);
    }

    /// A guest that computes is stopped at `at_ns` too, and when its grace is over.
    fn set_alarm(&mut self, at_ns: Option<u64>, now_ns: u64) {
        let at_ns = match self.grace_until_ns.filter(|until| *until > now_ns) {
            None => at_ns,
            Some(grace_ns) => Some(at_ns.map_or(grace_ns, |at| at.min(grace_ns))),
        };
        // Samples are whole microseconds: at an earlier one the timer would not be due yet.
        self.alarm.set(at_ns.map(|at| at.next_multiple_of(SAMPLE_NS)), now_ns);
    }

    /// Takes what waits, for an exit.
    fn at_exit<'a>(
        &mut self,
        situation: &Situation,
        queue: &'a LiveQueue,
        mut waiting: MutexGuard<'a, Waiting>,
    ) -> Result<Step, InputError> {
        if self.identity_wanted {
            return self.new_identity();
        }
        self.tick_hold.arrive(situation);
        let never_holds = situation.halted || self.patience.is_in_slice();
        loop {
            self.mind_shutdown(&mut waiting, situation.hears_power_button);
            if let Some(cause) = waiting.stop {
                return Ok(Step::Stop(cause));
            }
            let (mut now_ns, lag_ns) = self.sample_ns(situation);
            self.lag_ns = lag_ns;
            let clock_ns = now_ns + lag_ns;
            let due_ns = situation.deadline_ns.filter(|at| *at <= now_ns);
            // One that the guest's time has passed is there already.
            let may_hold = |at: &u64| *at > self.last_ns && !never_holds;
            let held_ns = due_ns.filter(may_hold).filter(|_| self.tick_hold.holds());
            if let Some(at) = held_ns {
                now_ns = logged_ns(at - 1).max(self.last_ns);
            }
            if situation.reads_clock && self.sampled_at != situation.at {
                self.sampled_at = situation.at;
                return Ok(self.sample(now_ns, situation.deadline_ns));
            }
            // Not at a slice, where its interrupt would come before that of what the slice is for.
            if situation.entropy_wanted_bytes > 0
                && situation.at.is_some()
                && self.entropy_at != situation.at
                && !self.patience.is_in_slice()
            {
                self.entropy_at = situation.at;
                let bytes =
                    host_random_bytes(ENTROPY_BYTES_MAX.min(situation.entropy_wanted_bytes))
                        .map_err(|source| InputError::Entropy { source })?;
                return Ok(Step::Apply(Input::Entropy { bytes }));
            }
            if let Some(signal) = waiting.signals.pop_front() {
                self.gave_input = true;
                return Ok(Step::Apply(signal));
            }
            if let Some(Answer { id, outcome, .. }) = waiting.take_disk_answer() {
                self.gave_input = true;
                return Ok(Step::Apply(Input::DiskDone { id, outcome }));
            }
            if situation.takes_frames
                && let Some(frame) = waiting.frames.pop_front()
            {
                self.gave_input = true;
                return Ok(Step::Apply(Input::NetRx { frame }));
            }
            if std::mem::take(&mut waiting.announce) {
                self.gave_input = true;
                return Ok(Step::Apply(Input::NetAnnounce));
            }
            if !waiting.console.is_empty() {
                let bytes = waiting.console.drain(..).collect();
                self.gave_input = true;
                return Ok(Step::Apply(Input::ConsoleRx { bytes }));
            }
            waiting.overdue &= !waiting.is_empty();
            // After what came from outside: its interrupt is to come before the tick's (`Board::settle`).
            let is_due = due_ns.is_some() && held_ns.is_none();
            // One that is far behind gets to a timer that is far ahead in steps, and reads no clock on the way.
            let is_behind = lag_ns > 0
                && situation.deadline_ns.is_some()
                && self.patience.is_in_slice()
                && self.sampled_at != situation.at;
            if (is_due || is_behind) && now_ns > self.last_ns {
                self.sampled_at = situation.at;
                return Ok(self.sample(now_ns, situation.deadline_ns));
            }
            if !situation.halted {
                waiting.left = Some((self.clock, clock_ns));
                match held_ns.is_some() {
                    true => self.set_alarm(Some(clock_ns + self.patience.inputs_ns()), clock_ns),
                    false => self.set_guest_alarm(situation.deadline_ns, clock_ns),
                }
                return Ok(Step::Proceed);
            }
            if std::mem::take(&mut waiting.attend) {
                return Ok(Step::Again);
            }
            let until_due = |at: u64| Duration::from_nanos(at.saturating_sub(now_ns).max(1));
            let due = situation.deadline_ns.map(until_due);
            let grace = self.grace_left(&waiting);
            waiting = queue.sleep(waiting, due.into_iter().chain(grace).min());
            if situation.deadline_ns.is_none() {
                self.rested_ns = self.now_ns();
            }
        }
    }
}

impl InputSource for LiveInputs {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        let queue = Arc::clone(&self.queue);
        let mut waiting = queue.lock();
        self.booting &= situation.booting;
        self.owes_ticks = situation.owes_ticks;
        if situation.at.is_none() && !queue.is_unrecorded() {
            return Ok(self.between_exits(situation, &mut waiting));
        }
        self.wants_window = false;
        self.blocked_since_ns = None;
        self.at_exit(situation, &queue, waiting)
    }

    fn state_put(&mut self, _: &StatePart, stands: Option<(Ordinal, u64)>) {
        if let Some((_, now_ns)) = stands {
            let host = self.clock.host();
            self.resume(GuestClock::anchored(host, host.host_now_ns(), now_ns), now_ns);
            // What the guest had not had of its disk came with the state.
            self.queue.disk_answered();
        }
    }

    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        self.queue.leave_exit(at);
        let at_slice = self.patience.is_in_slice();
        if at_slice {
            let now_ns = self.now_ns();
            self.patience.slice_ends(now_ns);
        }
        let unrecorded = self.queue.is_unrecorded();
        if unrecorded || !interrupt_waits {
            // An alarm for what waited before a survivor went on unrecorded would never be still again.
            self.interrupt_since = None;
            self.gave_input = false;
        }
        if unrecorded {
            return RunMode::Unrecorded;
        }
        if interrupt_waits {
            let now_ns = self.now_ns();
            if self.gave_input {
                // What a slice was made for has waited already.
                let waited_ns = if at_slice { self.patience.inputs_ns() } else { 0 };
                let since_ns = now_ns.saturating_sub(waited_ns);
                let known = self.interrupt_since.filter(|(_, whom)| *whom == For::Input);
                let since_ns = known.map_or(since_ns, |(known_ns, _)| known_ns.min(since_ns));
                self.interrupt_since = Some((since_ns, For::Input));
            }
            self.interrupt_since.get_or_insert((now_ns, For::Tick));
            match self.patience_ends_ns(None).min() {
                Some(ends_ns) if ends_ns > now_ns => self.set_alarm(Some(ends_ns), now_ns),
                _ => self.wants_window = true,
            }
        }
        if self.wants_window { RunMode::UntilInterruptible } else { RunMode::Free }
    }
}

#[cfg(test)]
mod tests;
