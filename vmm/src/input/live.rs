//! Inputs from the live host: its clock, its tap, its console.

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
use crate::run_loop::{InputSource, Situation, Step, StopCause};

/// Frames kept for a guest that does not take them; beyond, the oldest is dropped, as a switch would.
const FRAMES_MAX: usize = 1024;
/// Typed bytes kept for a guest that does not take them.
const CONSOLE_BYTES_MAX: usize = 64 * 1024;
/// Random bytes per exit: more than Linux asks for at a time, little enough that no guest can flood its log.
const ENTROPY_BYTES_MAX: u64 = 256;
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
    halted: bool,
    /// The guest of this host follows another's log: what arrives is the other host's to log.
    closed: bool,
    kicker: Option<Kicker>,
}

/// Between the host's I/O thread, which fills it, and the vCPU's thread, which takes.
#[derive(Default)]
pub struct LiveQueue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    unrecorded: AtomicBool,
}

impl LiveQueue {
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
        if waiting.frames.len() == FRAMES_MAX {
            waiting.frames.pop_front();
        }
        waiting.frames.push_back(frame);
        self.wake(waiting);
    }

    /// Hands over typed bytes.
    pub fn push_console(&self, bytes: &[u8]) {
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        let room = CONSOLE_BYTES_MAX - waiting.console.len();
        waiting.console.extend(&bytes[..bytes.len().min(room)]);
        self.wake(waiting);
    }

    /// Ends the run at the guest's next exit; when called again, wherever the guest is.
    pub fn stop(&self, cause: StopCause) {
        let mut waiting = self.lock();
        if waiting.stop.replace(cause).is_some() {
            waiting.stop_at_once = true;
            if let Some(kicker) = &waiting.kicker {
                kicker.kick();
            }
        }
        self.wake(waiting);
    }

    /// Makes the guest's thread look at the clock.
    pub fn kick(&self) {
        self.wake(self.lock());
    }

    fn wake(&self, waiting: MutexGuard<'_, Waiting>) {
        if waiting.halted {
            self.arrived.notify_one();
        } else if self.is_unrecorded()
            && let Some(kicker) = &waiting.kicker
        {
            kicker.kick();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes from a [`LiveQueue`] and samples the host's clock.
pub struct LiveInputs {
    queue: Arc<LiveQueue>,
    clock: GuestClock,
    last_ns: u64,
    sampled_at: Option<Ordinal>,
    entropy_at: Option<Ordinal>,
    alarm: Alarm,
}

/// Interrupts a running, unrecorded guest when its timer is due.
pub struct Alarm {
    timer: Arc<TimerFd>,
    set_for_ns: Option<u64>,
}

impl Alarm {
    /// An alarm that fires `timer`; whoever waits for the timer calls [`LiveQueue::kick`].
    pub fn new(timer: Arc<TimerFd>) -> Self {
        Self { timer, set_for_ns: None }
    }

    fn set(&mut self, deadline_ns: Option<u64>, now_ns: u64) {
        if self.set_for_ns == deadline_ns {
            return;
        }
        self.set_for_ns = deadline_ns;
        let answer = match deadline_ns {
            Some(at) => {
                let delay = Duration::from_nanos(at.saturating_sub(now_ns).max(1));
                let once = Expiration::OneShot(TimeSpec::from(delay));
                self.timer.set(once, TimerSetTimeFlags::empty())
            }
            None => self.timer.unset(),
        };
        if let Err(error) = answer {
            tracing::error!(%error, "the guest's timer cannot be set");
        }
    }
}

impl LiveInputs {
    /// Live inputs for a guest that has seen guest time up to `last_ns`. The alarm is
    /// used while the run is unrecorded ([`LiveQueue::set_unrecorded`]).
    pub fn new(queue: Arc<LiveQueue>, clock: GuestClock, last_ns: u64, alarm: Alarm) -> Self {
        Self { queue, clock, last_ns, sampled_at: None, entropy_at: None, alarm }
    }

    /// Goes on with another clock, after the guest has seen guest time up to `last_ns`.
    pub fn resume(&mut self, clock: GuestClock, last_ns: u64) {
        self.clock = clock;
        self.last_ns = last_ns;
    }

    fn sample(&mut self, now_ns: u64) -> Step {
        self.last_ns = now_ns;
        Step::Apply(Input::Time { now_ns })
    }
}

impl InputSource for LiveInputs {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        let queue = Arc::clone(&self.queue);
        let mut waiting = queue.lock();
        if situation.at.is_none() && !self.unrecorded() {
            let now = waiting.stop.filter(|_| waiting.stop_at_once);
            return Ok(now.map_or(Step::Proceed, Step::Stop));
        }
        loop {
            if let Some(cause) = waiting.stop {
                return Ok(Step::Stop(cause));
            }
            let now_ns = logged_ns(self.clock.host_now_ns()).max(self.last_ns);
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
                return Ok(Step::Apply(Input::NetRx { frame }));
            }
            if !waiting.console.is_empty() {
                let bytes = waiting.console.drain(..).collect();
                return Ok(Step::Apply(Input::ConsoleRx { bytes }));
            }
            if !situation.halted {
                if queue.is_unrecorded() {
                    self.alarm.set(situation.deadline_ns, now_ns);
                }
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

    fn unrecorded(&self) -> bool {
        self.queue.is_unrecorded()
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
