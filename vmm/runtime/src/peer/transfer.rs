//! Sends the guest's state to a backup that attaches.

use std::sync::Arc;

use ftvmm_host::contain::Thread;
use ftvmm_host::sync::{MutexGuard, lock};
use ftvmm_replication::{DisconnectReason, SessionEvent, SnapshotMark, StatePart};

use super::Peer;
use crate::transfer::{
    Destination, FinalState, Transfer, TransferSummary, final_parts, send_state,
};

/// The machine is one message, which holds 16 MiB.
const MACHINE_BYTES_MAX: usize = 15 << 20;

/// The backup of the transfer with this number.
struct ToBackup {
    peer: Arc<Peer>,
    number: u64,
}

impl Destination for ToBackup {
    fn part(&self, part: StatePart) -> bool {
        let mut part = Some(part);
        self.peer.wait_for(|core, now_ns| match core.send_part(now_ns, self.number, &mut part) {
            Some(false) => None,
            sent => Some(sent.is_some()),
        })
    }

    fn finish(&self, last: FinalState) -> Option<SnapshotMark> {
        let parts: Vec<_> = final_parts(&last).collect();
        let FinalState { machine, disk_through, .. } = last;
        let (at, machine) = (machine.at, machine.encode());
        self.peer.tell(|core, now_ns| {
            if !core.transfer().is_number(self.number) {
                return;
            }
            for part in parts {
                core.step(now_ns, SessionEvent::State(part));
            }
            if machine.len() > MACHINE_BYTES_MAX {
                let description =
                    format!("the guest's devices have {} bytes of state", machine.len());
                return core.disconnect(now_ns, DisconnectReason::Transport { description });
            }
            core.step(now_ns, SessionEvent::StateEnd { at, machine, disk_through });
        });
        None
    }
}

impl Peer {
    /// Gives the peer the means to send the guest's state.
    pub fn transfer_with(self: &Arc<Self>, transfer: Arc<Transfer>) {
        let peer = Arc::downgrade(self);
        // A guest that waits for a slow backup must be able to stop for its state too.
        transfer.wakes_with(move || {
            if let Some(peer) = peer.upgrade() {
                peer.wake();
            }
        });
        let _ = self.sending.transfer.set(transfer);
        self.wake();
    }

    /// Sends the guest's state on a thread of its own.
    pub(super) fn send_state(self: &Arc<Self>, number: u64) {
        let peer = Arc::clone(self);
        let run = move || {
            let _one_at_a_time = lock(&peer.sending.one_at_a_time);
            let transfer = peer.wait_for(|core, _| match peer.sending.transfer.get() {
                _ if !core.session().is_attaching() => Some(None),
                Some(transfer) => Some(Some(Arc::clone(transfer))),
                None => None,
            });
            let Some(transfer) = transfer else { return };
            let destination = Arc::new(ToBackup { peer: Arc::clone(&peer), number });
            match send_state(&transfer, destination, &peer.sending.progress) {
                Some(summary) => peer.transfer_done(&summary),
                None => peer.transfer_failed(number),
            }
        };
        let started = Thread::Transfer.start(run);
        if let Err(error) = started {
            tracing::error!(%error, "no thread to send the guest's state");
        }
    }

    fn transfer_failed(self: &Arc<Self>, number: u64) {
        tracing::warn!("the backup does not have the guest's state");
        self.tell(|core, now_ns| {
            if core.session().is_attaching() && core.transfer().is_number(number) {
                let description = "the guest's state could not be sent".into();
                core.disconnect(now_ns, DisconnectReason::Transport { description });
            }
        });
    }

    fn transfer_done(&self, summary: &TransferSummary) {
        let TransferSummary { at, iterations, bytes, took_ns, stopped_ns, memory_copy_ns } =
            *summary;
        tracing::info!(
            %at,
            iterations,
            bytes,
            seconds = took_ns as f64 / 1e9,
            stopped_ms = stopped_ns as f64 / 1e6,
            of_a_memory_copy = stopped_ns as f64 / memory_copy_ns.max(1) as f64,
            "the guest's state is with the backup"
        );
        *self.last_attach() = Some(*summary);
        self.lock().count_attach(stopped_ns);
    }

    /// The summary of the last transfer.
    pub(super) fn last_attach(&self) -> MutexGuard<'_, Option<TransferSummary>> {
        lock(&self.sending.last)
    }
}
