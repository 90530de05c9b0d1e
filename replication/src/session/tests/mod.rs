//! Two sessions in one thread: the tests move the messages and play witness, guest and clock.

mod attach;
mod disk;
mod divergence;
mod failure;
mod flow;
mod handshake;
mod hostile;
mod lease;
mod links;
mod numbers;

use super::*;
use crate::build_id::{self, BuildId};
use crate::digest::OutputDigest;
use crate::fingerprint::tests::example;
use crate::group::GroupEncoder;
use crate::incident::IncidentReport;
use crate::policy::{DivergencePolicy, ReleasePolicy};
use crate::record::{Event, Ordinal, OutputOrdinal, Record};
use crate::wire::WireError;
use ftvmm_devices::Input;

const MS: u64 = 1_000_000;

/// One host: its session, what it wants sent, and everything else it did.
pub(super) struct Host {
    pub(super) session: Session,
    now_ns: u64,
    /// What is on its way to the other host, in order.
    wire: Vec<Message>,
    /// The same, without what is said about leases.
    outbox: Vec<Message>,
    done: Vec<Action>,
    rows: String,
    encoder: GroupEncoder,
}

impl Host {
    pub(super) fn new(config: SessionConfig) -> Self {
        Self {
            session: Session::new(config).unwrap(),
            now_ns: 0,
            wire: Vec::new(),
            outbox: Vec::new(),
            done: Vec::new(),
            rows: String::new(),
            encoder: GroupEncoder::new(),
        }
    }

    fn step(&mut self, event: SessionEvent) {
        let mut actions = Vec::new();
        self.session.step(self.now_ns, event, &mut actions);
        self.session.release(self.now_ns, &mut actions);
        for action in actions {
            match action {
                Action::Send(message) => {
                    self.wire.push(message.clone());
                    if !is_of_lease(&message) {
                        self.outbox.push(message);
                    }
                }
                Action::Decided { row, .. } => self.rows.push_str(row.letter),
                other => self.done.push(other),
            }
        }
    }

    /// Lets time pass, ticking whenever a deadline is due.
    fn wait(&mut self, duration_ns: u64) {
        let until_ns = self.now_ns + duration_ns;
        while let Some(deadline_ns) = self.session.next_deadline_ns().filter(|at| *at <= until_ns) {
            self.now_ns = self.now_ns.max(deadline_ns);
            self.step(SessionEvent::Tick);
            let next = self.session.next_deadline_ns();
            assert!(next.is_none_or(|next| next > self.now_ns), "a deadline was not served");
        }
        self.now_ns = until_ns;
    }

    fn receive(&mut self, messages: Vec<Message>) {
        messages.into_iter().for_each(|message| self.step(SessionEvent::Received(message)));
    }

    fn disconnect(&mut self) {
        self.step(SessionEvent::Disconnected { reason: DisconnectReason::Closed });
    }

    /// The witness answers.
    fn answer(&mut self, term: u64, granted: bool) {
        self.step(SessionEvent::TermClaimed { term: Term(term), granted });
    }

    /// The guest transmits the frame `[number]` at exit `number * 10`.
    fn output(&mut self, number: u8) {
        self.output_with(number, 0);
    }

    /// The same with a chain digest of its own, as after a divergence.
    fn output_with(&mut self, number: u8, chain: u64) {
        let (at, frame) = (Ordinal(u64::from(number) * 10), vec![number]);
        let digest = OutputDigest::of(at, chain, &frame);
        self.step(SessionEvent::Output { at, digest, frame });
    }

    /// The recorder finishes a group with one time record at its horizon.
    fn log(&mut self, horizon: u64) {
        let event = Event::Input(Input::Time { now_ns: horizon * 1000 });
        self.encoder.push(&Record { at: Ordinal(horizon), event });
        let bytes = self.encoder.finish(Ordinal(horizon));
        self.step(SessionEvent::Group { bytes });
    }

    /// The recorder finishes a group that says only how far it is.
    fn horizon(&mut self, horizon: u64) {
        let bytes = self.encoder.finish(Ordinal(horizon));
        self.step(SessionEvent::Group { bytes });
    }

    fn take_done(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.done)
    }

    fn take_outbox(&mut self) -> Vec<Message> {
        self.wire.clear();
        std::mem::take(&mut self.outbox)
    }

    fn take_wire(&mut self) -> Vec<Message> {
        self.outbox.clear();
        std::mem::take(&mut self.wire)
    }

    fn take_rows(&mut self) -> String {
        std::mem::take(&mut self.rows)
    }

    /// First bytes of the frames transmitted since the last `take_done`.
    fn transmitted(&self) -> Vec<u8> {
        let frames = self.done.iter().filter_map(|action| match action {
            Action::Transmit(frame) => Some(frame[0]),
            _ => None,
        });
        frames.collect()
    }

    fn stop_reason(&self) -> Option<&StopReason> {
        self.done.iter().find_map(|action| match action {
            Action::Stop(reason) => Some(reason),
            _ => None,
        })
    }

    fn incident(&self) -> Option<&IncidentReport> {
        let mut reports = self.done.iter().filter_map(|action| match action {
            Action::Incident(report) => Some(&**report),
            _ => None,
        });
        let first = reports.next();
        assert!(reports.next().is_none(), "an incident is reported once");
        first
    }
}

fn is_of_lease(message: &Message) -> bool {
    matches!(message, Message::LeaseRequest { .. } | Message::LeaseGrant { .. })
}

pub(super) struct Pair {
    pub(super) primary: Host,
    pub(super) backup: Host,
}

pub(super) fn config(role: Role) -> SessionConfig {
    SessionConfig::new(role, build_id::tests::example(), example(), Term(0), 1_700_000_000)
}

impl Pair {
    pub(super) fn new(primary: SessionConfig, backup: SessionConfig) -> Self {
        Self { primary: Host::new(primary), backup: Host::new(backup) }
    }

    fn connect(&mut self) {
        self.primary.step(SessionEvent::Connected);
        self.backup.step(SessionEvent::Connected);
    }

    /// Moves messages until both are quiet.
    pub(super) fn pump(&mut self) {
        while !(self.primary.wire.is_empty() && self.backup.wire.is_empty()) {
            let messages = self.primary.take_wire();
            self.backup.receive(messages);
            let messages = self.backup.take_wire();
            self.primary.receive(messages);
        }
    }

    /// A pair in term 1 whose guest has just begun.
    fn following(tweak: impl FnOnce(&mut SessionConfig)) -> Self {
        let mut primary = config(Role::Primary);
        tweak(&mut primary);
        let mut pair = Self::new(primary, config(Role::Backup));
        pair.connect();
        pair.pump();
        pair.primary.answer(1, true);
        pair.pump();
        pair.primary.answer(1, true);
        pair.pump();
        assert_eq!(pair.primary.session.state_name(), "Protected");
        assert_eq!(pair.backup.session.state_name(), "Following");
        for host in [&mut pair.primary, &mut pair.backup] {
            host.take_done();
            host.take_rows();
        }
        pair
    }

    /// Both guests transmit frame `number` after the log through its exit was sent.
    fn output(&mut self, number: u8) {
        self.primary.output(number);
        self.primary.log(u64::from(number) * 10);
        self.pump();
        self.backup.output(number);
        self.backup.step(SessionEvent::Executed(Ordinal(u64::from(number) * 10)));
        self.pump();
    }
}

fn halt(config: &mut SessionConfig) {
    config.on_divergence = DivergencePolicy::Halt;
}
