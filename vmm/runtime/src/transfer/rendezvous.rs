//! Where the sender's thread and the vCPU thread meet: the sender's requests and the guest's
//! results.
//!
//! Only one state is sent at a time. A destination is with exactly one of the two: the sender
//! offers it and takes it back when the guest does not stop in time; once the vCPU's thread has it,
//! the sender waits until it is served.

use std::time::Duration;

use ftvmm_replication::Ordinal as ExitOrdinal;

use super::sync::atomic::{AtomicU8, Ordering};
use super::sync::{Condvar, Mutex, lock, wait, wait_timeout_while};

/// A request of the sender to the vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum TransferRequest {
    Nothing = 0,
    /// A dirty sync at the next exit: the copy of memory is renewed.
    DirtySync = 1,
    /// The rest of the state, as soon as the guest can be stopped.
    StopAndCopy = 2,
}

/// The guest's stop for stop-and-copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stop {
    /// The exit at which it stood.
    pub(super) at: ExitOrdinal,
    /// For how long, in nanoseconds.
    pub(super) stopped_ns: u64,
}

struct RendezvousState<D> {
    /// Where the last of the state goes, until the vCPU's thread takes it.
    destination: Option<D>,
    synced: bool,
    stopped: Option<Stop>,
    /// The longest of the dirty syncs.
    sync_ns: u64,
    /// The run is over: no thread may wait any more.
    ended: bool,
}

/// See the module documentation. `D` is where a state goes.
pub(super) struct Rendezvous<D> {
    /// Changed under the lock, read without it: the vCPU's thread looks at every exit.
    wanted: AtomicU8,
    state: Mutex<RendezvousState<D>>,
    changed: Condvar,
}

/// The sender's side.
impl<D> Rendezvous<D> {
    pub(super) fn new() -> Self {
        let (destination, stopped) = (None, None);
        let state =
            RendezvousState { destination, synced: false, stopped, sync_ns: 0, ended: false };
        let wanted = AtomicU8::new(TransferRequest::Nothing as u8);
        Self { wanted, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// A state is to be sent.
    pub(super) fn begin(&self) {
        lock(&self.state).sync_ns = 0;
    }

    /// Has the copy of memory renewed; `false` when the guest made no exit for `longest`. `wake`
    /// makes the vCPU thread see the request.
    pub(super) fn dirty_sync(&self, longest: Duration, wake: impl FnOnce()) -> bool {
        let mut state = lock(&self.state);
        state.synced = false;
        self.want(TransferRequest::DirtySync);
        drop(state);
        wake();
        let state = lock(&self.state);
        let open = |state: &mut RendezvousState<D>| !state.synced && !state.ended;
        let mut state = wait_timeout_while(&self.changed, state, longest, open);
        let timed_out = open(&mut state);
        if timed_out {
            self.done(TransferRequest::DirtySync);
        }
        !timed_out
    }

    /// Has the guest stopped and the last of its state handed to `destination`; `None` when it did
    /// not stop within `longest`, or has ended. `wake` as in [`Self::dirty_sync`].
    pub(super) fn stop(
        &self,
        destination: D,
        longest: Duration,
        wake: impl FnOnce(),
    ) -> Option<Stop> {
        let mut state = lock(&self.state);
        state.stopped = None;
        state.destination = Some(destination);
        self.want(TransferRequest::StopAndCopy);
        drop(state);
        wake();
        let state = lock(&self.state);
        let offered = |state: &mut RendezvousState<D>| state.destination.is_some() && !state.ended;
        let mut state = wait_timeout_while(&self.changed, state, longest, offered);
        if state.destination.take().is_some() {
            self.done(TransferRequest::StopAndCopy);
            return None;
        }
        while state.stopped.is_none() && !state.ended {
            state = wait(&self.changed, state);
        }
        state.stopped
    }

    /// The longest of the dirty syncs since [`Self::begin`], in nanoseconds.
    pub(super) fn sync_ns(&self) -> u64 {
        lock(&self.state).sync_ns
    }
}

/// The side of the vCPU's thread.
impl<D> Rendezvous<D> {
    /// Whether this is requested now.
    pub(super) fn wants(&self, what: TransferRequest) -> bool {
        self.wanted.load(Ordering::Acquire) == what as u8
    }

    /// The copy of memory is renewed, which took so long.
    pub(super) fn synced(&self, took_ns: u64) {
        let mut state = lock(&self.state);
        self.done(TransferRequest::DirtySync);
        state.synced = true;
        state.sync_ns = state.sync_ns.max(took_ns);
        drop(state);
        self.changed.notify_all();
    }

    /// The guest stands still: where the last of its state goes. `None` when the transfer
    /// was cancelled; otherwise [`Self::stopped`] or [`Self::end`] follows.
    pub(super) fn take_destination(&self) -> Option<D> {
        let mut state = lock(&self.state);
        self.done(TransferRequest::StopAndCopy);
        state.destination.take()
    }

    /// The destination has the last of the state.
    pub(super) fn stopped(&self, stop: Stop) {
        lock(&self.state).stopped = Some(stop);
        self.changed.notify_all();
    }

    /// The guest has ended: nothing more is given.
    pub(super) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    pub(super) fn has_ended(&self) -> bool {
        lock(&self.state).ended
    }

    fn want(&self, what: TransferRequest) {
        self.wanted.store(what as u8, Ordering::Release);
    }

    /// What was wanted is done. Something else may be wanted by now.
    fn done(&self, what: TransferRequest) {
        if self.wants(what) {
            self.want(TransferRequest::Nothing);
        }
    }
}
