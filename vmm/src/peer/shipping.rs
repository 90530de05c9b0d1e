//! The guest's state on its way to a backup that attaches.

use std::sync::{Arc, PoisonError};

use ftvmm_replication::{DisconnectReason, SessionEvent, SnapshotMark, StatePart};

use super::Peer;
use crate::shipment::{Destination, Rest, Shipment, Shipped, rest_parts, ship};

/// Bytes of parts on their way that the backup has not put in place: enough to keep the channel busy, little
/// enough that both sides have them in memory.
const WINDOW_BYTES: u64 = 4 << 20;

/// The machine is one message, which holds 16 MiB.
const MACHINE_BYTES_MAX: usize = 15 << 20;

/// The backup of the shipment with this number.
struct ToBackup {
    peer: Arc<Peer>,
    number: u64,
}

impl Destination for ToBackup {
    fn part(&self, part: StatePart) -> bool {
        let mut state = self.peer.lock();
        loop {
            let wanted = state.session.is_attaching() && state.shipping.number == self.number;
            if !wanted {
                return false;
            }
            if state.shipping.sent_bytes - state.shipping.taken_bytes <= WINDOW_BYTES {
                break;
            }
            state = self.peer.wait(state);
        }
        state.shipping.sent_bytes += part.len_bytes();
        self.peer.step_locked(&mut state, SessionEvent::State(part));
        true
    }

    fn rest(&self, rest: Rest) -> Option<SnapshotMark> {
        let parts: Vec<_> = rest_parts(&rest).collect();
        let mut state = self.peer.lock();
        if state.shipping.number != self.number {
            return None;
        }
        for part in parts {
            self.peer.step_locked(&mut state, SessionEvent::State(part));
        }
        let Rest { machine, disk_through, .. } = rest;
        let (at, machine) = (machine.at, machine.encode());
        if machine.len() > MACHINE_BYTES_MAX {
            let description = format!("the guest's devices have {} bytes of state", machine.len());
            let now_ns = self.peer.clock().host_now_ns();
            state.disconnect(now_ns, DisconnectReason::Transport { description });
            return None;
        }
        self.peer.step_locked(&mut state, SessionEvent::StateEnd { at, machine, disk_through });
        None
    }
}

impl Peer {
    /// Gives the peer the means to ship the guest.
    pub fn ship_with(self: &Arc<Self>, shipment: Arc<Shipment>) {
        let peer = Arc::downgrade(self);
        // A guest that waits because the backup is behind is to stop for its state all the same.
        shipment.wakes_with(move || {
            if let Some(peer) = peer.upgrade() {
                drop(peer.lock());
                peer.changed.notify_all();
            }
        });
        let _ = self.shipment.set(shipment);
        self.changed.notify_all();
    }

    /// Ships the guest on a thread of its own.
    pub(super) fn ship(self: &Arc<Self>, number: u64) {
        let peer = Arc::clone(self);
        let run = move || {
            let _one_at_a_time = peer.ships.lock().unwrap_or_else(PoisonError::into_inner);
            let mut state = peer.lock();
            let shipment = loop {
                match peer.shipment.get() {
                    _ if !state.session.is_attaching() => return,
                    Some(shipment) => break Arc::clone(shipment),
                    None => state = peer.wait(state),
                }
            };
            drop(state);
            let destination = Arc::new(ToBackup { peer: Arc::clone(&peer), number });
            match ship(&shipment, destination, &peer.gauge) {
                Some(shipped) => peer.has_shipped(&shipped),
                None => peer.has_not_shipped(number),
            }
        };
        let started = std::thread::Builder::new().name("shipment".into()).spawn(run);
        if let Err(error) = started {
            tracing::error!(%error, "no thread to send the guest's state");
        }
    }

    fn has_not_shipped(self: &Arc<Self>, number: u64) {
        tracing::warn!("the backup does not have the guest's state");
        let state = self.lock();
        let is_expected = state.session.is_attaching() && state.shipping.number == number;
        drop(state);
        if is_expected {
            let description = "the guest's state could not be sent".into();
            self.disconnect(DisconnectReason::Transport { description });
        }
    }

    fn has_shipped(&self, shipped: &Shipped) {
        let Shipped { at, rounds, bytes, took_ns, stopped_ns, memory_copy_ns } = *shipped;
        tracing::info!(
            %at,
            rounds,
            bytes,
            seconds = took_ns as f64 / 1e9,
            stopped_ms = stopped_ns as f64 / 1e6,
            of_a_memory_copy = stopped_ns as f64 / memory_copy_ns.max(1) as f64,
            "the guest's state is with the backup"
        );
        let counters = &mut self.lock().counters;
        counters.attaches += 1;
        counters.last_attach = Some(*shipped);
        counters.attach_stopped_ns = counters.attach_stopped_ns.max(Some(stopped_ns));
    }
}
