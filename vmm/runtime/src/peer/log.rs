//! The log of a pair's guest, to the backup.

use std::sync::Arc;

use ftvmm_replication::{Ordinal, PeerCore, Record};

use super::Peer;
use crate::input::{InputError, LogSink};

/// Sends the log to the backup.
pub struct PeerLog {
    peer: Arc<Peer>,
}

impl PeerLog {
    /// A log for `peer`.
    pub fn new(peer: Arc<Peer>) -> Self {
        Self { peer }
    }

    /// Makes the guest wait while the backup is too far behind, unless it has to change roles or
    /// stop for a transfer.
    fn wait_while_congested(&self) {
        let transfer = &self.peer.sending.transfer;
        let is_wanted = |core: &PeerCore| {
            core.wants_yield()
                || core.is_joining()
                || transfer.get().is_some_and(|transfer| transfer.wants_stop())
        };
        self.peer.wait_as_guest(|core, _| {
            let goes_on = !core.is_congested() || core.stop().is_some() || is_wanted(core);
            goes_on.then_some(())
        });
    }
}

impl LogSink for PeerLog {
    fn append(&mut self, record: &Record) -> Result<(), InputError> {
        self.peer.tell(|core, now_ns| core.append(now_ns, record));
        Ok(())
    }

    fn exit_complete(&mut self, at: Ordinal) -> Result<(), InputError> {
        let must_wait = self.peer.tell(|core, now_ns| {
            core.exit_complete(now_ns, at);
            core.is_congested()
        });
        if must_wait {
            self.wait_while_congested();
        }
        Ok(())
    }

    fn idle(&mut self) -> Result<(), InputError> {
        self.peer.tell(|core, now_ns| core.idle(now_ns));
        Ok(())
    }
}
