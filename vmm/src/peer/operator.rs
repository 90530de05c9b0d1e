//! Answers for one half of a pair (`--control`).

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, MutexGuard, TryLockError};

use ftvmm_devices::Input;
use ftvmm_replication::SessionEvent;

use super::state::State;
use super::{Channel, Peer};
use crate::control::{
    AttachProgress, AttachSummary, Operator, Refused, Role, SnapshotSummary, Status, link,
};
use crate::host::Console;
use crate::shipment::save;

/// Answers for the run of this [`Peer`].
pub struct PeerOperator {
    peer: Arc<Peer>,
    console: Arc<Console>,
}

impl PeerOperator {
    /// Answers for `peer`, whose guest prints to `console`.
    pub fn new(peer: Arc<Peer>, console: Arc<Console>) -> Self {
        Self { peer, console }
    }
}

impl Operator for PeerOperator {
    fn status(&self) -> Status {
        let exit = self.peer.queue.last_exit();
        let state = self.peer.lock();
        let role = if state.follows() { Role::Backup } else { Role::Primary };
        Status {
            role,
            state: state.session.state_name().into(),
            protected: state.session.is_protected(),
            term: state.session.term().map(|term| term.0),
            peer: state.channel.as_ref().and_then(|channel| channel.peer_address()),
            exit,
            stuck_ms: self.peer.queue.pulse().stuck_ns().map(|ns| ns / 1_000_000),
            outputs: state.counters.outputs,
            network: self.peer.queue.network().report(),
            log_bytes: state.counters.log_bytes,
            lag_exits: state.session.lag_exits(),
            divergences: state.counters.divergences,
            takeovers: state.counters.takeovers,
            takeover_us: state.counters.takeover_ns.map(|ns| ns / 1000),
            link: state.tap.as_ref().map(link),
            peer_link_up: state.session.client_links().1.filter(|_| state.tap.is_some()),
            console_dropped_bytes: self.console.dropped_bytes(),
            uptime_ms: self.peer.clock.host_now_ns() / 1_000_000,
            listen: state.listens_at,
            attach: state.is_transferring().then(|| self.progress()),
            last_attach: state.counters.last_attach.map(|shipped| AttachSummary {
                duration_ms: shipped.took_ns / 1_000_000,
                stopped_us: shipped.stopped_ns / 1000,
                memory_copy_us: shipped.memory_copy_ns / 1000,
                bytes: shipped.bytes,
                rounds: shipped.rounds,
            }),
        }
    }

    fn attach(&self, listen: SocketAddr) -> Result<(), Refused> {
        // It goes on listening where it was told at its start.
        if self.peer.lock().listens_at == Some(listen) {
            return Ok(());
        }
        let listener = Channel::listen(listen)
            .map_err(|error| Refused::BadArgument { why: error.to_string() })?;
        self.peer.listen(listener);
        Ok(())
    }

    fn detach(&self) -> Result<(), Refused> {
        let mut state = self.peer.lock();
        if !(state.session.may_yield() || state.session.is_attaching()) {
            return Err(Refused::not_now("no backup follows this host"));
        }
        self.peer.step_locked(&mut state, SessionEvent::Detach);
        self.settled(state, |state| state.session.takes_newcomers())
    }

    fn switch(&self) -> Result<(), Refused> {
        let mut state = self.peer.lock();
        if state.follows() {
            return Err(Refused::not_now("this host is the backup; ask the primary"));
        }
        if !state.session.may_yield() {
            return Err(Refused::not_now("no backup follows this host"));
        }
        self.peer.want_switch(&mut state);
        let state =
            self.wait_while(state, |state| state.yield_wanted || state.session.is_yielding());
        if state.follows() {
            return Ok(());
        }
        Err(Refused::Failed { why: "the backup did not take over; the guest goes on here".into() })
    }

    fn snapshot(&self, path: &Path) -> Result<SnapshotSummary, Refused> {
        let Some(shipment) = self.peer.shipment.get() else {
            return Err(Refused::not_now("the guest is not switched on yet"));
        };
        let _one_at_a_time = match self.peer.ships.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Refused::not_now("the guest's state is on its way already"));
            }
        };
        if self.peer.follows() {
            return Err(Refused::not_now("this host is the backup; ask the primary"));
        }
        Ok(save(shipment, &self.peer.gauge, path)?.into())
    }

    fn nmi(&self) -> Result<(), Refused> {
        if self.peer.follows() {
            return Err(Refused::not_now("this host is the backup; ask the primary"));
        }
        self.peer.queue.push_signal(Input::Nmi);
        Ok(())
    }

    fn stop(&self) -> Result<(), Refused> {
        self.peer.host_stop();
        Ok(())
    }
}

impl PeerOperator {
    fn progress(&self) -> AttachProgress {
        let (progress, bytes_per_second) = self.peer.gauge.read();
        AttachProgress {
            phase: "memory".into(),
            round: progress.round,
            bytes: progress.bytes,
            total_bytes: progress.total_bytes,
            bytes_per_second,
        }
    }

    fn wait_while<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        goes_on: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while state.stop.is_none() && goes_on(&state) {
            state = self.peer.wait(state);
        }
        state
    }

    fn settled(
        &self,
        state: MutexGuard<'_, State>,
        done: impl Fn(&State) -> bool,
    ) -> Result<(), Refused> {
        let state = self.wait_while(state, |state| !done(state));
        match &state.stop {
            None => Ok(()),
            Some(reason) => Err(Refused::Failed { why: reason.to_string() }),
        }
    }
}
