//! The calls of the vCPU thread to the peer.

use std::sync::Arc;
use std::sync::atomic::Ordering as MemoryOrdering;

use ftvmm_replication::policy::StopReason;
use ftvmm_replication::{End, Ordinal, StatePart};

use super::Peer;

/// A change of roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoleChange {
    /// The session is over.
    Stopped,
    /// The other host is active, or was until now. Its log begins after this exit.
    Follow {
        /// The exit.
        through: Ordinal,
    },
    /// This host does.
    Live,
}

impl Peer {
    /// Carries out a change of roles if one is due; `None` when nothing has changed.
    pub(super) fn change_role(self: &Arc<Self>) -> Option<RoleChange> {
        if !self.roles_changed.swap(false, MemoryOrdering::AcqRel) {
            return None;
        }
        let since_ns = self.clocks.session.host_now_ns();
        if self.lock().wants_yield() && self.tell(|core, now_ns| core.change_role(now_ns)) {
            self.wait_as_guest(|core, _| {
                let is_over = !core.session().is_yielding() || core.stop().is_some();
                is_over.then_some(())
            });
            let stood_ms = (self.clocks.session.host_now_ns() - since_ns) as f64 / 1e6;
            tracing::info!(stood_ms, "the guest stood still for a change of roles");
        }
        let mut core = self.lock();
        let is_active = core.follower().is_active();
        Some(match core.stop() {
            Some(_) => RoleChange::Stopped,
            // Also when this host has gone live meanwhile: it first executes the log it was sent.
            None if is_active => RoleChange::Follow { through: core.log().horizon() },
            None => RoleChange::Live,
        })
    }

    /// The next part of the state that this host receives; `None` when the session is over.
    pub(super) fn next_part(self: &Arc<Self>) -> Option<StatePart> {
        self.wait_as_guest(|core, _| match core.stop() {
            Some(_) => Some(None),
            None => core.follower().next_part().map(Some),
        })
    }

    /// Reports that a part of the other host's state is restored; the last part completes it.
    pub(super) fn has_restored(self: &Arc<Self>, part: &StatePart, is_whole: bool) {
        let progress = &self.sending.progress;
        progress.take(part);
        if is_whole {
            progress.end();
        }
        let part_bytes = part.len_bytes();
        self.tell(|core, now_ns| core.part_restored(now_ns, part_bytes, is_whole));
    }

    /// Tells the other host how the guest ended here and waits until both know. `at` is the first
    /// exit the guest did not get past.
    pub fn guest_ended(self: &Arc<Self>, at: Ordinal, end: End) -> StopReason {
        self.tell(|core, now_ns| core.guest_ended(now_ns, at, end));
        self.wait_for_stop()
    }

    /// Tells the other host that this one cannot follow, and waits for what is decided; `None` when
    /// this host is to go on, with a state that is on its way or with its own.
    pub(super) fn report_fault(self: &Arc<Self>, description: String) -> Option<StopReason> {
        tracing::error!(description, "this host cannot follow the log");
        self.tell(|core, now_ns| core.fault(now_ns, description));
        self.wait_as_guest(|core, _| match core.stop() {
            Some(reason) => Some(Some(reason.clone())),
            None if core.is_joining() || !core.follows() => Some(None),
            None => None,
        })
    }

    /// As [`Self::report_fault`], for a run that cannot be gone on with.
    pub fn fault(self: &Arc<Self>, description: String) -> StopReason {
        match self.report_fault(description) {
            Some(reason) => reason,
            None => self.stop_now(),
        }
    }
}
