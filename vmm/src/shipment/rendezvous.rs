//! Where the sender's thread and the vCPU's thread meet: what is wanted of the guest, and what it
//! gave.
//!
//! Only one state is sent at a time. A destination is with exactly one of the two: the sender
//! offers it and takes it back when the guest does not stop in time; once the vCPU's thread has it,
//! the sender waits until it is served.

use std::time::Duration;

use ftvmm_replication::Ordinal as ExitOrdinal;

use super::sync::atomic::{AtomicU8, Ordering};
use super::sync::{Condvar, Mutex, lock, wait, wait_timeout_while};

/// What the sender wants of the vCPU's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Wanted {
    Nothing = 0,
    /// A look at memory at the next exit, which renews the copy.
    Look = 1,
    /// The rest, as soon as the guest can be stopped.
    Rest = 2,
}

/// The guest's stop for the rest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stop {
    /// The exit at which it stood.
    pub(super) at: ExitOrdinal,
    /// For how long, in nanoseconds.
    pub(super) stopped_ns: u64,
}

struct Meeting<D> {
    /// Where the rest is to go, until the vCPU's thread takes it.
    destination: Option<D>,
    looked: bool,
    stopped: Option<Stop>,
    /// The longest of the looks.
    look_ns: u64,
    /// The run is over: nothing is to be waited for.
    ended: bool,
}

/// See the module documentation. `D` is where a state goes.
pub(super) struct Rendezvous<D> {
    /// Changed under the lock, read without it: the vCPU's thread looks at every exit.
    wanted: AtomicU8,
    meeting: Mutex<Meeting<D>>,
    changed: Condvar,
}

/// The sender's side.
impl<D> Rendezvous<D> {
    pub(super) fn new() -> Self {
        let (destination, stopped) = (None, None);
        let meeting = Meeting { destination, looked: false, stopped, look_ns: 0, ended: false };
        let wanted = AtomicU8::new(Wanted::Nothing as u8);
        Self { wanted, meeting: Mutex::new(meeting), changed: Condvar::new() }
    }

    /// A state is to be sent.
    pub(super) fn begin(&self) {
        lock(&self.meeting).look_ns = 0;
    }

    /// Has the copy of memory renewed; `false` when the guest made no exit for `longest`. `wake`
    /// makes the vCPU's thread see what is wanted.
    pub(super) fn look(&self, longest: Duration, wake: impl FnOnce()) -> bool {
        let mut meeting = lock(&self.meeting);
        meeting.looked = false;
        self.want(Wanted::Look);
        drop(meeting);
        wake();
        let meeting = lock(&self.meeting);
        let open = |meeting: &mut Meeting<D>| !meeting.looked && !meeting.ended;
        let mut meeting = wait_timeout_while(&self.changed, meeting, longest, open);
        let timed_out = open(&mut meeting);
        if timed_out {
            self.done(Wanted::Look);
        }
        !timed_out
    }

    /// Has the guest stopped and the rest handed to `destination`; `None` when it did not stop
    /// within `longest`, or has ended. `wake` as in [`Self::look`].
    pub(super) fn stop(
        &self,
        destination: D,
        longest: Duration,
        wake: impl FnOnce(),
    ) -> Option<Stop> {
        let mut meeting = lock(&self.meeting);
        meeting.stopped = None;
        meeting.destination = Some(destination);
        self.want(Wanted::Rest);
        drop(meeting);
        wake();
        let meeting = lock(&self.meeting);
        let offered = |meeting: &mut Meeting<D>| meeting.destination.is_some() && !meeting.ended;
        let mut meeting = wait_timeout_while(&self.changed, meeting, longest, offered);
        if meeting.destination.take().is_some() {
            self.done(Wanted::Rest);
            return None;
        }
        while meeting.stopped.is_none() && !meeting.ended {
            meeting = wait(&self.changed, meeting);
        }
        meeting.stopped
    }

    /// The longest of the looks since [`Self::begin`], in nanoseconds.
    pub(super) fn look_ns(&self) -> u64 {
        lock(&self.meeting).look_ns
    }
}

/// The side of the vCPU's thread.
impl<D> Rendezvous<D> {
    /// Whether this is wanted now.
    pub(super) fn wants(&self, what: Wanted) -> bool {
        self.wanted.load(Ordering::Acquire) == what as u8
    }

    /// The copy of memory is renewed, which took so long.
    pub(super) fn looked(&self, took_ns: u64) {
        let mut meeting = lock(&self.meeting);
        self.done(Wanted::Look);
        meeting.looked = true;
        meeting.look_ns = meeting.look_ns.max(took_ns);
        drop(meeting);
        self.changed.notify_all();
    }

    /// The guest stands still: where its rest is to go. `None` when nobody wants it any more;
    /// otherwise [`Self::stopped`] or [`Self::end`] follows.
    pub(super) fn take_destination(&self) -> Option<D> {
        let mut meeting = lock(&self.meeting);
        self.done(Wanted::Rest);
        meeting.destination.take()
    }

    /// The rest is where it was to go.
    pub(super) fn stopped(&self, stop: Stop) {
        lock(&self.meeting).stopped = Some(stop);
        self.changed.notify_all();
    }

    /// The guest has ended: nothing more is given.
    pub(super) fn end(&self) {
        lock(&self.meeting).ended = true;
        self.changed.notify_all();
    }

    pub(super) fn has_ended(&self) -> bool {
        lock(&self.meeting).ended
    }

    fn want(&self, what: Wanted) {
        self.wanted.store(what as u8, Ordering::Release);
    }

    /// What was wanted is done. Something else may be wanted by now.
    fn done(&self, what: Wanted) {
        if self.wants(what) {
            self.want(Wanted::Nothing);
        }
    }
}
