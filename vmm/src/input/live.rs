//! Inputs from the live host: its clock, its tap, its console.
//!
//! A run that is recorded takes them at exits. When the guest makes none for too long after an input came,
//! the run is stopped anywhere and that point made a slice (design.md section 3).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ftvmm_devices::Input;
use ftvmm_replication::Ordinal;
use nix::sys::time::TimeSpec;
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{Expiration, TimerFd};

use super::InputError;
use crate::host::clock::HostClock;
use crate::host::entropy::host_random_bytes;
use crate::kvm::Kicker;
use crate::run_loop::{InputSource, RunMode, Situation, Step, StopCause};

/// Frames kept for a guest that does not take them; beyond, the oldest is dropped, as a switch would.
const FRAMES_MAX: usize = 1024;
/// Typed bytes kept for a guest that does not take them.
const CONSOLE_BYTES_MAX: usize = 64 * 1024;
/// Random bytes per exit: more than Linux asks for at a time, little enough that no guest can flood its log.
const ENTROPY_BYTES_MAX: u64 = 256;
/// The guest runs so many times as long as a slice took before the next is taken, at most `max_delay`: one whose timer is
/// faster than slices are still gets on. More would starve it of all interrupts but its timer's.
const REST_PER_SLICE: u64 = 4;
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

#[derive(Default)]
struct Waiting {
    frames: VecDeque<Vec<u8>>,
    console: VecDeque<u8>,
    stop: Option<StopCause>,
    /// Asked to stop twice: do not wait for the guest's next exit.
    stop_at_once: bool,
    /// What waits has waited long enough for the guest to make an exit.
    overdue: bool,
    halted: bool,
    /// The guest of this host follows another's log: what arrives is the other host's to log.
    closed: bool,
    kicker: Option<Kicker>,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.console.is_empty() && self.stop.is_none()
    }
}

/// Between the host's I/O thread, which fills it, and the vCPU's thread, which takes.
pub struct LiveQueue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    unrecorded: AtomicBool,
    /// Fires when an input has waited for half of `max_delay` ([`Self::overdue`]).
    patience: Arc<TimerFd>,
    max_delay: Duration,
    boot_delay: Duration,
}

impl LiveQueue {
    /// A queue whose inputs wait at most `max_delay` for an exit of a recorded guest, the timer ticks of one that nobody has
    /// heard of yet at most `boot_delay`: it writes much of its memory, which a slice would have to ship. Whoever waits for
    /// `patience` calls [`Self::overdue`].
    pub fn new(patience: Arc<TimerFd>, max_delay: Duration, boot_delay: Duration) -> Self {
        Self {
            waiting: Mutex::default(),
            arrived: Condvar::new(),
            unrecorded: AtomicBool::new(false),
            patience,
            max_delay,
            boot_delay,
        }
    }

    /// Gives the queue the means to interrupt the running guest.
    pub fn kick_with(&self, kicker: Kicker) {
        self.lock().kicker = Some(kicker);
    }

    /// Says whether arriving inputs are dropped, because the guest follows another host's log.
    pub fn set_closed(&self, closed: bool) {
        self.lock().closed = closed;
    }

    /// Says whether inputs interrupt the running guest and reach it between exits, where no log could name
    /// them.
    pub fn set_unrecorded(&self, unrecorded: bool) {
        self.unrecorded.store(unrecorded, Ordering::Release);
    }

    fn is_unrecorded(&self) -> bool {
        self.unrecorded.load(Ordering::Acquire)
    }

    /// Hands over a frame from the tap.
    pub fn push_frame(&self, frame: Vec<u8>) {
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        let was_empty = waiting.is_empty();
        if waiting.frames.len() == FRAMES_MAX {
            waiting.frames.pop_front();
        }
        waiting.frames.push_back(frame);
        self.wake(waiting, was_empty);
    }

    /// Hands over typed bytes.
    pub fn push_console(&self, bytes: &[u8]) {
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        let was_empty = waiting.is_empty();
        let room = CONSOLE_BYTES_MAX - waiting.console.len();
        waiting.console.extend(&bytes[..bytes.len().min(room)]);
        self.wake(waiting, was_empty);
    }

    /// Ends the run at the guest's next exit, or at a slice; when called again, wherever the guest is.
    pub fn stop(&self, cause: StopCause) {
        let mut waiting = self.lock();
        if waiting.stop.replace(cause).is_some() {
            waiting.stop_at_once = true;
            if let Some(kicker) = &waiting.kicker {
                kicker.kick();
            }
        }
        self.wake(waiting, true);
    }

    /// Makes the guest's thread look at the clock: a timer of the guest is due.
    pub fn alarm(&self) {
        let waiting = self.lock();
        if waiting.halted {
            self.arrived.notify_one();
        } else if let Some(kicker) = &waiting.kicker {
            kicker.kick();
        }
    }

    /// Something has waited for its exit long enough.
    pub fn overdue(&self) {
        let mut waiting = self.lock();
        waiting.overdue = !waiting.is_empty();
        if let (true, Some(kicker)) = (waiting.overdue, &waiting.kicker) {
            kicker.kick();
        }
    }

    /// Makes `KVM_RUN` return.
    pub fn kick_vcpu(&self) {
        if let Some(kicker) = &self.lock().kicker {
            kicker.kick();
        }
    }

    /// `is_first` says that nothing had been waiting before.
    fn wake(&self, waiting: MutexGuard<'_, Waiting>, is_first: bool) {
        if waiting.halted {
            self.arrived.notify_one();
        } else if !self.is_unrecorded() {
            if is_first {
                // The other half is for a guest that cannot take an interrupt then.
                let once = Expiration::OneShot(TimeSpec::from(self.max_delay / 2));
                set_timer(&self.patience, Some(once));
            }
        } else if let Some(kicker) = &waiting.kicker {
            kicker.kick();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn set_timer(timer: &TimerFd, expiration: Option<Expiration>) {
    let answer = match expiration {
        Some(expiration) => timer.set(expiration, TimerSetTimeFlags::empty()),
        None => timer.unset(),
    };
    if let Err(error) = answer {
        tracing::error!(%error, "a timer cannot be set");
    }
}

/// Interrupts a running guest when its timer is due, or long overdue where the run is recorded.
pub struct Alarm {
    timer: Arc<TimerFd>,
    set_for_ns: Option<u64>,
}

impl Alarm {
    /// An alarm that fires `timer`; whoever waits for the timer calls [`LiveQueue::alarm`].
    pub fn new(timer: Arc<TimerFd>) -> Self {
        Self { timer, set_for_ns: None }
    }

    fn set(&mut self, at_ns: Option<u64>, now_ns: u64) {
        // Samples are whole microseconds: at an earlier one the timer would not be due yet.
        let at_ns = at_ns.map(|at| at.next_multiple_of(SAMPLE_NS));
        if self.set_for_ns == at_ns && at_ns.is_none_or(|at| at > now_ns) {
            return;
        }
        self.set_for_ns = at_ns;
        set_timer(&self.timer, at_ns.map(|at| once_in(at, now_ns)));
    }
}

fn once_in(at_ns: u64, now_ns: u64) -> Expiration {
    let delay = Duration::from_nanos(at_ns.saturating_sub(now_ns).max(1));
    Expiration::OneShot(TimeSpec::from(delay))
}

/// Takes from a [`LiveQueue`] and samples the host's clock.
pub struct LiveInputs {
    queue: Arc<LiveQueue>,
    clock: GuestClock,
    last_ns: u64,
    sampled_at: Option<Ordinal>,
    entropy_at: Option<Ordinal>,
    alarm: Alarm,
    /// Since when an interrupt waits that the guest could not take at its last exit.
    interrupt_since_ns: Option<u64>,
    /// The interrupt that waits may be of something that came from outside.
    gave_client_input: bool,
    /// When the slice was begun that the guest has not left yet.
    slice_began_ns: Option<u64>,
    /// The guest is left alone until then.
    rests_until_ns: u64,
    /// No client can have asked the guest for anything, and it has not come to user mode.
    booting: bool,
    /// Since when a frame waits although the guest was to take an interrupt first.
    blocked_since_ns: Option<u64>,
    /// An input is overdue, but the guest cannot take an interrupt: stop it as soon as it can.
    wants_window: bool,
}

impl LiveInputs {
    /// Live inputs for a guest that has seen guest time up to `last_ns`.
    pub fn new(queue: Arc<LiveQueue>, clock: GuestClock, last_ns: u64, alarm: Alarm) -> Self {
        Self {
            queue,
            clock,
            last_ns,
            sampled_at: None,
            entropy_at: None,
            alarm,
            interrupt_since_ns: None,
            gave_client_input: false,
            slice_began_ns: None,
            rests_until_ns: 0,
            booting: true,
            blocked_since_ns: None,
            wants_window: false,
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
                || !waiting.console.is_empty()
                || (situation.takes_frames && !waiting.frames.is_empty()));
        let now_ns = self.now_ns();
        let is_overdue = (arrived && self.rests_until_ns <= now_ns)
            || situation.deadline_ns.is_some_and(|at| self.is_long_ago(at))
            || self.interrupt_since_ns.is_some_and(|at| self.is_long_ago(at));
        if !is_overdue {
            let rest_ns = arrived.then_some(self.rests_until_ns);
            self.set_alarm(situation.deadline_ns, rest_ns, now_ns);
            return Step::Proceed;
        }
        // An input now would only wait for the guest to take its interrupt.
        self.wants_window = !situation.takes_interrupt && waiting.stop.is_none();
        if self.wants_window && !(arrived && self.is_blocked_for_long(now_ns)) {
            return Step::Proceed;
        }
        self.slice_began_ns = Some(now_ns);
        Step::Capture
    }

    fn max_delay_ns(&self) -> u64 {
        self.queue.max_delay.as_nanos() as u64
    }

    /// Whether a guest that computes with interrupts disabled has had its time to take one. It may be waiting in memory
    /// for the very frame that waits for it.
    fn is_blocked_for_long(&mut self, now_ns: u64) -> bool {
        let since_ns = *self.blocked_since_ns.get_or_insert(now_ns);
        let until_ns = since_ns + self.max_delay_ns() / 2;
        self.alarm.set(Some(until_ns), now_ns);
        until_ns <= now_ns
    }

    /// When a tick or interrupt that came at `since_ns` has waited as long as it may.
    fn patience_ends_ns(&self, since_ns: u64) -> u64 {
        let delay = if self.booting { self.queue.boot_delay } else { self.queue.max_delay };
        (since_ns + delay.as_nanos() as u64).max(self.rests_until_ns)
    }

    fn is_long_ago(&self, since_ns: u64) -> bool {
        self.patience_ends_ns(since_ns) <= self.now_ns()
    }

    fn rest_after_slice(&mut self, now_ns: u64) {
        if let Some(began_ns) = self.slice_began_ns.take() {
            let rest_ns = now_ns.saturating_sub(began_ns).saturating_mul(REST_PER_SLICE);
            self.rests_until_ns = now_ns + rest_ns.min(self.max_delay_ns());
        }
    }

    /// A recorded guest is given some time to make an exit by itself. `rest_ns` is when an input that is overdue
    /// already can be given.
    fn set_alarm(&mut self, deadline_ns: Option<u64>, rest_ns: Option<u64>, now_ns: u64) {
        let first_ns = deadline_ns.into_iter().chain(self.interrupt_since_ns).min();
        let at_ns = match self.queue.is_unrecorded() {
            true => first_ns,
            false => first_ns.map(|at| self.patience_ends_ns(at)),
        };
        self.alarm.set(at_ns.into_iter().chain(rest_ns).min(), now_ns);
    }
}

impl InputSource for LiveInputs {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        let queue = Arc::clone(&self.queue);
        let mut waiting = queue.lock();
        self.booting &= situation.booting;
        if situation.at.is_none() && !queue.is_unrecorded() {
            return Ok(self.between_exits(situation, &mut waiting));
        }
        self.wants_window = false;
        self.blocked_since_ns = None;
        loop {
            if let Some(cause) = waiting.stop {
                return Ok(Step::Stop(cause));
            }
            let now_ns = self.now_ns();
            let due = situation.deadline_ns.is_some_and(|deadline| deadline <= now_ns);
            let wants_sample = situation.reads_clock && self.sampled_at != situation.at;
            if wants_sample || (due && now_ns > self.last_ns) {
                self.sampled_at = situation.at;
                return Ok(self.sample(now_ns));
            }
            if situation.entropy_wanted_bytes > 0
                && situation.at.is_some()
                && self.entropy_at != situation.at
            {
                self.entropy_at = situation.at;
                let bytes =
                    host_random_bytes(ENTROPY_BYTES_MAX.min(situation.entropy_wanted_bytes))
                        .map_err(|source| InputError::Entropy { source })?;
                return Ok(Step::Apply(Input::Entropy { bytes }));
            }
            if situation.takes_frames
                && let Some(frame) = waiting.frames.pop_front()
            {
                self.gave_client_input = true;
                return Ok(Step::Apply(Input::NetRx { frame }));
            }
            if !waiting.console.is_empty() {
                let bytes = waiting.console.drain(..).collect();
                self.gave_client_input = true;
                return Ok(Step::Apply(Input::ConsoleRx { bytes }));
            }
            waiting.overdue &= !waiting.is_empty();
            self.rest_after_slice(now_ns);
            if !situation.halted {
                self.set_alarm(situation.deadline_ns, None, now_ns);
                return Ok(Step::Proceed);
            }
            waiting.halted = true;
            waiting = match situation.deadline_ns {
                Some(deadline) => {
                    let bound = Duration::from_nanos(deadline.saturating_sub(now_ns).max(1));
                    let woken = queue.arrived.wait_timeout(waiting, bound);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => queue.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            };
            waiting.halted = false;
        }
    }

    fn run_mode(&mut self, _: Ordinal, interrupt_waits: bool) -> RunMode {
        if self.queue.is_unrecorded() {
            // Nothing waits here, and an alarm for what did wait would never be still again.
            self.interrupt_since_ns = None;
            self.gave_client_input = false;
            return RunMode::Unrecorded;
        }
        if !interrupt_waits {
            self.interrupt_since_ns = None;
            self.gave_client_input = false;
        } else if self.interrupt_since_ns.is_none() || self.gave_client_input {
            let now_ns = self.now_ns();
            // What came from outside has waited already.
            let waited_ns = if self.gave_client_input { self.max_delay_ns() } else { 0 };
            let since_ns = now_ns.saturating_sub(waited_ns);
            self.interrupt_since_ns =
                Some(self.interrupt_since_ns.map_or(since_ns, |known| known.min(since_ns)));
            self.set_alarm(None, None, now_ns);
        }
        self.wants_window |= self.interrupt_since_ns.is_some_and(|since| self.is_long_ago(since));
        if self.wants_window { RunMode::UntilInterruptible } else { RunMode::Free }
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_replication::{Event, GroupEncoder, Record};

    use super::*;

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
    fn a_sample_is_at_most_a_microsecond_old_and_never_in_the_future() {
        for now_ns in [0, 999, 1000, 1001, 123_456_789_999] {
            assert!((0..1000).contains(&(now_ns - logged_ns(now_ns))));
        }
    }
}
