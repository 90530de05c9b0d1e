//! A host that comes while another is connected.

use core::net::SocketAddr;

use super::{RoleState, Session};
use crate::policy::Refusal;

impl Session {
    /// Why a host that connects beside the peer is sent away, when the one at `peer` is connected
    /// for `for_s` seconds. `None` where it may wait: the peer's place may be free in a moment.
    #[must_use]
    pub fn refuses_another(&self, peer: Option<SocketAddr>, for_s: u64) -> Option<Refusal> {
        match &self.state {
            RoleState::Primary(primary) if primary.has_backup() => {
                Some(Refusal::HasBackup { backup: peer, for_s })
            }
            RoleState::Backup(backup) if backup.has_primary() => {
                Some(Refusal::IsBackup { primary: peer, for_s })
            }
            _ => None,
        }
        .filter(|_| self.link.connected)
    }
}
