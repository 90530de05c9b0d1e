//! Answers for one half of a pair (`--control`).

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, TryLockError};

use ftvmm_devices::Input;
use ftvmm_host::Console;
use ftvmm_host::channel::Channel;
use ftvmm_host::folder::Folder;
use ftvmm_replication::SessionEvent;

use super::Peer;
use crate::control::{
    AttachProgress, AttachSummary, ControlRole, ControlWitness, Operator, Refused, SnapshotSummary,
    Status, link,
};
use crate::transfer::save;

/// Answers for the run of this [`Peer`].
pub struct PeerOperator {
    peer: Arc<Peer>,
    console: Arc<Console>,
    snapshots: Folder,
}

impl PeerOperator {
    /// Answers for `peer`, whose guest prints to `console`; snapshots go into the folder
    /// `snapshots`.
    pub fn new(peer: Arc<Peer>, console: Arc<Console>, snapshots: Folder) -> Self {
        Self { peer, console, snapshots }
    }
}

impl Operator for PeerOperator {
    fn status(&self) -> Status {
        let exit = self.peer.queue.last_exit();
        let address = self.peer.address();
        let (peer, listen) = (address.peer, address.listens_at);
        drop(address);
        let last_attach = *self.peer.last_attach();
        let core = self.peer.lock();
        let (session, counters) = (core.session(), core.counters());
        let tap = self.peer.network.tap.as_ref();
        Status {
            role: if core.follows() { ControlRole::Backup } else { ControlRole::Primary },
            state: session.state_name().into(),
            protected: session.is_protected(),
            transmits: session.may_speak(self.peer.clocks.session.host_now_ns()),
            term: session.term().map(|term| term.0),
            peer: peer.filter(|_| core.is_connected()),
            exit,
            stuck_ms: self.peer.queue.pulse().stuck_ns().map(|ns| ns / 1_000_000),
            outputs: counters.outputs,
            network: self.peer.queue.network().report(),
            log_bytes: counters.log_bytes,
            lag_exits: session.lag_exits(),
            divergences: counters.divergences,
            takeovers: counters.takeovers,
            takeover_us: counters.takeover_ns.map(|ns| ns / 1000),
            link: tap.map(link),
            peer_link_up: session.client_links().1.filter(|_| tap.is_some()),
            witness: core.witness_is_common().map(ControlWitness::of),
            console_dropped_bytes: self.console.dropped_bytes(),
            uptime_ms: self.peer.clocks.guest.host_now_ns() / 1_000_000,
            listen,
            attach: core.is_transferring().then(|| self.progress()),
            last_attach: last_attach.map(|summary| AttachSummary {
                duration_ms: summary.took_ns / 1_000_000,
                stopped_us: summary.stopped_ns / 1000,
                memory_copy_us: summary.memory_copy_ns / 1000,
                bytes: summary.bytes,
                rounds: summary.iterations,
            }),
        }
    }

    fn attach(&self, listen: SocketAddr) -> Result<(), Refused> {
        // It goes on listening where it was told at its start.
        if self.peer.address().listens_at == Some(listen) {
            return Ok(());
        }
        let listener = Channel::listen(listen, &self.peer.port.security)
            .map_err(|error| Refused::BadArgument { why: error.to_string() })?;
        self.peer.listen(listener);
        Ok(())
    }

    fn detach(&self) -> Result<(), Refused> {
        self.peer.tell(|core, now_ns| {
            let session = core.session();
            if !(session.may_yield() || session.is_attaching()) {
                return Err(Refused::not_now("no backup follows this host"));
            }
            core.step(now_ns, SessionEvent::Detach);
            Ok(())
        })?;
        self.peer.wait_for(|core, _| match core.stop() {
            Some(reason) => Some(Err(Refused::Failed { why: reason.to_string() })),
            None => core.session().accepts_backup().then_some(Ok(())),
        })
    }

    fn switch(&self) -> Result<(), Refused> {
        self.peer.tell(|core, _| {
            if core.follows() {
                return Err(Refused::not_now("this host is the backup; ask the primary"));
            }
            if !core.session().may_yield() {
                return Err(Refused::not_now("no backup follows this host"));
            }
            core.want_switch();
            Ok(())
        })?;
        let has_switched = self.peer.wait_for(|core, _| {
            let is_over =
                core.stop().is_some() || !(core.wants_yield() || core.session().is_yielding());
            is_over.then(|| core.follows())
        });
        match has_switched {
            true => Ok(()),
            false => Err(Refused::Failed {
                why: "the backup did not take over; the guest goes on here".into(),
            }),
        }
    }

    fn snapshot(&self, path: &Path) -> Result<SnapshotSummary, Refused> {
        let Some(transfer) = self.peer.sending.transfer.get() else {
            return Err(Refused::not_now("the guest has not started yet"));
        };
        let _one_at_a_time = match self.peer.sending.one_at_a_time.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Refused::not_now("a state transfer is already running"));
            }
        };
        if self.peer.follows() {
            return Err(Refused::not_now("this host is the backup; ask the primary"));
        }
        Ok(save(transfer, &self.peer.sending.progress, &self.snapshots, path)?.into())
    }

    fn nmi(&self) -> Result<(), Refused> {
        if self.peer.follows() {
            return Err(Refused::not_now("this host is the backup; ask the primary"));
        }
        self.peer.queue.push_signal(Input::Nmi);
        Ok(())
    }

    fn stop(&self) -> Result<(), Refused> {
        self.peer.stop_requested();
        Ok(())
    }
}

impl PeerOperator {
    fn progress(&self) -> AttachProgress {
        let (progress, bytes_per_second) = self.peer.sending.progress.read();
        AttachProgress {
            phase: "memory".into(),
            round: progress.iteration,
            bytes: progress.bytes,
            total_bytes: progress.total_bytes,
            bytes_per_second,
        }
    }
}
