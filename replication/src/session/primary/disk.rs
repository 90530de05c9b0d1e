//! The guest's disk, of which each host has a copy: which completions the guest may get.

use super::{Phase, Primary};
use crate::policy::StopReason;
use crate::session::{Action, Context, leave};

impl Primary {
    /// A flush completes for the guest when the backup's disk has completed it too.
    pub(super) fn release_flushes(&mut self, cx: &mut Context<'_>) {
        if let Some(through) = self.flushes.release(self.gate.is_open()) {
            cx.act(Action::CompleteFlushes { through });
        }
    }

    pub(super) fn on_disk_failed(&self, cx: &mut Context<'_>, id: u64, description: String) {
        match self.phase {
            Phase::Protected => leave(cx, StopReason::DiskFailed { description }),
            // No other host could continue.
            _ => cx.act(Action::CompleteDisk { id }),
        }
    }

    /// Whether DiskFlushed is valid from this peer: it follows, or followed until now.
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
