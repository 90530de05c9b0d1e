//! What the primary does when the two differ.

use super::{Phase, Primary};
use crate::gate::Compared;
use crate::incident::{DivergenceCause, Evidence, IncidentReport};
use crate::message::Message;
use crate::policy::{DivergencePolicy, Role};
use crate::session::decision::Trouble;
use crate::session::{Action, Context};

impl Primary {
    pub(super) fn on_compared(&mut self, cx: &mut Context<'_>, compared: Compared) {
        match compared {
            Compared::Agreed => {}
            Compared::Differ(output) => self.diverge(cx, DivergenceCause::Output { output }),
            Compared::OutOfOrder => self.lose_peer(cx, "digests are out of order"),
        }
    }

    pub(super) fn on_fault(&mut self, cx: &mut Context<'_>, evidence: Evidence) {
        let description = evidence.fault.clone().unwrap_or_default();
        self.diverge(cx, DivergenceCause::ReplayFault { description });
        self.decide_divergence(cx, Some(evidence));
    }

    pub(super) fn diverge(&mut self, cx: &mut Context<'_>, cause: DivergenceCause) {
        let output = match cause {
            DivergenceCause::Output { output } => self.gate.evidence(output),
            _ => None,
        };
        // A fault lies at the exit the backup stands at, one past those it left.
        let at = output.as_ref().map_or(self.window.executed_through().next(), |output| output.at);
        let evidence = Evidence {
            output,
            produced_through: self.gate.produced_through(),
            executed_through: self.window.executed_through(),
            state_digest: self.ended,
            fault: None,
            last_records: self.window.last_records(at),
        };
        cx.send(Message::Challenge {
            term: self.term,
            cause: cause.clone(),
            evidence: evidence.clone(),
        });
        let deadline_ns = cx.now_ns + cx.config.evidence_ns;
        self.phase = Phase::AwaitingEvidence { deadline_ns, cause, own: Box::new(evidence) };
    }

    /// The evidence is as complete as it gets.
    pub(super) fn decide_divergence(&mut self, cx: &mut Context<'_>, theirs: Option<Evidence>) {
        let Phase::AwaitingEvidence { cause, own, .. } = &self.phase else {
            panic!("no divergence to decide in {}", self.state_name());
        };
        let detail = cause.to_string();
        cx.act(Action::Incident(Box::new(IncidentReport {
            term: self.term,
            reporter: Role::Primary,
            cause: cause.clone(),
            primary: Some(Evidence::clone(own)),
            backup: theirs,
        })));
        let trouble = match (cx.config.on_divergence, cx.config.believe) {
            (DivergencePolicy::Failover, _) => Trouble::DivergedFailover,
            (DivergencePolicy::Halt, _) => Trouble::DivergedHalt,
            // A guest that ended has no state to go on from.
            (DivergencePolicy::Resync, _) if self.ended.is_some() || !cx.link.connected => {
                Trouble::DivergedFailover
            }
            (DivergencePolicy::Resync, Role::Primary) => Trouble::DivergedResync,
            (DivergencePolicy::Resync, Role::Backup) => Trouble::DivergedYield,
        };
        self.carry_out(cx, trouble, &detail);
    }
}
