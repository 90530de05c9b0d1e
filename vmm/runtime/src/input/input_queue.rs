//! Inputs that arrived on the live host, until the vCPU's thread takes them.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ftvmm_devices::Input;
use ftvmm_host::clock::HostClock;
use ftvmm_host::disk::Disk;
use ftvmm_host::{STOP_LONGEST, StopLimit, Typed, set_timer};
use ftvmm_machine::Kick;
use ftvmm_machine::disk_completion::Completion;
use ftvmm_machine::net_watch::NetWatch;
use ftvmm_machine::situation::StopCause;
use ftvmm_replication::{HostNs, Ordinal};
use nix::sys::timerfd::TimerFd;

use super::Pulse;
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{Condvar, Mutex, MutexGuard, lock, wait, wait_timeout};

/// Most frames kept for a guest that does not take them. When one more comes, the oldest is
/// dropped.
const FRAMES_MAX: usize = 1024;
/// Typed bytes kept for a guest that does not take them.
const CONSOLE_BYTES_MAX: usize = 64 * 1024;
/// Most events of the machine's lines (NMI, break) kept for a guest.
const SIGNALS_MAX: usize = 16;
/// A guest counts as computing when its last exit is this many input delays ago.
const COMPUTING_AFTER: u32 = 4;
/// Delay before a computing guest is kicked, so that a burst of inputs costs one slice.
const KICK_DELAY_MIN: Duration = Duration::from_micros(100);

/// State of a shutdown that the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Shutdown {
    #[default]
    No,
    /// The power button is to be pressed, if the guest listens.
    Wanted,
    /// The guest has until then.
    Grace { until: HostNs },
}

/// Where a run is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// At the guest's next exit, or at a slice.
    NextExit,
    /// Wherever the guest is.
    Now,
}

#[derive(Default)]
pub(super) struct Pending {
    pub(super) frames: VecDeque<Vec<u8>>,
    pub(super) console: VecDeque<u8>,
    /// The guest is to announce itself.
    pub(super) announce: bool,
    /// The guest's disk, and whether it may have a completion for the guest.
    disk: Option<Arc<Disk>>,
    disk_completed: bool,
    /// Events of the machine's own lines: interrupts, breaks.
    pub(super) signals: VecDeque<Input>,
    pub(super) shutdown: Shutdown,
    /// Why and where the run is to be stopped.
    pub(super) stop: Option<(StopCause, Urgency)>,
    /// An input has waited for an exit for as long as it may.
    pub(super) deadline_passed: bool,
    /// When the guest left its last exit: the clock and what it showed.
    pub(super) left: Option<(HostClock, HostNs)>,
    /// Time that a guest has to switch itself off.
    pub(super) grace: Duration,
    /// The vCPU's thread waits for [`InputQueue::arrived`].
    halted: bool,
    /// This host follows the other's log, so inputs that arrive here are not taken.
    closed: bool,
    /// The vCPU thread must look at something other than this queue's inputs.
    pub(super) attention: bool,
    kicker: Option<Box<dyn Kick>>,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
            && self.console.is_empty()
            && !self.announce
            && !self.disk_completed
            && self.signals.is_empty()
            && self.shutdown != Shutdown::Wanted
            && self.stop.is_none()
    }

    /// True while the disk may have a completion.
    pub(super) fn disk_completed(&self) -> bool {
        self.disk_completed
    }

    /// A completion of the disk.
    pub(super) fn take_disk_completion(&mut self) -> Option<Completion> {
        let disk = self.disk.as_ref().filter(|_| self.disk_completed)?;
        let completion = disk.take_completed();
        self.disk_completed = completion.is_some();
        completion
    }

    fn kick(&self) {
        if let Some(kicker) = &self.kicker {
            kicker.kick();
        }
    }
}

/// The queue between the host's event thread, which fills it, and the vCPU thread, which empties
/// it.
pub struct InputQueue {
    pending: Mutex<Pending>,
    arrived: Condvar,
    unrecorded: AtomicBool,
    /// The guest's last exit, for the status.
    last_exit: AtomicU64,
    /// Fires when there has been no exit for an input for long enough ([`Self::deadline_passed`]).
    input_timer: Arc<TimerFd>,
    input_delay: Duration,
    pulse: Pulse,
    /// Ends the process when a stop takes too long.
    stop_limit: OnceLock<Arc<StopLimit>>,
    network: Arc<NetWatch>,
}

impl InputQueue {
    /// A queue whose inputs wait for an exit of a recorded guest for `input_delay`, or for
    /// `KICK_DELAY_MIN` when the guest has been computing for long. [`Self::deadline_passed`]
    /// must be called when the timer `input_timer` fires.
    pub fn new(input_timer: Arc<TimerFd>, input_delay: Duration) -> Self {
        Self {
            pending: Mutex::default(),
            arrived: Condvar::new(),
            unrecorded: AtomicBool::new(false),
            last_exit: AtomicU64::new(0),
            input_timer,
            input_delay,
            pulse: Pulse::default(),
            stop_limit: OnceLock::new(),
            network: Arc::default(),
        }
    }

    /// Ends the process when the vCPU thread does not react to [`Self::stop`].
    pub fn limit_stops_with(&self, limit: Arc<StopLimit>) {
        let _ = self.stop_limit.set(limit);
    }

    /// Gives the queue the means to interrupt the running guest.
    pub fn kick_with(&self, kicker: Box<dyn Kick>) {
        self.lock().kicker = Some(kicker);
    }

    /// Says whether arriving inputs are dropped, because the guest follows another host's log.
    /// Returns whether a shutdown was under way: then this host is to end.
    pub fn set_closed(&self, closed: bool) -> bool {
        let mut pending = self.lock();
        let was_ending = closed && pending.shutdown != Shutdown::No;
        pending.closed = closed;
        if closed {
            // Requests to the guest from the time when this host was active are void.
            pending.shutdown = Shutdown::No;
            pending.signals.clear();
        }
        pending.announce &= !closed;
        // From now on this host delivers the disk's completions.
        if !closed && pending.disk_completed {
            self.input_arrived(pending, true);
        }
        was_ending
    }

    /// Gives the queue the guest's disk; [`Self::disk_completed`] says that it has a completion.
    pub fn take_from_disk(&self, disk: Arc<Disk>) {
        self.lock().disk = Some(disk);
    }

    /// The disk has a completion for a live guest. One that follows another's log finds it when it
    /// goes live.
    pub fn disk_completed(&self) {
        let mut pending = self.lock();
        let was_empty = pending.is_empty();
        // The vCPU thread may have taken the completion already.
        pending.disk_completed = pending.disk.as_ref().is_some_and(|disk| disk.has_completed());
        if pending.disk_completed && !pending.closed {
            self.input_arrived(pending, was_empty);
        }
    }

    /// Says whether inputs interrupt the running guest and reach it between exits, where no log
    /// could name them.
    pub fn set_unrecorded(&self, unrecorded: bool) {
        self.unrecorded.store(unrecorded, Ordering::Release);
    }

    pub(super) fn is_unrecorded(&self) -> bool {
        self.unrecorded.load(Ordering::Acquire)
    }

    /// The guest leaves this exit, or goes on between two.
    pub fn leave_exit(&self, at: Ordinal) {
        self.last_exit.store(at.0, Ordering::Relaxed);
        self.pulse.beat();
    }

    /// Whether the vCPU's thread makes progress.
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// The last exit the guest left.
    pub fn last_exit(&self) -> u64 {
        self.last_exit.load(Ordering::Relaxed)
    }

    /// Frames that waited when the queue was closed.
    pub fn take_frames(&self) -> Vec<Vec<u8>> {
        self.lock().frames.drain(..).collect()
    }

    /// Queues a frame from the tap. Returns the frame when this host does not take inputs.
    pub fn push_frame(&self, frame: Vec<u8>) -> Option<Vec<u8>> {
        let mut pending = self.lock();
        if pending.closed {
            return Some(frame);
        }
        let was_empty = pending.is_empty();
        if pending.frames.len() == FRAMES_MAX {
            pending.frames.pop_front();
            self.network.queue_dropped();
        }
        pending.frames.push_back(frame);
        self.input_arrived(pending, was_empty);
        None
    }

    /// Has the guest announce itself to the network.
    pub fn push_announce(&self) {
        let mut pending = self.lock();
        if pending.closed {
            return;
        }
        let was_empty = pending.is_empty();
        pending.announce = true;
        self.input_arrived(pending, was_empty);
    }

    /// What is known of the guest's network.
    pub fn network(&self) -> &Arc<NetWatch> {
        &self.network
    }

    /// Hands over typed bytes.
    pub fn push_console(&self, bytes: &[u8]) {
        let mut pending = self.lock();
        if pending.closed {
            return;
        }
        let was_empty = pending.is_empty();
        let room = CONSOLE_BYTES_MAX - pending.console.len();
        pending.console.extend(&bytes[..bytes.len().min(room)]);
        self.input_arrived(pending, was_empty);
    }

    /// Queues what was typed at the terminal.
    pub fn take_typed(&self, typed: Typed<'_>) {
        match typed {
            Typed::Bytes(bytes) => self.push_console(bytes),
            Typed::Break => self.push_signal(Input::ConsoleBreak),
            Typed::Quit => self.stop(StopCause::Requested, Urgency::NextExit),
        }
    }

    /// Sets how long a guest that listens to its power button may take to switch itself off.
    pub fn give_grace(&self, grace: Duration) {
        self.lock().grace = grace;
    }

    /// Presses the guest's power button and gives the guest time to switch itself off. Without such
    /// time, for a guest that does not handle the button, and when called again, this is
    /// [`Self::stop`].
    pub fn shut_down(&self) {
        let mut pending = self.lock();
        if pending.shutdown != Shutdown::No || pending.stop.is_some() || pending.grace.is_zero() {
            drop(pending);
            return self.stop(StopCause::Requested, Urgency::NextExit);
        }
        pending.shutdown = Shutdown::Wanted;
        if let Some(limit) = self.stop_limit.get() {
            limit.within(pending.grace + STOP_LONGEST, "the guest's shutdown");
        }
        self.input_arrived(pending, true);
    }

    /// Hands over an event of one of the machine's lines; more than [`SIGNALS_MAX`] at a time are
    /// dropped.
    pub fn push_signal(&self, signal: Input) {
        let mut pending = self.lock();
        if pending.closed || pending.signals.len() == SIGNALS_MAX {
            return;
        }
        let was_empty = pending.is_empty();
        pending.signals.push_back(signal);
        self.input_arrived(pending, was_empty);
    }

    /// Ends the run. A second call ends it at once, whatever its urgency.
    pub fn stop(&self, cause: StopCause, urgency: Urgency) {
        if let Some(limit) = self.stop_limit.get() {
            limit.order();
        }
        let mut pending = self.lock();
        let urgency = if pending.stop.is_some() { Urgency::Now } else { urgency };
        pending.stop = Some((cause, urgency));
        if urgency == Urgency::Now {
            pending.kick();
        }
        self.input_arrived(pending, true);
    }

    /// Whether the guest has been told to switch itself off, or the run to end.
    pub fn is_ending(&self) -> bool {
        let pending = self.lock();
        pending.shutdown != Shutdown::No || pending.stop.is_some()
    }

    /// Whether the run has been told to end.
    pub fn is_stopped(&self) -> bool {
        self.lock().stop.is_some()
    }

    /// A timer of the guest is due: the vCPU thread must sample the clock.
    pub fn timer_due(&self) {
        self.wake_vcpu(&self.lock());
    }

    /// Makes the vCPU thread check for requests.
    pub fn request_attention(&self) {
        let mut pending = self.lock();
        pending.attention = true;
        self.wake_vcpu(&pending);
    }

    /// An input has waited for an exit for as long as it may: stops the guest.
    pub fn deadline_passed(&self) {
        let mut pending = self.lock();
        pending.deadline_passed = !pending.is_empty();
        if pending.deadline_passed {
            pending.kick();
        }
    }

    /// Makes `KVM_RUN` return.
    pub fn kick_vcpu(&self) {
        self.lock().kick();
    }

    /// `is_first` says that nothing had been waiting before.
    fn input_arrived(&self, pending: MutexGuard<'_, Pending>, is_first: bool) {
        if pending.halted || self.is_unrecorded() {
            self.wake_vcpu(&pending);
        } else if is_first {
            let since =
                pending.left.map_or(Duration::ZERO, |(clock, at)| clock.host_now().since(at));
            let computes = since >= self.input_delay * COMPUTING_AFTER;
            let wait = if computes { KICK_DELAY_MIN } else { self.input_delay };
            set_timer(&self.input_timer, Some(wait));
        }
    }

    /// Wakes the vCPU's thread, whether it sleeps or runs the guest.
    fn wake_vcpu(&self, pending: &Pending) {
        if pending.halted {
            self.arrived.notify_one();
        } else {
            pending.kick();
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Pending> {
        lock(&self.pending)
    }

    /// Sleeps until something arrives or a timer fires, at most for `longest`.
    pub(super) fn sleep<'a>(
        &self,
        mut pending: MutexGuard<'a, Pending>,
        longest: Option<Duration>,
    ) -> MutexGuard<'a, Pending> {
        pending.halted = true;
        let _resting = self.pulse.idle();
        let mut pending = match longest {
            Some(longest) => wait_timeout(&self.arrived, pending, longest),
            None => wait(&self.arrived, pending),
        };
        pending.halted = false;
        pending
    }
}
