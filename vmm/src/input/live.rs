//! Inputs from the live host: its clock, its tap, its console.
//!
//! A run that is recorded takes them at exits. When the guest makes none for too long after an input came,
//! the run is stopped anywhere and that point made a slice (design.md section 3).

use std::sync::Arc;
use std::sync::MutexGuard;
use std::time::Duration;

use ftvmm_devices::Input;
use ftvmm_replication::{Ordinal, StatePart};

use super::InputError;
use super::alarm::Alarm;
use super::live_queue::{LiveQueue, Waiting};
use super::patience::{For, InputDelays, Patience};
use crate::disk::Answer;
use crate::host::clock::HostClock;
use crate::host::entropy::host_random_bytes;
use crate::run_loop::{InputSource, RunMode, Situation, Step};

/// Random bytes per exit: more than Linux asks for at a time, little enough that no guest can flood its log.
const ENTROPY_BYTES_MAX: u64 = 256;
/// How far a sample may lie behind a timer that is due, or behind the sample before it when no timer runs. After a
/// stall (a take-over, a host that slept) the guest catches up sample by sample: its kernel takes the ACPI timer's 24
/// bits for a clock that went back when it jumps by more than half of them, 2.3 s (Linux, `clocksource_delta`).
const LATE_NS_MAX: u64 = 100_000_000;
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
    sampled_at: Option<Ordinal>,
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
            sampled_at: None,
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

    /// Goes on with another clock, after the guest has seen guest time up to `last_ns`.
    pub fn resume(&mut self, clock: GuestClock, last_ns: u64) {
        self.clock = clock;
        self.last_ns = last_ns;
    }

    fn now_ns(&self) -> u64 {
        logged_ns(self.clock.host_now_ns()).max(self.last_ns)
    }

    /// Guest time for a sample, when the guest's next timer is due at `deadline_ns`; for the time stamp counter to
    /// the nanosecond: there are drivers that refuse a coarse one (Linux, `jent_entropy_init`).
    fn sample_ns(&self, deadline_ns: Option<u64>, for_counter: bool) -> u64 {
        // A guest at its tick has no timer for some exits: the old one is over, the next one not yet set.
        let due_ns = deadline_ns.unwrap_or(self.rested_ns).max(self.last_ns);
        let latest_ns = logged_ns(due_ns.saturating_add(LATE_NS_MAX));
        if for_counter {
            self.clock.host_now_ns().max(self.last_ns).min(latest_ns)
        } else {
            self.now_ns().min(latest_ns)
        }
    }

    fn sample(&mut self, now_ns: u64) -> Step {
        self.last_ns = now_ns;
        Step::Apply(Input::Time { now_ns })
    }

    /// A recorded run was stopped between two exits: what now?
    fn between_exits(&mut self, situation: &Situation, waiting: &mut Waiting) -> Step {
        if let Some(cause) = waiting.stop.filter(|_| waiting.stop_at_once) {
            return Step::Stop(cause);
        }
        let arrived = waiting.overdue
            && (waiting.stop.is_some()
                || waiting.disk_answered()
                || waiting.announce
                || !waiting.console.is_empty()
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

    /// When the guest has had its time to make an exit for its timer, and to take the interrupt that waits.
    fn patience_ends_ns(&self, deadline_ns: Option<u64>) -> impl Iterator<Item = u64> {
        let tick = deadline_ns.map(|at| (at, For::Tick));
        let ends = |(since_ns, whom)| {
            // One that is behind could never catch up.
            let whom = if self.owes_ticks && !self.booting { For::Input } else { whom };
            self.patience.ends_ns(whom, since_ns, self.booting)
        };
        tick.into_iter().chain(self.interrupt_since).map(ends)
    }

    /// The guest goes on: interrupts it when its timer is due, one that is recorded only when it makes no exit by itself.
    fn set_guest_alarm(&mut self, deadline_ns: Option<u64>, now_ns: u64) {
        let at_ns = match self.queue.is_unrecorded() {
            true => deadline_ns,
            // For an interrupt that has waited its time the guest is stopped at its window.
            false => self.patience_ends_ns(deadline_ns).filter(|at| *at > now_ns).min(),
        };
        self.set_alarm(at_ns, now_ns);
    }

    fn set_alarm(&mut self, at_ns: Option<u64>, now_ns: u64) {
        // Samples are whole microseconds: at an earlier one the timer would not be due yet.
        self.alarm.set(at_ns.map(|at| at.next_multiple_of(SAMPLE_NS)), now_ns);
    }

    /// Takes what waits, for an exit.
    fn at_exit(
        &mut self,
        situation: &Situation,
        mut waiting: MutexGuard<'_, Waiting>,
    ) -> Result<Step, InputError> {
        let queue = Arc::clone(&self.queue);
        loop {
            if let Some(cause) = waiting.stop {
                return Ok(Step::Stop(cause));
            }
            let now_ns = self.sample_ns(situation.deadline_ns, situation.reads_counter);
            if situation.reads_clock && self.sampled_at != situation.at {
                self.sampled_at = situation.at;
                return Ok(self.sample(now_ns));
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
            let due = situation.deadline_ns.is_some_and(|deadline| deadline <= now_ns);
            if due && now_ns > self.last_ns {
                return Ok(self.sample(now_ns));
            }
            if !situation.halted {
                waiting.left = Some((self.clock, now_ns));
                self.set_guest_alarm(situation.deadline_ns, now_ns);
                return Ok(Step::Proceed);
            }
            if std::mem::take(&mut waiting.attend) {
                return Ok(Step::Again);
            }
            let until_due = |at: u64| Duration::from_nanos(at.saturating_sub(now_ns).max(1));
            waiting = queue.sleep(waiting, situation.deadline_ns.map(until_due));
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
        self.at_exit(situation, waiting)
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
mod tests {
    use ftvmm_replication::{Event, GroupEncoder, Record};

    use ftvmm_devices::{DiskOp, DiskRequest};

    use super::*;
    use crate::disk::{Disk, DiskFile, Telling};
    use crate::host::resting_timer;

    /// Inputs of a guest whose time would be `guest_ns`, and who has been told `last_ns`; and where they come from.
    fn live_inputs(guest_ns: u64, last_ns: u64) -> (Arc<LiveQueue>, LiveInputs) {
        let queue = Arc::new(LiveQueue::new(resting_timer().unwrap(), Duration::from_millis(1)));
        let clock = GuestClock::anchored(HostClock::host_start(), 0, guest_ns);
        let alarm = Alarm::new(resting_timer().unwrap());
        let delays = InputDelays::default();
        (queue.clone(), LiveInputs::new(queue, clock, last_ns, alarm, delays))
    }

    /// Bytes of log for a sample `exits` exits and `gap_ns` of host time after another.
    fn sample_bytes(first_ns: u64, gap_ns: u64, exits: u64) -> u64 {
        let mut encoder = GroupEncoder::new();
        let mut push = |at, host_ns| {
            let now_ns = logged_ns(host_ns);
            encoder.push(&Record { at: Ordinal(at), event: Event::Input(Input::Time { now_ns }) });
            encoder.body_bytes()
        };
        let before = push(1, first_ns);
        push(1 + exits, first_ns + gap_ns) - before
    }

    #[test]
    fn a_clock_read_costs_at_most_four_bytes_of_log() {
        const NS_PER_S: u64 = 1_000_000_000;
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..10_000 {
            let first_ns = rng.u64(..1000 * NS_PER_S);
            let gap_ns = rng.u64(..=2 * NS_PER_S) >> rng.u32(..32);
            assert!(sample_bytes(first_ns, gap_ns, rng.u64(..15)) <= 4, "{gap_ns} ns");
            // A tick of the tiny kernel with many exits on the way.
            assert!(sample_bytes(first_ns, gap_ns % 10_000_000, rng.u64(..140)) <= 4);
        }
    }

    #[test]
    fn a_slice_ends_for_a_survivor_too() {
        let (queue, mut live) = live_inputs(1_000_000_000, 0);
        let overdue =
            Situation { deadline_ns: Some(0), takes_interrupt: true, ..Situation::default() };
        assert!(matches!(live.next(&overdue), Ok(Step::Capture)));
        queue.set_unrecorded(true);
        assert_eq!(live.run_mode(Ordinal(1), false), RunMode::Unrecorded);
        let wanting =
            Situation { at: Some(Ordinal(2)), entropy_wanted_bytes: 8, ..Situation::default() };
        assert!(matches!(live.next(&wanting), Ok(Step::Apply(Input::Entropy { .. }))));
    }

    /// A follower's disk answers too; those answers reach the guest when it goes live, at an exit or at a slice.
    #[test]
    fn what_the_disk_said_before_a_take_over_reaches_the_guest() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(512).unwrap();
        let file = DiskFile::open(image.path()).unwrap();
        let disk = Disk::start(file, Telling::AtOnce).unwrap();
        let (queue, mut live) = live_inputs(1_000_000_000, 0);
        queue.set_closed(true);
        queue.take_from_disk(disk.clone());
        let answered = queue.clone();
        disk.on_answer(move |_| answered.disk_answered());
        for id in 1..=3 {
            disk.submit(DiskRequest { id, op: DiskOp::Flush });
        }
        disk.drain();
        assert_eq!(disk.take(2).map(|answer| answer.id), Some(2), "logged by the old primary");
        queue.set_closed(false);
        queue.overdue();
        let computing = Situation { takes_interrupt: true, ..Situation::default() };
        assert!(matches!(live.next(&computing), Ok(Step::Capture)));
        let slice = Situation { at: Some(Ordinal(9)), ..Situation::default() };
        for expected in [1, 3] {
            match live.next(&slice) {
                Ok(Step::Apply(Input::DiskDone { id, .. })) => assert_eq!(id, expected),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(live.next(&slice), Ok(Step::Proceed)));
    }

    #[test]
    fn a_restored_guest_never_sees_time_go_back() {
        const STOOD_AT_NS: u64 = 5_000_000_000;
        let (_queue, mut live) = live_inputs(0, 0);
        live.state_put(&StatePart::Machine(vec![]), Some((Ordinal(7), STOOD_AT_NS)));
        let reads = Situation { at: Some(Ordinal(7)), reads_clock: true, ..Situation::default() };
        let Ok(Step::Apply(Input::Time { now_ns })) = live.next(&reads) else {
            panic!("no sample")
        };
        assert!(now_ns >= STOOD_AT_NS, "{now_ns}");
    }

    /// What a guest that reads the clock at every exit from `from` on is told, until it has caught up.
    fn readings_ns(live: &mut LiveInputs, from: u64, deadline_ns: Option<u64>) -> Vec<u64> {
        let reads = Situation { reads_clock: true, deadline_ns, ..Situation::default() };
        let mut readings_ns = Vec::new();
        for at in (from..).map(Ordinal) {
            let told_ns = match live.next(&Situation { at: Some(at), ..reads }) {
                Ok(Step::Apply(Input::Time { now_ns })) => now_ns,
                other => panic!("{other:?}"),
            };
            readings_ns.push(told_ns);
            if told_ns + LATE_NS_MAX > live.now_ns() {
                break;
            }
        }
        readings_ns
    }

    #[test]
    fn after_a_stall_time_moves_in_steps_wherever_the_guest_is_in_its_tick() {
        const STOOD_AT_NS: u64 = 5_000_000_000;
        const STALL_NS: u64 = 3_000_000_000;
        const TICK_NS: u64 = 10_000_000;
        for deadline_ns in [None, Some(STOOD_AT_NS - 1), Some(STOOD_AT_NS + TICK_NS)] {
            let (_queue, mut live) = live_inputs(STOOD_AT_NS + STALL_NS, STOOD_AT_NS);
            let told_ns = readings_ns(&mut live, 1, deadline_ns);
            assert!(told_ns.len() > 25, "{deadline_ns:?}: {told_ns:?}");
            for (before_ns, after_ns) in [STOOD_AT_NS].iter().chain(&told_ns).zip(&told_ns) {
                let step_ns = after_ns - before_ns;
                assert!(step_ns <= LATE_NS_MAX + TICK_NS, "{deadline_ns:?}: {told_ns:?}");
            }
        }
    }

    #[test]
    fn a_guest_that_waited_without_a_timer_is_told_the_time_at_once() {
        let (queue, mut live) = live_inputs(0, 0);
        let waker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_nanos(2 * LATE_NS_MAX));
            queue.push_console(b"x");
        });
        let halted = Situation { at: Some(Ordinal(1)), halted: true, ..Situation::default() };
        assert!(matches!(live.next(&halted), Ok(Step::Apply(Input::ConsoleRx { .. }))));
        waker.join().unwrap();
        let told_ns = readings_ns(&mut live, 2, None);
        assert!(told_ns[0] > 2 * LATE_NS_MAX, "{told_ns:?}");
    }

    #[test]
    fn a_sample_is_at_most_a_microsecond_old_and_never_in_the_future() {
        for now_ns in [0, 999, 1000, 1001, 123_456_789_999] {
            assert!((0..1000).contains(&(now_ns - logged_ns(now_ns))));
        }
    }

    #[test]
    fn only_a_guest_that_is_live_is_asked_to_announce_itself_and_a_frame_too_many_is_counted() {
        let (queue, mut inputs) = live_inputs(5000, 1000);
        let exit = Situation { at: Some(Ordinal(1)), ..Situation::default() };
        queue.set_closed(true);
        queue.push_announce();
        queue.set_closed(false);
        assert!(matches!(inputs.next(&exit), Ok(Step::Proceed)));
        queue.push_announce();
        assert!(matches!(inputs.next(&exit), Ok(Step::Apply(Input::NetAnnounce))));
        assert!(matches!(inputs.next(&exit), Ok(Step::Proceed)));
        for _ in 0..1025 {
            queue.push_frame(vec![0; 60]);
        }
        assert_eq!(queue.network().report().rx_dropped_queue_full, 1);
    }
}
