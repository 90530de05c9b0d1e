//! What the backup does when the two differ.

use super::{Backup, Phase};
use crate::bounded::clip;
use crate::incident::{DivergenceCause, Evidence, FAULT_BYTES_MAX, IncidentReport};
use crate::message::Message;
use crate::policy::{Role, StopReason};
use crate::session::decision::{Decision, Trouble};
use crate::session::{Action, Context, leave};

impl Backup {
    pub(super) fn on_replay_fault(&mut self, cx: &mut Context<'_>, description: String) {
        match self.phase {
            Phase::AwaitingVerdict { .. } => return,
            Phase::Joining { .. } => return self.carry_out(cx, Trouble::ReplayFault, &description),
            _ => {}
        }
        let description = clip(description, FAULT_BYTES_MAX);
        let cause = DivergenceCause::ReplayFault { description };
        let evidence = self.evidence(&cause);
        let detail = cause.to_string();
        let deadline_ns = cx.now_ns + cx.config.evidence_ns;
        let decision = cx.decide(self.situation(), Trouble::ReplayFault, &detail);
        let term = self.term;
        self.phase = Phase::AwaitingVerdict {
            deadline_ns,
            cause,
            own: Box::new(evidence.clone()),
            reported: false,
        };
        if decision == Decision::AskPrimary {
            cx.send(Message::Fault { term, evidence });
        } else {
            self.stop_divergence(cx);
        }
    }

    /// A state that has come whole counts for the session, but here is no guest: this host leaves,
    /// whatever it has claimed or won meanwhile. There is nothing of its own that could differ.
    pub(super) fn on_unusable(&mut self, cx: &mut Context<'_>, description: String) {
        match self.phase {
            Phase::Joining { .. } => self.carry_out(cx, Trouble::ReplayFault, &description),
            _ => leave(cx, StopReason::StateUnusable { description }),
        }
    }

    pub(super) fn on_challenge(
        &mut self,
        cx: &mut Context<'_>,
        cause: DivergenceCause,
        theirs: Evidence,
    ) {
        let evidence = self.evidence(&cause);
        cx.send(Message::Evidence { term: self.term, evidence: evidence.clone() });
        let deadline_ns = cx.now_ns + cx.config.evidence_ns;
        let own = Box::new(evidence);
        self.phase = Phase::AwaitingVerdict { deadline_ns, cause, own, reported: false };
        self.report_incident(cx, Some(theirs));
    }

    pub(super) fn evidence(&self, cause: &DivergenceCause) -> Evidence {
        let (output, fault) = match cause {
            DivergenceCause::Output { output } => (self.outputs.evidence(*output), None),
            DivergenceCause::ReplayFault { description } => (None, Some(description.clone())),
            DivergenceCause::FinalState => (None, None),
        };
        // A fault lies at the exit the guest stands at, one past those it left.
        let at = output.as_ref().map_or(self.window.executed_through().next(), |output| output.at);
        Evidence {
            output,
            produced_through: self.outputs.produced_through(),
            executed_through: self.window.executed_through(),
            state_digest: self.ended,
            fault,
            last_records: self.window.last_records(at),
        }
    }

    /// Reports the divergence once, with what is known of the primary's side.
    pub(super) fn report_incident(&mut self, cx: &mut Context<'_>, theirs: Option<Evidence>) {
        let Phase::AwaitingVerdict { cause, own, reported, .. } = &mut self.phase else {
            return;
        };
        if core::mem::replace(reported, true) {
            return;
        }
        cx.act(Action::Incident(Box::new(IncidentReport {
            term: self.term,
            reporter: Role::Backup,
            cause: cause.clone(),
            primary: theirs,
            backup: Some(Evidence::clone(own)),
        })));
    }

    pub(super) fn stop_divergence(&mut self, cx: &mut Context<'_>) {
        self.report_incident(cx, None);
        cx.stop(StopReason::Divergence);
    }
}
