//! The primary's half of the role state machine.

use super::decision::{Decision, Situation, Trouble};
use super::incident::{DivergenceCause, Evidence, IncidentReport};
use super::log_window::LogWindow;
use super::policy::{DivergencePolicy, Refusal, Role, SessionConfig, StopReason};
use super::{Action, Context, DisconnectReason, SessionEvent, Waits, stop_on_request};
use crate::digest::OutputDigest;
use crate::gate::{Compared, OutputGate};
use crate::group::peek_group;
use crate::message::{ByeReason, Message};
use crate::record::{Ordinal, Term};
use crate::wire::WireError;

/// What the primary waits for, or that it no longer waits.
#[derive(Debug)]
enum Phase {
    /// For a compatible backup. `held` is a term that is ours and was offered to nobody.
    AwaitingBackup { held: Option<Term> },
    /// For the witness; `greeted` says that a compatible backup is connected meanwhile.
    ClaimingFirstTerm { term: Term, greeted: bool },
    /// For the backup's answer to the welcome.
    AwaitingReady { deadline_ns: u64 },
    /// The guest runs; outputs are gated.
    Protected,
    /// For the backup's evidence of a divergence.
    AwaitingEvidence { deadline_ns: u64, cause: DivergenceCause, own: Box<Evidence> },
    /// For the witness; the guest runs, nothing is released.
    ClaimingTerm { term: Term },
    /// The guest runs; outputs leave at once.
    Alone,
}

#[derive(Debug)]
pub(super) struct Primary {
    phase: Phase,
    /// The highest term known; ours from [`Phase::AwaitingReady`] on.
    term: Term,
    gate: OutputGate,
    window: LogWindow,
    congested: bool,
    /// How far the backup was when it last got further, and when that was.
    progress: (Ordinal, u64),
    progress_ns: u64,
    /// State digest of the own guest, once it ended.
    ended: Option<[u8; 32]>,
    /// State digest of the backup's guest, once it ended.
    backup_ended: Option<[u8; 32]>,
}

impl Primary {
    pub(super) fn new(config: &SessionConfig) -> Self {
        Self {
            phase: Phase::AwaitingBackup { held: None },
            term: config.highest_term,
            gate: OutputGate::new(config.release),
            window: LogWindow::default(),
            congested: false,
            progress: (Ordinal(0), 0),
            progress_ns: 0,
            ended: None,
            backup_ended: None,
        }
    }

    pub(super) fn step(&mut self, cx: &mut Context<'_>, event: SessionEvent) {
        match event {
            SessionEvent::Connected => self.on_connected(cx),
            SessionEvent::Received(message) => self.on_message(cx, message),
            SessionEvent::Disconnected { reason } => self.on_disconnected(cx, reason),
            SessionEvent::Tick => self.on_tick(cx),
            SessionEvent::Group { bytes } => self.on_group(cx, bytes),
            SessionEvent::Output { at, digest, frame } => self.on_output(cx, at, digest, frame),
            SessionEvent::TermClaimed { term, granted } => self.on_term_claimed(cx, term, granted),
            SessionEvent::GuestEnded { state_digest } => {
                self.ended = Some(state_digest);
                self.finish_if_ended(cx);
            }
            SessionEvent::HostStop => stop_on_request(cx, self.term),
            // The recorder's own progress is in the horizons; it replays nothing.
            SessionEvent::Executed(_) | SessionEvent::ReplayFault { .. } => {}
        }
        if !cx.stopped {
            self.watch_progress(cx);
            self.release(cx);
            self.update_congestion(cx);
        }
    }

    fn on_connected(&mut self, cx: &mut Context<'_>) {
        match self.phase {
            // Whatever the claim brings, there will be no room for a newcomer.
            Phase::ClaimingTerm { .. } => cx.hang_up(),
            Phase::Alone => {}
            _ => cx.send_hello(),
        }
    }

    fn on_disconnected(&mut self, cx: &mut Context<'_>, reason: DisconnectReason) {
        let greeting =
            matches!(self.phase, Phase::AwaitingBackup { .. } | Phase::ClaimingFirstTerm { .. });
        match reason {
            // An ftvmm of another version was meant to be the backup. Anything else that knocks
            // on the port is no reason to stop.
            DisconnectReason::Wire(error @ WireError::VersionMismatch { .. }) if greeting => {
                cx.stop(StopReason::BadConfiguration(Refusal::Wire(error)));
            }
            reason => self.lose_peer(cx, &reason.to_string()),
        }
    }

    fn on_tick(&mut self, cx: &mut Context<'_>) {
        let waits = self.waits(cx.config);
        if let Some(silent_ns) = cx.silence_ns(&waits) {
            return self.lose_peer(cx, &format!("backup silent for {silent_ns} ns"));
        }
        if cx.heartbeat_is_due(&waits) {
            let released_through = self.gate.released_through();
            cx.send(Message::Heartbeat { term: self.term, released_through });
        }
        if waits.deadline_ns.is_some_and(|deadline_ns| cx.now_ns >= deadline_ns) {
            match self.phase {
                Phase::AwaitingEvidence { .. } => self.settle(cx, None),
                Phase::Protected => self.lose_peer(cx, "backup lives but gets nowhere"),
                _ => self.lose_peer(cx, "backup did not answer the welcome"),
            }
        }
    }

    fn on_message(&mut self, cx: &mut Context<'_>, message: Message) {
        if let Phase::Alone = self.phase {
            return cx.refuse_newcomer(&message, self.term);
        }
        let term = message.term().unwrap_or(self.term);
        if term < self.term {
            return;
        }
        if term > self.term {
            return self.lose_peer(cx, &format!("{} of unknown term {term}", message.name()));
        }
        match (&self.phase, message) {
            (
                Phase::AwaitingBackup { .. } | Phase::ClaimingFirstTerm { .. },
                hello @ Message::Hello { .. },
            ) => self.on_hello(cx, &hello),
            (
                Phase::AwaitingBackup { .. }
                | Phase::ClaimingFirstTerm { .. }
                | Phase::AwaitingReady { .. },
                Message::Refuse { refusal },
            ) => cx.stop(StopReason::BadConfiguration(refusal.swapped())),
            (Phase::AwaitingReady { .. }, Message::Ready { .. }) => self.on_ready(cx),
            (Phase::Protected, Message::Ack { received_through, executed_through, .. }) => {
                self.gate.on_ack(received_through);
                self.window.on_executed(executed_through);
            }
            (Phase::Protected, Message::Digest { output, at, digest, .. }) => {
                self.window.on_executed(Ordinal(at.0.saturating_sub(1)));
                let compared = self.gate.on_digest(output, at, digest);
                self.on_compared(cx, compared);
            }
            (Phase::Protected, Message::Finished { state_digest, .. }) => {
                self.backup_ended = Some(state_digest);
                self.finish_if_ended(cx);
            }
            (Phase::Protected, Message::Fault { evidence, .. }) => self.on_fault(cx, evidence),
            (
                Phase::AwaitingEvidence { .. },
                Message::Evidence { evidence, .. } | Message::Fault { evidence, .. },
            ) => self.settle(cx, Some(evidence)),
            (Phase::Protected, Message::Bye { .. }) => {
                cx.hang_up();
                self.carry_out(cx, Trouble::PeerLeft, "backup said goodbye");
            }
            // Sent before the backup knew of the divergence or of our claim.
            (
                Phase::AwaitingEvidence { .. } | Phase::ClaimingTerm { .. },
                Message::Ack { .. }
                | Message::Digest { .. }
                | Message::Finished { .. }
                | Message::Evidence { .. }
                | Message::Fault { .. },
            ) => {}
            (_, message) => {
                let name = message.name();
                self.lose_peer(cx, &format!("{name} is out of place in {}", self.state_name()));
            }
        }
    }

    fn on_hello(&mut self, cx: &mut Context<'_>, hello: &Message) {
        if let Some(refusal) = cx.check_hello(hello) {
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
                cx.act(Action::ClaimTerm(term));
            }
        }
    }

    fn offer(&mut self, cx: &mut Context<'_>, term: Term) {
        assert!(term >= self.term, "an old term is offered");
        self.term = term;
        let SessionConfig { rtc_epoch_s, release, on_divergence, handshake_ns, .. } = *cx.config;
        self.phase = Phase::AwaitingReady { deadline_ns: cx.now_ns + handshake_ns };
        cx.send(Message::Welcome { term, rtc_epoch_s, release, on_divergence });
    }

    fn on_ready(&mut self, cx: &mut Context<'_>) {
        self.phase = Phase::Protected;
        let SessionConfig { rtc_epoch_s, release, .. } = *cx.config;
        cx.act(Action::Begin { term: self.term, rtc_epoch_s, release });
    }

    fn on_group(&mut self, cx: &mut Context<'_>, bytes: Vec<u8>) {
        if !matches!(self.phase, Phase::Protected) {
            return;
        }
        let Ok(head) = peek_group(&bytes) else { panic!("the recorder made a damaged group") };
        self.window.push(head, bytes.clone());
        let released_through = self.gate.released_through();
        cx.send(Message::Log { term: self.term, released_through, group: bytes });
    }

    fn on_output(
        &mut self,
        cx: &mut Context<'_>,
        at: Ordinal,
        digest: OutputDigest,
        frame: Vec<u8>,
    ) {
        let compared = self.gate.push(at, digest, frame);
        if matches!(self.phase, Phase::Protected) {
            self.on_compared(cx, compared);
        }
    }

    fn on_compared(&mut self, cx: &mut Context<'_>, compared: Compared) {
        match compared {
            Compared::Agreed => {}
            Compared::Differ(output) => self.diverge(cx, DivergenceCause::Output { output }),
            Compared::OutOfOrder => self.lose_peer(cx, "digests are out of order"),
        }
    }

    /// Both guests ended: in the same state, with the same outputs?
    fn finish_if_ended(&mut self, cx: &mut Context<'_>) {
        match (&self.phase, self.ended, self.backup_ended) {
            (Phase::Alone, Some(_), _) => cx.stop(StopReason::Clean),
            (Phase::Protected, Some(own), Some(theirs)) => {
                if let Some(output) = self.gate.first_unmatched() {
                    return self.diverge(cx, DivergenceCause::Output { output });
                }
                if own != theirs {
                    return self.diverge(cx, DivergenceCause::FinalState);
                }
                // The backup executed everything, so it had received everything.
                self.gate.on_ack(Ordinal(u64::MAX));
                self.release(cx);
                cx.send(Message::Bye { term: self.term, reason: ByeReason::Ended });
                cx.stop(StopReason::Clean);
            }
            _ => {}
        }
    }

    fn on_fault(&mut self, cx: &mut Context<'_>, evidence: Evidence) {
        let description = evidence.fault.clone().unwrap_or_default();
        self.diverge(cx, DivergenceCause::ReplayFault { description });
        self.settle(cx, Some(evidence));
    }

    fn diverge(&mut self, cx: &mut Context<'_>, cause: DivergenceCause) {
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
    fn settle(&mut self, cx: &mut Context<'_>, theirs: Option<Evidence>) {
        let Phase::AwaitingEvidence { cause, own, .. } = &self.phase else {
            panic!("nothing to settle in {}", self.state_name());
        };
        let detail = cause.to_string();
        cx.act(Action::Incident(Box::new(IncidentReport {
            term: self.term,
            reporter: Role::Primary,
            cause: cause.clone(),
            primary: Some(Evidence::clone(own)),
            backup: theirs,
        })));
        let trouble = match cx.config.on_divergence {
            DivergencePolicy::Failover => Trouble::DivergedFailover,
            DivergencePolicy::Halt => Trouble::DivergedHalt,
        };
        self.carry_out(cx, trouble, &detail);
    }

    /// The connection is of no more use; it is closed if it still stands.
    fn lose_peer(&mut self, cx: &mut Context<'_>, detail: &str) {
        cx.hang_up();
        if !matches!(self.phase, Phase::Alone) {
            self.carry_out(cx, Trouble::PeerLost, detail);
        }
    }

    fn on_term_claimed(&mut self, cx: &mut Context<'_>, answered: Term, granted: bool) {
        let (Phase::ClaimingFirstTerm { term, .. } | Phase::ClaimingTerm { term }) = &self.phase
        else {
            return;
        };
        if *term != answered {
            return;
        }
        let trouble = if granted { Trouble::Granted } else { Trouble::Denied };
        self.carry_out(cx, trouble, &format!("claim of term {answered}"));
    }

    fn carry_out(&mut self, cx: &mut Context<'_>, trouble: Trouble, detail: &str) {
        match (cx.decide(self.situation(), trouble, detail), &mut self.phase) {
            (Decision::KeepWaiting, Phase::ClaimingFirstTerm { greeted, .. }) => *greeted = false,
            (Decision::KeepWaiting, _) => {}
            (Decision::OfferTerm, Phase::ClaimingFirstTerm { term, greeted }) => {
                let (term, greeted) = (*term, *greeted);
                self.phase = Phase::AwaitingBackup { held: Some(term) };
                if greeted {
                    self.offer(cx, term);
                }
            }
            (Decision::AbandonTerm, _) => self.phase = Phase::AwaitingBackup { held: None },
            (Decision::ClaimNextTerm, _) => {
                let term = self.term.next();
                self.phase = Phase::ClaimingTerm { term };
                cx.act(Action::ClaimTerm(term));
            }
            (Decision::SettleWithOwnEvidence, _) => self.settle(cx, None),
            (Decision::GoAlone, Phase::ClaimingTerm { term }) => {
                let term = *term;
                self.go_alone(cx, term);
            }
            (Decision::StopLostWitness, _) => {
                cx.stop(StopReason::LostWitness { term: self.term.next() });
            }
            (Decision::StopDivergence, _) => {
                if cx.link.connected {
                    cx.send(Message::StandDown { term: self.term });
                }
                cx.stop(StopReason::Divergence);
            }
            (decision, phase) => panic!("cannot {decision:?} in {phase:?}"),
        }
    }

    fn go_alone(&mut self, cx: &mut Context<'_>, term: Term) {
        // After a divergence the backup is still there and has to hear of it.
        if cx.link.connected {
            cx.send(Message::StandDown { term: self.term });
            cx.hang_up();
        }
        self.term = term;
        self.phase = Phase::Alone;
        self.gate.open();
        cx.act(Action::GoAlone { term });
        self.release(cx);
        self.finish_if_ended(cx);
    }

    fn release(&mut self, cx: &mut Context<'_>) {
        if matches!(self.phase, Phase::Protected | Phase::Alone) {
            self.gate.release(|frame| cx.actions.push(Action::Transmit(frame)));
        }
    }

    pub(super) fn lag_exits(&self) -> u64 {
        self.window.unexecuted_exits()
    }

    /// Notes when the backup last got further, or had nothing to do.
    fn watch_progress(&mut self, cx: &Context<'_>) {
        let progress = (self.window.executed_through(), self.gate.matched_through());
        if !self.owes_progress() || progress != self.progress {
            self.progress = progress;
            self.progress_ns = cx.now_ns;
        }
    }

    fn owes_progress(&self) -> bool {
        matches!(self.phase, Phase::Protected)
            && (self.window.unexecuted_exits() > 0 || self.gate.held_frames() > 0)
    }

    fn update_congestion(&mut self, cx: &mut Context<'_>) {
        let limits = cx.config.limits;
        let scale = if self.congested { 2 } else { 1 };
        let above = self.window.unexecuted_bytes() * scale >= limits.log_bytes_max
            || self.window.unexecuted_exits() * scale >= limits.lag_exits_max
            || self.gate.held_frames() * scale >= limits.gated_frames_max
            || self.gate.held_bytes() * scale >= limits.gated_bytes_max;
        let congested = above && !matches!(self.phase, Phase::Alone);
        if congested != self.congested {
            self.congested = congested;
            cx.act(Action::Congested(congested));
        }
    }

    fn situation(&self) -> Situation {
        match self.phase {
            Phase::AwaitingBackup { .. } => Situation::PrimaryGreeting,
            Phase::ClaimingFirstTerm { .. } => Situation::PrimaryClaimingFirst,
            Phase::AwaitingReady { .. } => Situation::PrimaryOffering,
            Phase::Protected => Situation::Protected,
            Phase::AwaitingEvidence { .. } => Situation::AwaitingEvidence,
            Phase::ClaimingTerm { .. } => Situation::PrimaryClaiming,
            Phase::Alone => panic!("a primary that is alone has nothing to decide"),
        }
    }

    pub(super) fn is_protected(&self) -> bool {
        matches!(self.phase, Phase::Protected)
    }

    pub(super) fn term(&self) -> Term {
        self.term
    }

    pub(super) fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::AwaitingBackup { .. } => "AwaitingBackup",
            Phase::ClaimingFirstTerm { .. } => "ClaimingFirstTerm",
            Phase::AwaitingReady { .. } => "AwaitingReady",
            Phase::Protected => "Protected",
            Phase::AwaitingEvidence { .. } => "AwaitingEvidence",
            Phase::ClaimingTerm { .. } => "ClaimingTerm",
            Phase::Alone => "Alone",
        }
    }

    pub(super) fn waits(&self, config: &SessionConfig) -> Waits {
        let heartbeats = matches!(
            self.phase,
            Phase::Protected | Phase::AwaitingEvidence { .. } | Phase::ClaimingTerm { .. }
        );
        let deadline_ns = match self.phase {
            Phase::AwaitingReady { deadline_ns } | Phase::AwaitingEvidence { deadline_ns, .. } => {
                Some(deadline_ns)
            }
            Phase::Protected if self.owes_progress() => Some(self.progress_ns + config.stall_ns),
            _ => None,
        };
        let silence_limit_ns = if heartbeats { config.failure_ns } else { config.handshake_ns };
        Waits { silence_limit_ns, heartbeats, deadline_ns }
    }

    pub(super) fn invariants(&self, connected: bool) {
        self.gate.invariants();
        self.window.invariants();
        let alone = matches!(self.phase, Phase::Alone);
        assert!(self.gate.is_open() == alone, "the gate is open when and only when alone");
        assert!(!alone || self.gate.held_frames() == 0, "a frame was kept though alone");
        if matches!(
            self.phase,
            Phase::AwaitingReady { .. } | Phase::Protected | Phase::AwaitingEvidence { .. }
        ) {
            assert!(connected, "{} without a connection", self.state_name());
        }
        if let Phase::ClaimingTerm { term } = self.phase {
            assert!(term == self.term.next(), "terms are claimed one after the other");
        }
    }
}
