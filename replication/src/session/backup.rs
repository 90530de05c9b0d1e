//! The backup's half of the role state machine.

mod diverge;
mod join;
mod numbers;
mod take_over;

use super::decision::{Decision, Situation, Trouble};
use super::flush_gate::FlushGate;
use super::log_window::LogWindow;
use super::primary::Primary;
use super::{Action, Context, DisconnectReason, SessionEvent, Waits, leave, stop_on_request};
use crate::digest::OutputDigest;
use crate::gate::{Output, RetainedOutputs};
use crate::incident::{DivergenceCause, Evidence};
use crate::message::{ByeReason, Frames, Message};
use crate::policy::{
    DivergencePolicy, REPORT_EXITS, Refusal, ReleasePolicy, Role, SessionConfig, StopReason,
};
use crate::record::{Ordinal, OutputOrdinal, Term};

/// Log bytes the backup executes before it says so without having been asked: often enough that a
/// waiting primary goes on, seldom enough to cost nothing.
const REPORT_BYTES: u64 = 64 << 10;

/// What the backup waits for, or that it no longer waits.
#[derive(Clone, Debug)]
enum Phase {
    /// For the primary's hello and welcome.
    AwaitingWelcome,
    /// For the whole state; `held` are outputs from before it that have not left.
    Joining { restored_bytes: u64, held: Vec<Output> },
    /// For the log.
    Following,
    /// For what the primary decides about a divergence.
    AwaitingVerdict {
        deadline_ns: u64,
        cause: DivergenceCause,
        own: Box<Evidence>,
        /// The incident report is out.
        reported: bool,
    },
    /// For the witness, which is not asked before `from_ns`: the lease runs until then.
    ClaimingTerm { term: Term, from_ns: Option<u64> },
    /// The guest is ours, the rest of the log is being executed.
    Live,
}

/// How the primary asked this side to take over.
#[derive(Clone, Copy, Debug)]
struct Yielded {
    /// It stands where this side will stand.
    follows: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Backup {
    phase: Phase,
    /// The primary's hello was compatible.
    greeted: bool,
    /// The highest term known; the primary's from [`Phase::Following`] on, ours once live.
    term: Term,
    outputs: RetainedOutputs,
    flushes: FlushGate,
    window: LogWindow,
    /// Log bytes executed since the last acknowledgement.
    unreported_bytes: u64,
    /// The last exit reported as executed.
    reported_through: Ordinal,
    /// When the primary releases outputs.
    release: ReleasePolicy,
    /// State digest of the guest, once it ended.
    ended: Option<[u8; 32]>,
    /// The primary's divergence policy.
    on_divergence: DivergencePolicy,
    believe: Role,
    yielded: Option<Yielded>,
    /// What this side is from now on: a primary.
    successor: Option<Box<Primary>>,
}

impl Backup {
    pub(super) fn new(config: &SessionConfig) -> Self {
        Self {
            phase: Phase::AwaitingWelcome,
            greeted: false,
            term: config.highest_term,
            outputs: RetainedOutputs::default(),
            flushes: FlushGate::default(),
            window: LogWindow::default(),
            unreported_bytes: 0,
            reported_through: Ordinal(0),
            release: config.release,
            ended: None,
            on_divergence: config.on_divergence,
            believe: config.believe,
            yielded: None,
            successor: None,
        }
    }

    pub(super) fn step(&mut self, cx: &mut Context<'_>, event: SessionEvent) {
        match event {
            SessionEvent::Connected => self.on_connected(cx),
            SessionEvent::Received(Message::LeaseRequest { term, number }) => {
                self.on_lease_request(cx, term, number);
            }
            SessionEvent::Received(message) => self.on_message(cx, message),
            SessionEvent::Disconnected { reason } => self.on_disconnected(cx, reason),
            SessionEvent::Tick => self.on_tick(cx),
            SessionEvent::Output { at, digest, frame } => self.on_output(cx, at, digest, frame),
            SessionEvent::Executed(through) => self.on_executed(cx, through),
            SessionEvent::TermClaimed { term, granted } => self.on_term_claimed(cx, term, granted),
            SessionEvent::ReplayFault { description } => self.on_replay_fault(cx, description),
            SessionEvent::GuestEnded { state_digest } => self.on_guest_ended(cx, state_digest),
            SessionEvent::FlushAsked { id } => self.flushes.on_asked(id),
            SessionEvent::DiskFlushed { id } => self.on_disk_flushed(cx, id),
            SessionEvent::DiskFailed { id, description } => match self.phase {
                Phase::Following | Phase::AwaitingVerdict { .. } => {
                    leave(cx, StopReason::DiskFailed { description });
                }
                // No other host could continue.
                _ => cx.act(Action::CompleteDisk { id }),
            },
            SessionEvent::StateUnusable { description } => self.on_unusable(cx, description),
            SessionEvent::HostStop => stop_on_request(cx, self.term),
            SessionEvent::StateRestored { restored_bytes } => self.on_restored(cx, restored_bytes),
            SessionEvent::TookOver { through } => self.on_took_over(cx, through),
            SessionEvent::Strays(frames) if matches!(self.phase, Phase::Following) => {
                cx.send(Message::Strays { term: self.term, frames: Frames(frames) });
            }
            // A backup that records its own log keeps it to itself.
            SessionEvent::Group { .. }
            | SessionEvent::StartAlone
            | SessionEvent::State(_)
            | SessionEvent::StateEnd { .. }
            | SessionEvent::Yield { .. }
            | SessionEvent::Detach
            // The primary sees that this side gets nowhere, and decides.
            | SessionEvent::VcpuStuck { .. }
            | SessionEvent::ClientLink { .. }
            | SessionEvent::Strays(_) => {}
        }
    }

    fn on_connected(&mut self, cx: &mut Context<'_>) {
        match self.phase {
            // Whatever the claim brings, there will be no room for a joining backup.
            Phase::ClaimingTerm { .. } => cx.hang_up(),
            Phase::Live => {}
            _ => cx.send_hello(false),
        }
    }

    fn on_disconnected(&mut self, cx: &mut Context<'_>, reason: DisconnectReason) {
        match (&self.phase, reason) {
            // The address was given by the operator: what answers there is wrong for good.
            (Phase::AwaitingWelcome, DisconnectReason::Wire(error)) => {
                cx.stop(StopReason::BadConfiguration(Refusal::Wire(error)));
            }
            // It is dead, or has hung up and releases nothing more: the lease is over.
            (_, reason @ DisconnectReason::Closed) => {
                cx.link.promised_until_ns = 0;
                self.lose_peer(cx, &reason.to_string());
            }
            (_, reason) => self.lose_peer(cx, &reason.to_string()),
        }
    }

    fn on_tick(&mut self, cx: &mut Context<'_>) {
        let waits = self.waits(cx.config);
        if let Some(silent_ns) = cx.silence_ns(&waits) {
            return self.lose_peer(cx, &format!("primary silent for {silent_ns} ns"));
        }
        if cx.heartbeat_is_due(&waits) {
            match self.phase {
                Phase::Joining { restored_bytes, .. } => {
                    cx.send(Message::StateRestored { term: self.term, restored_bytes });
                }
                _ => self.acknowledge(cx),
            }
        }
        if waits.deadline_ns.is_some_and(|deadline_ns| cx.now_ns >= deadline_ns) {
            self.report_incident(cx, None);
            self.claim_after_lease(cx);
        }
    }

    fn on_message(&mut self, cx: &mut Context<'_>, message: Message) {
        if let Phase::Live = self.phase {
            // The old primary sends heartbeats until it receives Promoted.
            if self.yielded.is_none() {
                cx.refuse_joining(&message, self.term);
            }
            return;
        }
        let term = message.term().unwrap_or(self.term);
        if term < self.term {
            return;
        }
        if let Some(what) = self.breach(&cx.config.limits, &message) {
            return self.lose_peer(cx, &what);
        }
        match (&mut self.phase, message) {
            (Phase::AwaitingWelcome, hello @ Message::Hello { .. }) => {
                self.greeted = true;
                if let Some(refusal) = cx.check_hello(&hello, false) {
                    cx.refuse(refusal);
                }
            }
            (Phase::AwaitingWelcome, Message::Refuse { refusal }) => self.on_refuse(cx, refusal),
            (
                Phase::AwaitingWelcome,
                Message::Welcome { term, rtc_epoch_s, release, on_divergence },
            ) if self.greeted => {
                self.on_divergence = on_divergence;
                self.on_welcome(cx, term, rtc_epoch_s, release);
            }
            (
                Phase::AwaitingWelcome | Phase::Following | Phase::AwaitingVerdict { .. },
                Message::Attach { term, release, on_divergence, believe },
            ) if self.greeted => {
                self.on_divergence = on_divergence;
                self.believe = believe;
                self.on_attach(cx, term, release);
            }
            (Phase::Joining { .. }, Message::State { part, .. }) => {
                cx.act(Action::RestoreState(part));
            }
            (Phase::Joining { held, .. }, Message::Held { at, digest, frame, .. }) => {
                held.push(Output { at, digest, frame });
            }
            (
                Phase::Joining { held, .. },
                Message::StateEnd { outputs_through, at, machine, .. },
            ) => {
                let held = core::mem::take(held);
                self.on_state_end(cx, outputs_through, held, at, machine);
            }
            // Sent before the state, or because nothing else was to be sent.
            (Phase::Joining { .. }, Message::Heartbeat { .. }) => {}
            // Sent before the primary knew of our fault: the states are not equal.
            (Phase::AwaitingVerdict { .. }, Message::Yield { follows: true, .. }) => {}
            (
                Phase::Following | Phase::AwaitingVerdict { .. },
                Message::Yield { released_through, follows, .. },
            ) => self.on_yield(cx, released_through, follows),
            (Phase::ClaimingTerm { .. }, Message::Heartbeat { .. }) => {}
            (Phase::Joining { .. }, Message::StandDown { .. }) => {
                self.carry_out(cx, Trouble::StoodDown, "the primary goes on without us");
            }
            (Phase::Following, Message::Log { released_through, group, .. }) => {
                self.on_log(cx, released_through, group.into_vec());
            }
            (
                Phase::Following | Phase::AwaitingVerdict { .. },
                Message::Heartbeat { released_through, .. },
            ) => self.outputs.on_released(released_through),
            (Phase::Following, Message::Challenge { cause, evidence, .. }) => {
                self.on_challenge(cx, cause, evidence);
            }
            (Phase::AwaitingVerdict { .. }, Message::Challenge { evidence, .. }) => {
                self.report_incident(cx, Some(evidence));
            }
            (Phase::Following | Phase::AwaitingVerdict { .. }, Message::StandDown { .. }) => {
                self.carry_out(cx, Trouble::StoodDown, "the primary goes on without us");
            }
            (Phase::Following, Message::Bye { reason: ByeReason::Ended, .. })
                if self.ended.is_some() =>
            {
                cx.stop(StopReason::Clean);
            }
            (
                Phase::Following | Phase::AwaitingVerdict { .. } | Phase::Joining { .. },
                Message::Bye { reason: ByeReason::HostRequest, .. },
            ) => self.carry_out(cx, Trouble::PeerLeft, "primary said goodbye"),
            // Sent before the primary knew of our fault.
            (Phase::AwaitingVerdict { .. }, Message::Log { .. }) => {}
            (_, message) => {
                let name = message.name();
                self.lose_peer(cx, &format!("{name} is out of place in {}", self.state_name()));
            }
        }
    }

    /// A primary that has said Hello has taken the connection: no reason passes any more.
    fn on_refuse(&self, cx: &mut Context<'_>, refusal: Refusal) {
        if refusal.passes() && !self.greeted {
            cx.hang_up();
            cx.act(Action::TurnedAway(refusal));
        } else {
            cx.stop(StopReason::BadConfiguration(refusal.swapped()));
        }
    }

    fn on_welcome(
        &mut self,
        cx: &mut Context<'_>,
        term: Term,
        rtc_epoch_s: u64,
        release: ReleasePolicy,
    ) {
        if term <= self.term {
            return cx.refuse(Refusal::StaleTerm { offered: term, known: self.term });
        }
        self.term = term;
        self.release = release;
        self.phase = Phase::Following;
        cx.send(Message::Ready { term });
        cx.act(Action::Begin { term, rtc_epoch_s, release });
    }

    fn on_log(&mut self, cx: &mut Context<'_>, released_through: OutputOrdinal, group: Vec<u8>) {
        let head = match self.checked_head(&cx.config.limits, &group) {
            Ok(head) => head,
            Err(detail) => return self.lose_peer(cx, &detail),
        };
        self.window.push(head, group.clone());
        self.outputs.on_released(released_through);
        cx.act(Action::DeliverGroup(group));
        // Under `compare` the digests tell the primary what it needs.
        if self.release == ReleasePolicy::Ack {
            self.acknowledge(cx);
        }
    }

    fn acknowledge(&mut self, cx: &mut Context<'_>) {
        self.unreported_bytes = 0;
        let executed_through = self.window.executed_through();
        self.reported_through = executed_through;
        let received_through = self.window.logged_through();
        cx.send(Message::Ack { term: self.term, received_through, executed_through });
    }

    fn on_output(
        &mut self,
        cx: &mut Context<'_>,
        at: Ordinal,
        digest: OutputDigest,
        frame: Vec<u8>,
    ) {
        let output = self.outputs.push(at, digest, frame);
        if matches!(self.phase, Phase::Following) {
            cx.send(Message::Digest { term: self.term, output, at, digest });
        }
        self.outputs.drain(|frame| cx.actions.push(Action::Transmit(frame)));
    }

    /// This host's guest gets the completion when the log says so.
    fn on_disk_flushed(&mut self, cx: &mut Context<'_>, id: u64) {
        self.flushes.on_own(id);
        match self.phase {
            Phase::Following => cx.send(Message::DiskFlushed { term: self.term, id }),
            Phase::Live => self.tell_flushes(cx),
            _ => {}
        }
    }

    /// After a take-over a flush waits for no other disk; after a switch it waits for the new
    /// backup's.
    fn tell_flushes(&mut self, cx: &mut Context<'_>) {
        if let Some(through) = self.flushes.release(self.yielded.is_none()) {
            cx.act(Action::CompleteFlushes { through });
        }
    }

    fn on_executed(&mut self, cx: &mut Context<'_>, through: Ordinal) {
        self.unreported_bytes += self.window.on_executed(through);
        let unreported_exits = through.0.saturating_sub(self.reported_through.0);
        let much = self.unreported_bytes >= REPORT_BYTES || unreported_exits >= REPORT_EXITS;
        // Between two heartbeats the primary needs no further report.
        if matches!(self.phase, Phase::Following) && much {
            self.acknowledge(cx);
        }
    }

    fn on_guest_ended(&mut self, cx: &mut Context<'_>, state_digest: [u8; 32]) {
        self.ended = Some(state_digest);
        match self.phase {
            Phase::Following => cx.send(Message::Finished { term: self.term, state_digest }),
            Phase::Live => cx.stop(StopReason::Clean),
            _ => {}
        }
    }

    /// The connection is of no more use; it is closed if it still stands.
    fn lose_peer(&mut self, cx: &mut Context<'_>, detail: &str) {
        cx.hang_up();
        if !matches!(self.phase, Phase::Live | Phase::ClaimingTerm { .. }) {
            let trouble = self.loss(cx);
            self.carry_out(cx, trouble, detail);
        }
    }

    fn on_term_claimed(&mut self, cx: &mut Context<'_>, answered: Term, granted: bool) {
        if matches!(self.phase, Phase::ClaimingTerm { term, .. } if term == answered) {
            let trouble = if granted { Trouble::Granted } else { Trouble::Denied };
            self.carry_out(cx, trouble, &format!("claim of term {answered}"));
        }
    }

    fn carry_out(&mut self, cx: &mut Context<'_>, trouble: Trouble, detail: &str) {
        match cx.decide(self.situation(), trouble, detail) {
            Decision::KeepWaiting => self.greeted = false,
            Decision::ClaimNextTerm => {
                let term = self.term.next();
                self.phase = Phase::ClaimingTerm { term, from_ns: None };
                cx.act(Action::ClaimTerm(term));
            }
            Decision::ClaimAfterLease => {
                let from_ns = Some(cx.link.promised_until_ns);
                self.phase = Phase::ClaimingTerm { term: self.term.next(), from_ns };
            }
            Decision::GoLive => self.go_live(cx),
            Decision::StopLostWitness => {
                cx.stop(StopReason::LostWitness { term: self.term.next() });
            }
            Decision::StopDivergence => self.stop_divergence(cx),
            Decision::StopHostRequest => cx.stop(StopReason::HostRequest),
            Decision::StopIncomplete => cx.stop(StopReason::Incomplete),
            decision => panic!("cannot {decision:?} in {}", self.state_name()),
        }
    }

    fn situation(&self) -> Situation {
        match self.phase {
            Phase::AwaitingWelcome => Situation::BackupGreeting,
            Phase::Joining { .. } => Situation::Joining,
            Phase::Following => Situation::Following,
            Phase::AwaitingVerdict { .. } => Situation::AwaitingVerdict,
            Phase::ClaimingTerm { .. } => Situation::BackupClaiming,
            Phase::Live => Situation::Live,
        }
    }

    /// The primary's state or log comes here.
    pub(super) fn has_primary(&self) -> bool {
        matches!(
            self.phase,
            Phase::Following | Phase::Joining { .. } | Phase::AwaitingVerdict { .. }
        )
    }

    pub(super) fn is_protected(&self) -> bool {
        matches!(self.phase, Phase::Following)
    }

    pub(super) fn term(&self) -> Term {
        self.term
    }

    pub(super) fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::AwaitingWelcome => "AwaitingWelcome",
            Phase::Joining { .. } => "Joining",
            Phase::Following => "Following",
            Phase::AwaitingVerdict { .. } => "AwaitingVerdict",
            Phase::ClaimingTerm { .. } => "ClaimingTerm",
            Phase::Live => "Live",
        }
    }

    pub(super) fn waits(&self, config: &SessionConfig) -> Waits {
        let heartbeats = matches!(
            self.phase,
            Phase::Following | Phase::AwaitingVerdict { .. } | Phase::Joining { .. }
        );
        let deadline_ns = match self.phase {
            Phase::AwaitingVerdict { deadline_ns, reported: false, .. } => Some(deadline_ns),
            Phase::ClaimingTerm { from_ns, .. } => from_ns,
            _ => None,
        };
        let silence_limit_ns = match self.phase {
            Phase::Joining { .. } => config.attach_ns(),
            _ if heartbeats => config.failure_ns,
            _ => config.handshake_ns,
        };
        Waits { silence_limit_ns, heartbeats, deadline_ns, renews_ns: None }
    }

    pub(super) fn invariants(&self, connected: bool) {
        self.outputs.invariants();
        self.window.invariants();
        let live = matches!(self.phase, Phase::Live);
        let speaks = live && !self.is_followed();
        assert!(self.outputs.is_live() == speaks, "frames leave when and only when live");
        if matches!(
            self.phase,
            Phase::Following | Phase::AwaitingVerdict { .. } | Phase::Joining { .. }
        ) {
            assert!(connected, "{} without a connection", self.state_name());
        }
    }
}
