//! What may leave, how far the backup is behind, and when the guest has to wait for it.

use super::{Phase, Primary, Yielding};
use crate::incident::DivergenceCause;
use crate::message::{ByeReason, Message};
use crate::policy::StopReason;
use crate::record::{COUNTER_MAX, Ordinal, Term};
use crate::session::{Action, Context};

impl Primary {
    /// Releases what needs nobody's leave: the term is this host's own.
    pub(super) fn release_own(&mut self, cx: &mut Context<'_>) {
        if self.speaks_alone() {
            self.gate.release(|frame| cx.actions.push(Action::Transmit(frame)));
            self.release_flushes(cx);
        } else {
            // Under `ack`, what left before it was compared.
            self.gate.drop_done();
        }
    }

    /// Releases what the backup has let go, within the lease, and does what waited for that.
    pub(in crate::session) fn release_gated(&mut self, cx: &mut Context<'_>) {
        if !self.releases_gated() || !self.lease.is_valid(cx.now_ns) {
            return;
        }
        self.gate.release(|frame| cx.actions.push(Action::Transmit(frame)));
        self.release_flushes(cx);
        self.end_together(cx);
        if !cx.stopped {
            self.ask_to_take_over(cx);
            self.update_congestion(cx);
        }
    }

    /// Whether [`Self::release_gated`] has something to do, if the lease allows it.
    pub(in crate::session) fn has_release(&self) -> bool {
        self.releases_gated()
            && (self.gate.may_release_next() || self.flushes.releasable(false).is_some())
    }

    /// Whether this host is the one that may be heard at `now_ns`.
    pub(in crate::session) fn may_speak(&self, now_ns: u64) -> bool {
        self.speaks_alone() || self.releases_gated() && self.lease.is_valid(now_ns)
    }

    /// Nobody else may take over.
    fn speaks_alone(&self) -> bool {
        matches!(self.phase, Phase::Alone | Phase::Attaching { gated: false })
    }

    /// A backup that follows is there, without whose lease nothing may leave.
    pub(super) fn releases_gated(&self) -> bool {
        matches!(
            self.phase,
            Phase::Protected | Phase::Yielding(Yielding { follows: true, asked: false, .. })
        )
    }

    pub(in crate::session) fn forget_lease(&mut self) {
        self.lease.forget();
    }

    /// Asks for a lease before the last one is over, and at once when this host was away.
    pub(super) fn renew_lease(&mut self, cx: &mut Context<'_>) {
        if self.releases_gated() && cx.now_ns >= self.lease.due_ns(cx.config.lease_ns()) {
            let number = self.lease.ask(cx.now_ns);
            cx.send(Message::LeaseRequest { term: self.term, number });
        }
    }

    pub(super) fn on_lease_grant(
        &mut self,
        cx: &mut Context<'_>,
        term: Term,
        number: u64,
        granted_ns: u64,
    ) {
        // Sent before the backup knew of a divergence, or of what came of it.
        let is_late = term < self.term
            || matches!(
                self.phase,
                Phase::AwaitingEvidence { .. }
                    | Phase::ClaimingTerm { .. }
                    | Phase::Attaching { gated: true }
                    | Phase::Yielding(_)
            );
        let was_asked = term == self.term
            && self.is_followed()
            && self.lease.on_grant(number, granted_ns, cx.config.lease_ns());
        if !was_asked && !is_late {
            self.lose_peer(cx, "backup grants a lease that was not asked for");
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
        let congested = above && !self.speaks_alone();
        if congested != self.congested {
            self.congested = congested;
            cx.act(Action::Congested(congested));
        }
    }

    /// Both guests ended: in the same state, with the same outputs?
    pub(super) fn finish_if_ended(&mut self, cx: &mut Context<'_>) {
        match (&self.phase, self.ended, self.backup_ended) {
            (Phase::Alone | Phase::Attaching { gated: false }, Some(_), _) => self.stop_clean(cx),
            // Held frames may leave only when the backup cannot send any more.
            (Phase::Attaching { gated: true }, Some(_), _) => {
                self.lose_peer(cx, "the guest ended while its state was under way");
            }
            (Phase::Protected, Some(own), Some(theirs)) => {
                if let Some(output) = self.gate.first_unmatched() {
                    return self.diverge(cx, DivergenceCause::Output { output });
                }
                if own != theirs {
                    return self.diverge(cx, DivergenceCause::FinalState);
                }
                // The backup executed everything, so it had received everything.
                self.gate.on_ack(Ordinal(COUNTER_MAX));
                self.end_together(cx);
            }
            _ => {}
        }
    }

    /// Says goodbye to a backup whose guest ended as this one did, when every frame has left: the
    /// backup sends none after that.
    fn end_together(&self, cx: &mut Context<'_>) {
        let is_over = matches!(self.phase, Phase::Protected)
            && self.ended.is_some()
            && self.ended == self.backup_ended
            && self.gate.held_frames() == 0;
        if is_over {
            cx.send(Message::Bye { term: self.term, reason: ByeReason::Ended });
            cx.stop(StopReason::Clean);
        }
    }
}
