//! When this side may take over, and what it then does first.

use super::{Backup, Phase, Yielded};
use crate::message::Message;
use crate::policy::StopReason;
use crate::record::Term;
use crate::session::decision::Trouble;
use crate::session::lease::promise_ns;
use crate::session::{Action, Context};

impl Backup {
    /// Grants a lease. A side that does not follow grants none: it may be about to take over, or
    /// knows of a divergence.
    pub(super) fn on_lease_request(&mut self, cx: &mut Context<'_>, term: Term, number: u64) {
        match self.phase {
            Phase::Following if term == self.term => {
                let lease_ns = cx.config.lease_ns();
                cx.link.promised_until_ns = cx.now_ns.saturating_add(promise_ns(lease_ns));
                cx.send(Message::LeaseGrant { term, number, lease_ns });
            }
            // Sent before the primary knew.
            Phase::Following | Phase::AwaitingVerdict { .. } | Phase::ClaimingTerm { .. }
                if term <= self.term => {}
            Phase::Live if self.yielded.is_some() => {}
            _ => self.lose_peer(cx, "a lease is asked for out of place"),
        }
    }

    /// What the loss of the primary is. Silence is longer than any lease.
    pub(super) fn loss(&self, cx: &Context<'_>) -> Trouble {
        match self.phase {
            Phase::Following if cx.now_ns < cx.link.promised_until_ns => Trouble::BrokeInLease,
            _ => Trouble::PeerLost,
        }
    }

    /// The lease is over, if this side waited for that.
    pub(super) fn claim_after_lease(&mut self, cx: &mut Context<'_>) {
        if let Phase::ClaimingTerm { term, from_ns } = &mut self.phase
            && from_ns.take().is_some()
        {
            let term = *term;
            cx.act(Action::ClaimTerm(term));
        }
    }

    pub(super) fn go_live(&mut self, cx: &mut Context<'_>) {
        self.term = self.term.next();
        self.phase = Phase::Live;
        cx.act(Action::GoLive { term: self.term });
        // A backup that follows may still find a difference in these frames.
        if !self.is_followed() {
            self.speak(cx);
        }
        self.tell_flushes(cx);
        if self.ended.is_some() {
            cx.stop(StopReason::Clean);
        }
    }

    /// Sends all frames that this side has produced.
    pub(super) fn speak(&mut self, cx: &mut Context<'_>) {
        self.outputs.go_live();
        self.outputs.drain(|frame| cx.actions.push(Action::Transmit(frame)));
    }

    /// The primary will follow this side from where it stands.
    pub(in crate::session) fn is_followed(&self) -> bool {
        matches!(self.yielded, Some(Yielded { follows: true }))
    }

    /// This side has a term of its own.
    pub(in crate::session) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Live)
    }
}
