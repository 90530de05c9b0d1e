//! What may leave, how far the backup is behind, and when the guest has to wait for it.

use super::{Phase, Primary, Yielding};
use crate::session::{Action, Context};

impl Primary {
    pub(super) fn release(&mut self, cx: &mut Context<'_>) {
        if matches!(
            self.phase,
            Phase::Protected
                | Phase::Alone
                | Phase::Attaching { gated: false }
                | Phase::Yielding(Yielding { follows: true, asked: false, .. })
        ) {
            self.gate.release(|frame| cx.actions.push(Action::Transmit(frame)));
            self.release_flushes(cx);
        }
    }

    pub(in crate::session) fn lag_exits(&self) -> u64 {
        self.window.unexecuted_exits()
    }

    /// Notes when the backup last got further, or had nothing to do.
    pub(super) fn watch_progress(&mut self, cx: &Context<'_>) {
        let progress = (self.window.executed_through(), self.gate.matched_through());
        if !self.owes_progress() || progress != self.progress {
            self.progress = progress;
            self.progress_ns = cx.now_ns;
        }
    }

    pub(super) fn owes_progress(&self) -> bool {
        matches!(self.phase, Phase::Protected)
            && (self.window.unexecuted_exits() > 0
                || self.gate.held_frames() > 0
                || self.flushes.holds_any())
    }

    pub(super) fn update_congestion(&mut self, cx: &mut Context<'_>) {
        let limits = cx.config.limits;
        let scale = if self.congested { 2 } else { 1 };
        let above = self.window.unexecuted_bytes() * scale >= limits.log_bytes_max
            || self.window.unexecuted_exits() * scale >= limits.lag_exits_max
            || self.gate.held_frames() * scale >= limits.gated_frames_max
            || self.gate.held_bytes() * scale >= limits.gated_bytes_max;
        let free = matches!(self.phase, Phase::Alone | Phase::Attaching { gated: false });
        let congested = above && !free;
        if congested != self.congested {
            self.congested = congested;
            cx.act(Action::Congested(congested));
        }
    }
}
