//! The backup that is given a state, and the one that is asked to take over.

use super::{Backup, Phase, Yielded};
use crate::gate::{Output, RetainedOutputs};
use crate::message::Message;
use crate::policy::{Refusal, ReleasePolicy, SessionConfig};
use crate::record::{Ordinal, OutputOrdinal, Term};
use crate::session::decision::Trouble;
use crate::session::flush_gate::FlushGate;
use crate::session::log_window::LogWindow;
use crate::session::primary::Primary;
use crate::session::{Action, Context};
use crate::state::StatePart;

impl Backup {
    /// A primary whose backup was promoted to `term`, in the same state.
    pub(in crate::session) fn following(
        config: &SessionConfig,
        term: Term,
        outputs: OutputOrdinal,
        flushes: FlushGate,
        through: Ordinal,
    ) -> Self {
        Self {
            phase: Phase::Following,
            greeted: true,
            term,
            flushes,
            outputs: RetainedOutputs::starting_at(outputs, Vec::new()),
            window: LogWindow::starting_at(through),
            reported_through: through,
            ..Self::new(config)
        }
    }

    /// A primary that was not believed: the other will send its state.
    pub(in crate::session) fn awaiting_state(config: &SessionConfig, term: Term) -> Self {
        Self { greeted: true, term, ..Self::new(config) }
    }

    /// The primary's policies count.
    pub(in crate::session) fn adopt(&self, config: &mut SessionConfig) {
        config.release = self.release;
        config.on_divergence = self.on_divergence;
        config.believe = self.believe;
    }

    pub(in crate::session) fn take_successor(&mut self) -> Option<Box<Primary>> {
        self.successor.take()
    }

    /// The primary's guest runs already, or this side is not believed: its state replaces ours.
    pub(super) fn on_attach(&mut self, cx: &mut Context<'_>, term: Term, release: ReleasePolicy) {
        if term < self.term {
            return cx.refuse(Refusal::StaleTerm { offered: term, known: self.term });
        }
        self.report_incident(cx, None);
        self.term = term;
        self.release = release;
        self.phase = Phase::Joining { restored_bytes: 0, held: Vec::new() };
        cx.act(Action::Join { release });
    }

    pub(super) fn on_restored(&mut self, cx: &mut Context<'_>, restored_bytes: u64) {
        if let Phase::Joining { restored_bytes: known, .. } = &mut self.phase {
            *known = restored_bytes;
            cx.send(Message::StateRestored { term: self.term, restored_bytes });
        }
    }

    /// This side has all it needs to take over.
    pub(super) fn on_state_end(
        &mut self,
        cx: &mut Context<'_>,
        outputs_through: OutputOrdinal,
        held: Vec<Output>,
        at: Ordinal,
        machine: Vec<u8>,
    ) {
        let through = at.previous();
        let (on_divergence, believe, release) = (self.on_divergence, self.believe, self.release);
        *self = Self {
            outputs: RetainedOutputs::starting_at(outputs_through, held),
            on_divergence,
            believe,
            release,
            ..Self::following(cx.config, self.term, outputs_through, FlushGate::default(), through)
        };
        cx.act(Action::RestoreState(StatePart::Machine(machine)));
        cx.send(Message::Ready { term: self.term });
    }

    /// The primary's guest stands still, and the primary asks this side to take over.
    pub(super) fn on_yield(
        &mut self,
        cx: &mut Context<'_>,
        released_through: OutputOrdinal,
        follows: bool,
    ) {
        self.outputs.on_released(released_through);
        self.report_incident(cx, None);
        self.yielded = Some(Yielded { follows });
        self.carry_out(cx, Trouble::Yielded, "the primary asked us to take over");
    }

    /// The run loop takes live inputs: this side is a primary from now on.
    pub(super) fn on_took_over(&mut self, cx: &mut Context<'_>, through: Ordinal) {
        if !matches!(self.phase, Phase::Live) {
            return;
        }
        let term = self.term;
        let yielded = self.yielded.filter(|_| cx.link.connected);
        if yielded.is_some() {
            cx.send(Message::Promoted { term });
        }
        self.successor = Some(Box::new(match yielded {
            Some(Yielded { follows: true }) => {
                cx.act(Action::Protect { at: through.next() });
                let outputs = core::mem::take(&mut self.outputs);
                Primary::promoted(cx.config, term, outputs, self.flushes, through, cx.now_ns)
            }
            Some(Yielded { follows: false }) => {
                let mut primary = self.alone_successor(cx);
                primary.send_state(cx, false);
                primary
            }
            None => self.alone_successor(cx),
        }));
    }

    fn alone_successor(&mut self, cx: &mut Context<'_>) -> Primary {
        if let Some(through) = self.flushes.release(true) {
            cx.act(Action::CompleteFlushes { through });
        }
        self.speak(cx);
        let outputs = self.outputs.produced_through();
        Primary::taken_over(cx.config, self.term, outputs, self.flushes)
    }
}
