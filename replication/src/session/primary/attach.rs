//! The primary and its next backup: a guest that runs alone, a joining backup that is given its
//! state, and a backup that is asked to take over.

use super::numbers::Reported;
use super::{Phase, Primary, Yielding};
use crate::gate::{Output, OutputGate, RetainedOutputs};
use crate::message::{ByeReason, Message};
use crate::policy::{SessionConfig, StopReason};
use crate::record::{Ordinal, OutputOrdinal, Term};
use crate::session::backup::Backup;
use crate::session::decision::Trouble;
use crate::session::flush_gate::FlushGate;
use crate::session::log_window::LogWindow;
use crate::session::{Action, Context};
use crate::state::StatePart;

impl Primary {
    /// A backup that took over, alone in `term`, after `outputs`, all of which are out.
    pub(in crate::session) fn taken_over(
        config: &SessionConfig,
        term: Term,
        outputs: OutputOrdinal,
        flushes: FlushGate,
    ) -> Self {
        let mut gate = OutputGate::starting_at(config.release, outputs);
        gate.open();
        Self { phase: Phase::Alone, term, gate, flushes, ..Self::new(config) }
    }

    /// A backup that was asked to take over: the old primary follows after `through`. Both have
    /// produced all `outputs`; what only this side has waits to be compared.
    pub(in crate::session) fn promoted(
        config: &SessionConfig,
        term: Term,
        outputs: RetainedOutputs,
        flushes: FlushGate,
        through: Ordinal,
        now_ns: u64,
    ) -> Self {
        let (released_through, unreleased) = outputs.into_unreleased();
        let mut gate = OutputGate::starting_at(config.release, released_through);
        for Output { at, digest, frame } in unreleased {
            gate.push(at, digest, frame);
        }
        Self {
            phase: Phase::Protected,
            term,
            gate,
            flushes,
            window: LogWindow::starting_at(through),
            reported: Reported::starting_at(through),
            progress_ns: now_ns,
            ..Self::new(config)
        }
    }

    pub(in crate::session) fn term(&self) -> Term {
        self.term
    }

    pub(in crate::session) fn take_successor(&mut self) -> Option<Box<Backup>> {
        self.successor.take()
    }

    pub(in crate::session) fn accepts_backup(&self) -> bool {
        matches!(
            self.phase,
            Phase::Alone | Phase::AwaitingBackup { .. } | Phase::ClaimingFirstTerm { .. }
        )
    }

    /// A backup follows, or is about to: there is no place for another.
    pub(in crate::session) fn has_backup(&self) -> bool {
        matches!(
            self.phase,
            Phase::Beginning
                | Phase::Protected
                | Phase::Attaching { .. }
                | Phase::AwaitingEvidence { .. }
                | Phase::Yielding(_)
        )
    }

    pub(in crate::session) fn is_attaching(&self) -> bool {
        matches!(self.phase, Phase::Attaching { .. })
    }

    pub(in crate::session) fn is_protected(&self) -> bool {
        matches!(self.phase, Phase::Protected) && self.ended.is_none()
    }

    /// The backup executes what this side executes.
    pub(in crate::session) fn is_followed(&self) -> bool {
        matches!(self.phase, Phase::Protected | Phase::Yielding(Yielding { follows: true, .. }))
    }

    /// The guest stands still until the backup has answered.
    pub(in crate::session) fn is_yielding(&self) -> bool {
        matches!(self.phase, Phase::Yielding(Yielding { follows: true, .. }))
    }

    pub(super) fn start_alone(&mut self, cx: &mut Context<'_>) {
        let term = self.term.next();
        self.phase = Phase::StartingAlone { term };
        cx.act(Action::ClaimTerm(term));
    }

    /// A message while the guest runs alone: a compatible backup gets the state. Whatever else it
    /// is, the guest goes on.
    pub(super) fn on_joining(&mut self, cx: &mut Context<'_>, message: &Message) {
        let Message::Hello { .. } = message else { return cx.hang_up() };
        if let Some(refusal) = cx.check_hello(message, true) {
            cx.send(Message::Refuse { refusal });
            return cx.hang_up();
        }
        self.send_state(cx, false);
    }

    pub(in crate::session) fn send_state(&mut self, cx: &mut Context<'_>, gated: bool) {
        let SessionConfig { release, on_divergence, believe, .. } = *cx.config;
        cx.send(Message::Attach { term: self.term, release, on_divergence, believe });
        self.window = LogWindow::default();
        self.reported = Reported::default();
        self.phase = Phase::Attaching { gated };
        cx.act(Action::SendState);
    }

    pub(super) fn on_state(&mut self, cx: &mut Context<'_>, part: StatePart) {
        if let Phase::Attaching { .. } = self.phase {
            self.reported.on_sent(part.len_bytes());
            cx.send(Message::State { term: self.term, part });
        }
    }

    /// From here on the backup may take over, so nothing leaves that it does not know of.
    pub(super) fn on_state_end(
        &mut self,
        cx: &mut Context<'_>,
        at: Ordinal,
        machine: Vec<u8>,
        disk_through: u64,
    ) {
        let Phase::Attaching { .. } = self.phase else { return };
        let outputs_through = self.gate.close();
        let through = at.previous();
        self.window = LogWindow::starting_at(through);
        self.reported.stand_at(through);
        self.phase = Phase::Protected;
        self.progress_ns = cx.now_ns;
        self.joining = Some(disk_through);
        self.lease.forget();
        self.backup_ended = None;
        self.flushes.forget_peer();
        let term = self.term;
        for Output { at, digest, frame } in self.gate.unreleased().cloned() {
            cx.send(Message::Held { term, at, digest, frame });
        }
        cx.send(Message::StateEnd { term, outputs_through, at, machine });
        cx.act(Action::Protect { at });
    }

    /// The guest stands still.
    pub(super) fn on_yield(&mut self, cx: &mut Context<'_>, through: Ordinal) {
        if let Phase::Protected = self.phase {
            self.begin_yielding(cx, through, true);
        }
    }

    /// After a divergence in which the backup is believed. What is held here never leaves.
    pub(super) fn yield_unequal(&mut self, cx: &mut Context<'_>) {
        self.begin_yielding(cx, self.window.executed_through(), false);
    }

    fn begin_yielding(&mut self, cx: &mut Context<'_>, through: Ordinal, follows: bool) {
        let deadline_ns = cx.now_ns + cx.config.handshake_ns;
        self.phase = Phase::Yielding(Yielding { through, follows, asked: false, deadline_ns });
    }

    /// Asks the backup to take over as soon as everything has left that is to leave.
    pub(super) fn ask_to_take_over(&mut self, cx: &mut Context<'_>) {
        let held = self.gate.held_frames();
        let released_through = self.gate.released_through();
        let Phase::Yielding(Yielding { through, follows, asked, .. }) = &mut self.phase else {
            return;
        };
        if *asked || (*follows && held > 0) {
            return;
        }
        *asked = true;
        let (through, follows) = (*through, *follows);
        cx.send(Message::Yield { term: self.term, through, released_through, follows });
    }

    pub(super) fn on_promoted(&mut self, cx: &mut Context<'_>, term: Term) {
        let Phase::Yielding(Yielding { through, follows, .. }) = self.phase else { return };
        if term != self.term.next() {
            return self.lose_peer(cx, &format!("backup was promoted to unknown term {term}"));
        }
        self.successor = Some(Box::new(if follows {
            cx.act(Action::Follow { term, through });
            if let Some(id) = self.flushes.own_report() {
                cx.send(Message::DiskFlushed { term, id });
            }
            let outputs = self.gate.produced_through();
            Backup::following(cx.config, term, outputs, self.flushes, through)
        } else {
            Backup::awaiting_state(cx.config, term)
        }));
    }

    pub(super) fn on_detach(&mut self, cx: &mut Context<'_>) {
        let trouble = match self.phase {
            Phase::Protected => Trouble::Detached,
            Phase::Attaching { gated: false } => Trouble::PeerLeft,
            _ => return,
        };
        cx.send(Message::Bye { term: self.term, reason: ByeReason::HostRequest });
        cx.hang_up();
        self.carry_out(cx, trouble, "the operator lets the backup go");
    }

    /// The guest ended while its state was under way.
    pub(super) fn stop_clean(&self, cx: &mut Context<'_>) {
        if cx.link.connected {
            cx.send(Message::Bye { term: self.term, reason: ByeReason::HostRequest });
        }
        cx.stop(StopReason::Clean);
    }
}
