//! The guest's disk, of which each host has its own: what the guest may be told of it.

use super::{Phase, Primary};
use crate::policy::StopReason;
use crate::session::{Action, Context, leave};

impl Primary {
    /// The guest is told that a flush is done when the backup's disk has it too.
    pub(super) fn release_flushes(&mut self, cx: &mut Context<'_>) {
        if let Some(through) = self.flushes.release(self.gate.is_open()) {
            cx.act(Action::CompleteFlushes { through });
        }
    }

    pub(super) fn on_disk_failed(&self, cx: &mut Context<'_>, id: u64, description: String) {
        match self.phase {
            Phase::Protected => leave(cx, StopReason::DiskFailed { description }),
            // Nobody else could go on.
            _ => cx.act(Action::CompleteDisk { id }),
        }
    }

    /// Whether a backup that follows, or followed until now, may say how far its disk is.
    pub(super) fn takes_flushes(&self) -> bool {
        matches!(
            self.phase,
            Phase::Protected
                | Phase::AwaitingEvidence { .. }
                | Phase::Attaching { gated: true }
                | Phase::Yielding(_)
                | Phase::ClaimingTerm { .. }
        )
    }
}
