//! The log of a pair's guest: to the backup, and to a recording if there is one.

use std::sync::Arc;

use ftvmm_replication::{Ordinal, PeerCore, Record};

use super::Peer;
use crate::host::WriteBehind;
use crate::input::{FileLog, InputError, LogSink};

type Recording = FileLog<WriteBehind>;

/// Sends the log to the backup, and to a recording if there is one.
pub struct PeerLog {
    peer: Arc<Peer>,
    recording: Option<Recording>,
}

impl PeerLog {
    /// A log for `peer`.
    pub fn new(peer: Arc<Peer>, recording: Option<Recording>) -> Self {
        Self { peer, recording }
    }

    /// The recording, to end it.
    pub fn into_recording(self) -> Option<Recording> {
        self.recording
    }

    /// Holds the guest, which must not get further ahead; not when it is wanted elsewhere.
    fn wait_while_congested(&self) {
        let shipment = &self.peer.sending.shipment;
        let is_wanted = |core: &PeerCore| {
            core.wants_yield()
                || core.is_joining()
                || shipment.get().is_some_and(|shipment| shipment.wants_rest())
        };
        self.peer.wait_as_guest(|core, _| {
            let goes_on = !core.is_congested() || core.stop().is_some() || is_wanted(core);
            goes_on.then_some(())
        });
    }
}

impl LogSink for PeerLog {
    fn append(&mut self, record: &Record) -> Result<(), InputError> {
        if let Some(recording) = &mut self.recording {
            recording.append(record)?;
        }
        self.peer.tell(|core, now_ns| core.append(now_ns, record));
        Ok(())
    }

    fn left(&mut self, at: Ordinal) -> Result<(), InputError> {
        if let Some(recording) = &mut self.recording {
            recording.left(at)?;
        }
        let must_wait = self.peer.tell(|core, now_ns| {
            core.exit_complete(now_ns, at);
            core.is_congested()
        });
        if must_wait {
            self.wait_while_congested();
        }
        Ok(())
    }

    fn rest(&mut self) -> Result<(), InputError> {
        self.peer.tell(|core, now_ns| core.idle(now_ns));
        Ok(())
    }
}
