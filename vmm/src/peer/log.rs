//! The log of a pair's guest, to the backup.

use std::sync::{Arc, MutexGuard};

use ftvmm_devices::Input;
use ftvmm_replication::{Event, Ordinal, Record};
use nix::sys::timerfd::TimerFd;

use super::state::State;
use super::{Peer, tail};
use crate::host::set_timer;
use crate::input::{InputError, LogSink, SLICE_GROUP_BYTES};

/// A backup that has so much to execute needs no further horizon soon.
const BUSY_EXITS: u64 = 512;

/// Sends the log to the backup.
pub struct PeerLog {
    peer: Arc<Peer>,
    tail: Arc<TimerFd>,
}

impl PeerLog {
    /// A log for `peer`; `tail` is [`Peer::tail_ticker`]'s timer.
    pub fn new(peer: Arc<Peer>, tail: Arc<TimerFd>) -> Self {
        Self { peer, tail }
    }

    /// Holds the guest, which must not get further ahead; not when it is wanted elsewhere.
    fn wait_while_congested(&self, mut state: MutexGuard<'_, State>) {
        let is_wanted = |state: &State| {
            state.yield_wanted
                || state.joining
                || self.peer.shipment.get().is_some_and(|s| s.wants_rest())
        };
        while state.congested && state.stop.is_none() && !is_wanted(&state) {
            state = self.peer.wait_as_guest(state);
        }
    }
}

impl LogSink for PeerLog {
    fn append(&mut self, record: &Record) -> Result<(), InputError> {
        let mut state = self.peer.lock();
        if state.records_log() {
            state.log.push(&record.without_disk_data());
            state.unsent = true;
            state.client_waits |=
                matches!(record.event, Event::Input(Input::NetRx { .. } | Input::ConsoleRx { .. }));
            // A big slice fills several groups while the guest stands still.
            if state.log.body_bytes() >= SLICE_GROUP_BYTES {
                self.peer.send_log(&mut state);
            }
        }
        Ok(())
    }

    fn exit_complete(&mut self, at: Ordinal) -> Result<(), InputError> {
        let mut state = self.peer.lock();
        if !state.records_log() {
            self.wait_while_congested(state);
            return Ok(());
        }
        state.horizon = at;
        state.unsent = true;
        let now_ns = self.peer.clock.host_now_ns();
        let pause_ns = state.horizon_ns.max(tail::pause_ns(state.send_cost_ns));
        let unsent_since_ns = *state.unsent_since_ns.get_or_insert(now_ns);
        let due = if state.session.lag_exits() >= BUSY_EXITS {
            at.0 >= state.sent_horizon.0 + BUSY_EXITS / 2
        } else {
            // What a client waits for need not wait for more.
            let since_ns = if state.client_waits { state.log_sent_ns } else { unsent_since_ns };
            now_ns >= since_ns + pause_ns
        };
        if due {
            self.peer.send_log(&mut state);
        } else if !std::mem::replace(&mut state.tail_armed, true) {
            set_timer(&self.tail, Some(tail::longest(state.send_cost_ns)));
        }
        if state.congested {
            self.peer.send_log(&mut state);
        }
        self.wait_while_congested(state);
        Ok(())
    }

    fn idle(&mut self) -> Result<(), InputError> {
        let mut state = self.peer.lock();
        // A horizon alone is not worth a message now: the timer or the next input takes it along.
        if state.log.record_count() > 0 {
            self.peer.send_log(&mut state);
        }
        Ok(())
    }
}
