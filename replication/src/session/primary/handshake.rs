//! How the primary and its first backup come together before the guest starts.

use super::{Phase, Primary};
use crate::message::Message;
use crate::policy::SessionConfig;
use crate::record::Term;
use crate::session::{Action, Context};

impl Primary {
    /// The guest's time of day at power-on has not been sent to a backup yet.
    pub(in crate::session) fn has_not_begun(&self) -> bool {
        matches!(
            self.phase,
            Phase::AwaitingBackup { .. }
                | Phase::ClaimingFirstTerm { .. }
                | Phase::StartingAlone { .. }
        )
    }

    pub(super) fn on_hello(&mut self, cx: &mut Context<'_>, hello: &Message) {
        if let Some(refusal) = cx.check_hello(hello, false) {
            return cx.refuse(refusal);
        }
        match &mut self.phase {
            Phase::AwaitingBackup { held: Some(term) } => {
                let term = *term;
                self.offer(cx, term);
            }
            Phase::ClaimingFirstTerm { greeted, .. } => *greeted = true,
            _ => {
                let term = self.term.next();
                self.phase = Phase::ClaimingFirstTerm { term, greeted: true };
                cx.act(Action::HoldTerm(term));
            }
        }
    }

    pub(super) fn offer(&mut self, cx: &mut Context<'_>, term: Term) {
        assert!(term >= self.term, "an old term is offered");
        self.term = term;
        let SessionConfig { rtc_epoch_s, release, on_divergence, handshake_ns, .. } = *cx.config;
        self.phase = Phase::AwaitingReady { deadline_ns: cx.now_ns + handshake_ns };
        cx.send(Message::Welcome { term, rtc_epoch_s, release, on_divergence });
    }

    /// Nothing runs before the witness knows that it does: were this host lost before, the guest
    /// could be started elsewhere without anybody's word.
    pub(super) fn on_ready(&mut self, cx: &mut Context<'_>) {
        self.phase = Phase::Beginning;
        cx.act(Action::ClaimTerm(self.term));
    }

    pub(super) fn start_guest(&mut self, cx: &mut Context<'_>) {
        self.phase = Phase::Protected;
        let SessionConfig { rtc_epoch_s, release, .. } = *cx.config;
        cx.act(Action::Begin { term: self.term, rtc_epoch_s, release });
    }
}
