//! How the primary and its first backup come together before the guest starts.

use super::{Phase, Primary};
use crate::message::Message;
use crate::policy::{Refusal, SessionConfig, StopReason};
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
            cx.send(Message::Refuse { refusal: refusal.clone() });
            return self.on_misfit(cx, refusal);
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

    /// Whoever connected cannot be the backup. The other host, which has proved to be it, was
    /// started wrong, and so this one may be; anybody else has the wrong number.
    pub(super) fn on_misfit(&mut self, cx: &mut Context<'_>, refusal: Refusal) {
        match cx.config.peer_is_proved {
            true => cx.stop(StopReason::BadConfiguration(refusal)),
            false => self.lose_peer(cx, &format!("this is not the backup: {refusal}")),
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
