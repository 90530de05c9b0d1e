//! What a backup's numbers are checked against before they are used.
//!
//! A backup that reports what it cannot have reached breaks the protocol: it is lost, and the guest
//! goes on. docs/protocol.md has the table.

use super::{Phase, Primary, Yielding};
use crate::gate::EARLY_DIGESTS_MAX;
use crate::incident::Evidence;
use crate::message::Message;
use crate::record::{Ordinal, OutputOrdinal};
use crate::session::Context;

/// What the backup that is followed, or sent a state, has reported of itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reported {
    received_through: Ordinal,
    executed_through: Ordinal,
    /// Bytes of parts it was sent, and those it has restored.
    sent_bytes: u64,
    restored_bytes: u64,
}

impl Reported {
    /// A backup that has left exit `through`.
    pub(super) fn starting_at(through: Ordinal) -> Self {
        Self { received_through: through, executed_through: through, ..Self::default() }
    }

    /// It was sent a state of a guest that has left exit `through`.
    pub(super) fn stand_at(&mut self, through: Ordinal) {
        (self.received_through, self.executed_through) = (through, through);
    }

    /// It was sent a part of a state.
    pub(super) fn on_sent(&mut self, bytes: u64) {
        self.sent_bytes += bytes;
    }

    fn restored_breach(&self, restored_bytes: u64) -> Option<String> {
        let Self { sent_bytes, restored_bytes: last_bytes, .. } = *self;
        (!(last_bytes..=sent_bytes).contains(&restored_bytes)).then(|| {
            format!(
                "backup restored {restored_bytes} bytes of {sent_bytes} sent, after {last_bytes}"
            )
        })
    }

    fn ack_breach(&self, received: Ordinal, executed: Ordinal, sent: Ordinal) -> Option<String> {
        let Self { received_through, executed_through, .. } = *self;
        let is_in_order = executed_through <= executed
            && received_through <= received
            && executed <= received
            && received <= sent;
        (!is_in_order).then(|| {
            format!(
                "backup has received the log through exit {received} and executed {executed}, \
                 after {received_through} and {executed_through}; it was sent {sent}"
            )
        })
    }
}

impl Primary {
    /// The message, when it is to be handled: when its numbers can be, and it does not come from
    /// the time before the state that the backup is being given.
    pub(super) fn checked(&mut self, cx: &mut Context<'_>, message: Message) -> Option<Message> {
        if let Some(what) = self.breach(&message) {
            self.lose_peer(cx, &what);
            return None;
        }
        match message {
            Message::Ack { received_through, executed_through, .. } if self.has_all() => {
                self.reported.received_through = received_through;
                self.reported.executed_through = executed_through;
            }
            Message::StateRestored { restored_bytes, .. } => {
                self.reported.restored_bytes = restored_bytes;
            }
            Message::Ready { .. } if self.is_joined_by_now() => {
                self.flushes.on_joined(self.joining.take().unwrap_or_default());
                self.gate.on_joined();
                return None;
            }
            _ => {}
        }
        // The backup answers the end of the state with Ready, before anything else.
        let is_past = self.is_joined_by_now()
            && matches!(
                message,
                Message::StateRestored { .. }
                    | Message::Ack { .. }
                    | Message::Digest { .. }
                    | Message::DiskFlushed { .. }
                    | Message::Finished { .. }
                    | Message::Evidence { .. }
                    | Message::Fault { .. }
            );
        (!is_past).then_some(message)
    }

    /// The end of the state has been sent, and the backup's Ready has not come.
    fn is_joined_by_now(&self) -> bool {
        self.is_followed() && self.joining.is_some()
    }

    /// The backup follows, and everything it says is of the log it is sent.
    fn has_all(&self) -> bool {
        self.is_followed() && self.joining.is_none()
    }

    /// What a message claims that cannot be.
    fn breach(&self, message: &Message) -> Option<String> {
        let sent_through = self.window.logged_through();
        match message {
            Message::Ack { received_through, executed_through, .. } if self.has_all() => {
                self.reported.ack_breach(*received_through, *executed_through, sent_through)
            }
            // It answers no exit before it knows that nothing else happened there.
            Message::Digest { at, .. } if self.has_all() && *at > sent_through => Some(format!(
                "backup transmits at exit {at}, the log was sent through {sent_through}"
            )),
            Message::Finished { .. } if self.has_all() && self.backup_ended.is_some() => {
                Some("backup's guest ends twice".into())
            }
            Message::DiskFlushed { id, .. } if self.takes_flushes() && !self.is_joined_by_now() => {
                let goes_back = !self.flushes.may_follow(*id);
                goes_back.then(|| format!("backup reports flush {id} after a later one"))
            }
            Message::StateRestored { restored_bytes, .. } => {
                self.reported.restored_breach(*restored_bytes)
            }
            Message::Fault { evidence, .. } | Message::Evidence { evidence, .. }
                if self.has_all() || matches!(self.phase, Phase::AwaitingEvidence { .. }) =>
            {
                self.evidence_breach(evidence)
            }
            Message::Promoted { .. } => {
                let is_early = matches!(self.phase, Phase::Yielding(Yielding { asked: false, .. }));
                is_early.then(|| "backup takes over before it was asked".into())
            }
            _ => None,
        }
    }

    /// A backup's evidence tells of outputs and exits of the log it was sent.
    fn evidence_breach(&self, evidence: &Evidence) -> Option<String> {
        let Evidence { output, produced_through, executed_through, .. } = evidence;
        let sent = self.window.logged_through();
        let outputs =
            OutputOrdinal(self.gate.produced_through().0.saturating_add(EARLY_DIGESTS_MAX as u64));
        let is_possible = *executed_through <= sent
            && *produced_through <= outputs
            && output.as_ref().is_none_or(|o| o.at <= sent && o.output <= outputs);
        (!is_possible).then(|| {
            format!(
                "backup's evidence is of exit {executed_through} and output {produced_through}; \
                 the log was sent through exit {sent}"
            )
        })
    }
}
