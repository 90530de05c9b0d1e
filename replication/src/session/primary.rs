//! The primary's half of the role state machine.

mod attach;
mod disk;
mod diverge;
mod flow;
mod hand_over;
mod handshake;
mod numbers;

use super::backup::Backup;
use super::decision::{Decision, Situation, Trouble};
use super::flush_gate::FlushGate;
use super::lease::Lease;
use super::log_window::LogWindow;
use super::{Action, Context, DisconnectReason, SessionEvent, Waits, stop_on_request};
use crate::digest::OutputDigest;
use crate::gate::OutputGate;
use crate::group::peek_group;
use crate::incident::{DivergenceCause, Evidence};
use crate::message::Message;
use crate::policy::{Refusal, SessionConfig, StopReason};
use crate::record::{Ordinal, Term};
use crate::wire::WireError;
use numbers::Reported;

/// What the primary waits for, or that it no longer waits.
#[derive(Clone, Debug)]
enum Phase {
    /// For a compatible backup. `held` is a term that is ours and was not offered to a backup.
    AwaitingBackup { held: Option<Term> },
    /// For the witness; `greeted` says that a compatible backup is connected meanwhile.
    ClaimingFirstTerm { term: Term, greeted: bool },
    /// For the backup's answer to the welcome.
    AwaitingReady { deadline_ns: u64 },
    /// For the witness to know that the guest runs; the backup follows already.
    Beginning,
    /// The guest runs; outputs are gated.
    Protected,
    /// For the backup's evidence of a divergence.
    AwaitingEvidence { deadline_ns: u64, cause: DivergenceCause, own: Box<Evidence> },
    /// For the witness; the guest runs, nothing is released.
    ClaimingTerm { term: Term },
    /// The guest runs; outputs leave at once.
    Alone,
    /// For the witness; the guest is to start without a backup.
    StartingAlone { term: Term },
    /// The guest runs and its state goes to a backup. Outputs leave at once, or are held after a
    /// divergence.
    Attaching { gated: bool },
    /// The guest stands still; for the backup to take over.
    Yielding(Yielding),
    /// For the backup to notice that this side hung up; nothing is released.
    HandingOver { deadline_ns: u64 },
}

/// How the primary asks its backup to take over.
#[derive(Clone, Debug)]
struct Yielding {
    through: Ordinal,
    /// The two are in the same state, so that this side can follow at once.
    follows: bool,
    /// Yield has been sent; all frames were released before.
    asked: bool,
    deadline_ns: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Primary {
    phase: Phase,
    /// The highest term known; ours from [`Phase::AwaitingReady`] on.
    term: Term,
    gate: OutputGate,
    lease: Lease,
    flushes: FlushGate,
    window: LogWindow,
    congested: bool,
    /// How far the backup was when it last got further, and when that was.
    progress: (Ordinal, u64),
    progress_ns: u64,
    /// State digest of the own guest, once it ended.
    ended: Option<[u8; 32]>,
    /// State digest of the backup's guest, once it ended.
    backup_ended: Option<[u8; 32]>,
    /// Set between StateEnd and the backup's Ready: the last disk request that is part of the
    /// state.
    joining: Option<u64>,
    /// What the backup has reported of itself.
    reported: Reported,
    /// What this side is from now on: the backup of its backup.
    successor: Option<Box<Backup>>,
}

impl Primary {
    pub(super) fn new(config: &SessionConfig) -> Self {
        Self {
            phase: Phase::AwaitingBackup { held: None },
            term: config.highest_term,
            gate: OutputGate::new(config.release),
            lease: Lease::default(),
            flushes: FlushGate::default(),
            window: LogWindow::default(),
            congested: false,
            progress: (Ordinal(0), 0),
            progress_ns: 0,
            ended: None,
            backup_ended: None,
            joining: None,
            reported: Reported::default(),
            successor: None,
        }
    }

    pub(super) fn step(&mut self, cx: &mut Context<'_>, event: SessionEvent) {
        match event {
            SessionEvent::Connected => self.on_connected(cx),
            SessionEvent::Received(Message::LeaseGrant { term, number, lease_ns }) => {
                self.on_lease_grant(cx, term, number, lease_ns);
            }
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
            SessionEvent::VcpuStuck { unseen_ns } => self.on_vcpu_stuck(cx, unseen_ns),
            SessionEvent::HostStop => stop_on_request(cx, self.term),
            SessionEvent::FlushAsked { id } => self.flushes.on_asked(id),
            SessionEvent::DiskFlushed { id } => self.flushes.on_own(id),
            SessionEvent::DiskFailed { id, description } => {
                self.on_disk_failed(cx, id, description);
            }
            // The recorder's own progress is in the horizons; it replays nothing.
            SessionEvent::Executed(_)
            | SessionEvent::ReplayFault { .. }
            | SessionEvent::StateUnusable { .. }
            | SessionEvent::StateRestored { .. }
            | SessionEvent::TookOver { .. }
            | SessionEvent::ClientLink { .. }
            | SessionEvent::Strays(_) => {}
            SessionEvent::StartAlone => self.start_alone(cx),
            SessionEvent::State(part) => self.on_state(cx, part),
            SessionEvent::StateEnd { at, machine, disk_through } => {
                self.on_state_end(cx, at, machine, disk_through);
            }
            SessionEvent::Yield { through } => self.on_yield(cx, through),
            SessionEvent::Detach => self.on_detach(cx),
        }
        if !cx.stopped {
            self.watch_progress(cx);
            self.release_own(cx);
            self.renew_lease(cx);
            self.ask_to_take_over(cx);
            self.update_congestion(cx);
        }
    }

    fn on_connected(&mut self, cx: &mut Context<'_>) {
        match self.phase {
            // Whatever the claim brings, there will be no room for a joining backup.
            Phase::ClaimingTerm { .. }
            | Phase::StartingAlone { .. }
            | Phase::HandingOver { .. } => cx.hang_up(),
            Phase::Alone => cx.send_hello(true),
            _ => cx.send_hello(false),
        }
    }

    fn on_disconnected(&mut self, cx: &mut Context<'_>, reason: DisconnectReason) {
        let greeting =
            matches!(self.phase, Phase::AwaitingBackup { .. } | Phase::ClaimingFirstTerm { .. });
        match reason {
            // An ftvmm of another version was meant to be the backup. Anything else that connects
            // on the port is no reason to stop.
            DisconnectReason::Wire(error @ WireError::VersionMismatch { .. }) if greeting => {
                self.on_misfit(cx, Refusal::Wire(error));
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
                Phase::AwaitingEvidence { .. } => self.decide_divergence(cx, None),
                Phase::HandingOver { .. } => {
                    self.carry_out(cx, Trouble::TimeOver, "the backup had time to take over");
                }
                Phase::Yielding(_) => self.lose_peer(cx, "backup did not take over"),
                Phase::Protected => self.lose_peer(cx, "backup lives but gets nowhere"),
                _ => self.lose_peer(cx, "backup did not answer the welcome"),
            }
        }
    }

    fn on_message(&mut self, cx: &mut Context<'_>, message: Message) {
        if let Phase::Alone = self.phase {
            return self.on_joining(cx, &message);
        }
        let term = message.term().unwrap_or(self.term);
        if term < self.term {
            return;
        }
        if term > self.term {
            return self.lose_peer(cx, &format!("{} of unknown term {term}", message.name()));
        }
        let Some(message) = self.checked(cx, message) else { return };
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
            ) => self.on_misfit(cx, refusal.swapped()),
            (Phase::AwaitingReady { .. }, Message::Ready { .. }) => self.on_ready(cx),
            // It says that it is alive, and of what exit: there is none yet.
            (Phase::Beginning, Message::Ack { .. }) => {}
            (Phase::Attaching { .. }, Message::StateRestored { restored_bytes, .. }) => {
                cx.act(Action::BackupRestored { restored_bytes });
            }
            (Phase::Attaching { .. }, Message::Refuse { refusal }) => {
                self.lose_peer(cx, &format!("backup refuses: {}", refusal.swapped()));
            }
            (_, Message::Strays { frames, .. }) if self.is_followed() => {
                cx.act(Action::Receive(frames.0));
            }
            (_, Message::Ack { received_through, executed_through, .. }) if self.is_followed() => {
                self.gate.on_ack(received_through);
                self.window.on_executed(executed_through);
            }
            (_, Message::Digest { output, at, digest, .. }) if self.is_followed() => {
                self.window.on_executed(at.previous());
                let compared = self.gate.on_digest(output, at, digest);
                self.on_compared(cx, compared);
            }
            (Phase::Protected, Message::Finished { state_digest, .. }) => {
                self.backup_ended = Some(state_digest);
                self.finish_if_ended(cx);
            }
            (_, Message::DiskFlushed { id, .. }) if self.takes_flushes() => {
                self.flushes.on_peer(id, self.window.logged_through());
            }
            // A backup that has found a difference does not take over at the order to switch.
            (
                Phase::Protected | Phase::Yielding(Yielding { follows: true, .. }),
                Message::Fault { evidence, .. },
            ) => self.on_fault(cx, evidence),
            (
                Phase::AwaitingEvidence { .. },
                Message::Evidence { evidence, .. } | Message::Fault { evidence, .. },
            ) => self.decide_divergence(cx, Some(evidence)),
            (Phase::Yielding(_), Message::Promoted { term }) => self.on_promoted(cx, term),
            (
                Phase::Protected | Phase::Attaching { .. } | Phase::Yielding(_),
                Message::Bye { .. },
            ) => {
                cx.hang_up();
                self.carry_out(cx, Trouble::PeerLeft, "backup said goodbye");
            }
            // Sent before the backup knew of the divergence, or of what came of it.
            (
                Phase::AwaitingEvidence { .. }
                | Phase::ClaimingTerm { .. }
                | Phase::Attaching { gated: true }
                | Phase::Yielding(_),
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

    fn on_group(&mut self, cx: &mut Context<'_>, bytes: Vec<u8>) {
        if !self.is_followed() {
            return;
        }
        let Ok(head) = peek_group(&bytes) else { panic!("the recorder made a damaged group") };
        if !self.flushes.early_was_asked(head.horizon) {
            return self.lose_peer(cx, "backup reports a flush that the guest did not ask for");
        }
        self.window.push(head, bytes.clone());
        let released_through = self.gate.released_through();
        cx.send(Message::Log { term: self.term, released_through, group: bytes.into() });
    }

    fn on_output(
        &mut self,
        cx: &mut Context<'_>,
        at: Ordinal,
        digest: OutputDigest,
        frame: Vec<u8>,
    ) {
        let compared = self.gate.push(at, digest, frame);
        if self.is_followed() {
            self.on_compared(cx, compared);
        }
    }

    /// The connection is of no more use; it is closed if it still stands.
    fn lose_peer(&mut self, cx: &mut Context<'_>, detail: &str) {
        cx.hang_up();
        if !matches!(self.phase, Phase::Alone) {
            self.carry_out(cx, Trouble::PeerLost, detail);
        }
    }

    fn on_term_claimed(&mut self, cx: &mut Context<'_>, answered: Term, granted: bool) {
        let asked = match &self.phase {
            Phase::ClaimingFirstTerm { term, .. }
            | Phase::ClaimingTerm { term }
            | Phase::StartingAlone { term } => *term,
            Phase::Beginning => self.term,
            _ => return,
        };
        if asked != answered {
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
            (Decision::StartGuest, _) => self.start_guest(cx),
            (Decision::AbandonTerm, _) => self.phase = Phase::AwaitingBackup { held: None },
            (Decision::ClaimNextTerm, _) => {
                let term = self.term.next();
                self.phase = Phase::ClaimingTerm { term };
                cx.act(Action::ClaimTerm(term));
            }
            (Decision::SettleWithOwnEvidence, _) => self.decide_divergence(cx, None),
            (Decision::GoAlone, Phase::ClaimingTerm { term }) => {
                let term = *term;
                self.go_alone(cx, term);
            }
            (Decision::GoAlone, Phase::StartingAlone { term }) => {
                let term = *term;
                let SessionConfig { rtc_epoch_s, release, .. } = *cx.config;
                cx.act(Action::Begin { term, rtc_epoch_s, release });
                self.go_alone(cx, term);
            }
            (Decision::StayAlone, _) => self.phase = Phase::Alone,
            (Decision::SendState, _) => self.send_state(cx, true),
            (Decision::Yield, _) => self.yield_unequal(cx),
            (Decision::HandOver, _) => self.hand_over(cx),
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
        self.release_own(cx);
        self.finish_if_ended(cx);
    }

    fn situation(&self) -> Situation {
        match self.phase {
            Phase::AwaitingBackup { .. } => Situation::PrimaryGreeting,
            Phase::ClaimingFirstTerm { .. } => Situation::PrimaryClaimingFirst,
            Phase::AwaitingReady { .. } => Situation::PrimaryOffering,
            Phase::Beginning => Situation::PrimaryBeginning,
            Phase::Protected => Situation::Protected,
            Phase::AwaitingEvidence { .. } => Situation::AwaitingEvidence,
            Phase::ClaimingTerm { .. } => Situation::PrimaryClaiming,
            Phase::StartingAlone { .. } => Situation::PrimaryAlone,
            Phase::Attaching { gated: false } => Situation::Attaching,
            Phase::Attaching { gated: true } => Situation::Resyncing,
            Phase::Yielding(_) => Situation::Yielding,
            Phase::HandingOver { .. } => Situation::HandingOver,
            Phase::Alone => panic!("a primary that is alone has nothing to decide"),
        }
    }

    pub(super) fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::AwaitingBackup { .. } => "AwaitingBackup",
            Phase::ClaimingFirstTerm { .. } => "ClaimingFirstTerm",
            Phase::AwaitingReady { .. } => "AwaitingReady",
            Phase::Beginning => "Beginning",
            Phase::Protected => "Protected",
            Phase::AwaitingEvidence { .. } => "AwaitingEvidence",
            Phase::ClaimingTerm { .. } => "ClaimingTerm",
            Phase::Alone => "Alone",
            Phase::StartingAlone { .. } => "StartingAlone",
            Phase::Attaching { .. } => "Attaching",
            Phase::Yielding(_) => "Yielding",
            Phase::HandingOver { .. } => "HandingOver",
        }
    }

    pub(super) fn waits(&self, config: &SessionConfig) -> Waits {
        let heartbeats = matches!(
            self.phase,
            Phase::Beginning
                | Phase::Protected
                | Phase::AwaitingEvidence { .. }
                | Phase::ClaimingTerm { .. }
                | Phase::Attaching { .. }
                | Phase::Yielding(_)
        );
        let deadline_ns = match self.phase {
            Phase::AwaitingReady { deadline_ns } | Phase::AwaitingEvidence { deadline_ns, .. } => {
                Some(deadline_ns)
            }
            Phase::Yielding(Yielding { deadline_ns, .. }) | Phase::HandingOver { deadline_ns } => {
                Some(deadline_ns)
            }
            Phase::Protected if self.owes_progress() => Some(self.progress_ns + config.stall_ns),
            _ => None,
        };
        let silence_limit_ns = match self.phase {
            // A backup that is only just receiving the state is not needed yet, so its limit is
            // longer.
            Phase::Attaching { gated: false } => config.attach_ns(),
            _ if heartbeats => config.failure_ns,
            _ => config.handshake_ns,
        };
        let renews_ns = self.releases_gated().then(|| self.lease.due_ns(config.lease_ns()));
        Waits { silence_limit_ns, heartbeats, deadline_ns, renews_ns }
    }

    pub(super) fn invariants(&self, connected: bool) {
        self.gate.invariants();
        self.window.invariants();
        let alone = matches!(self.phase, Phase::Alone | Phase::Attaching { gated: false });
        assert!(self.gate.is_open() == alone, "the gate is open when and only when alone");
        assert!(!alone || self.gate.held_frames() == 0, "a frame was kept though alone");
        assert!(!alone || !self.flushes.holds_any(), "a flush was kept though alone");
        if matches!(
            self.phase,
            Phase::AwaitingReady { .. }
                | Phase::Beginning
                | Phase::Protected
                | Phase::AwaitingEvidence { .. }
                | Phase::Attaching { .. }
                | Phase::Yielding(_)
        ) {
            assert!(connected, "{} without a connection", self.state_name());
        }
        if let Phase::ClaimingTerm { term } = self.phase {
            assert!(term == self.term.next(), "terms are claimed one after the other");
        }
    }
}
