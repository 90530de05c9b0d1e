//! A connection that broke while both hosts live is made again, and both go on where they were.
//!
//! Each host counts the messages it has received and keeps those it has sent until the other has
//! confirmed them. After a reset, or bytes that were changed on their way, neither session hears of
//! it at first: the hosts connect again, each says what it has received ([`Message::Resume`]), and
//! the other sends the rest. Only when that has failed for about as long as a lease is the peer
//! lost.
//!
//! Why nobody is heard twice: a primary drops its lease when the connection breaks, and waits for
//! one that is granted afterwards. A backup keeps the promise of the last lease before it claims,
//! as it does without this (decision 0033). The end of a connection (FIN) is never resumed: it says
//! that the other host's process is dead.

use std::collections::VecDeque;

use super::{Effect, Notice, PeerCore};
use crate::message::Message;
use crate::policy::Role;
use crate::session::{DisconnectReason, SessionEvent};
use crate::wire::{self, Decoder, WireError};
use crate::witness::Nonce;

/// Bytes kept for a host that may have to be sent them again: more than the state and the log that
/// may be under way. What was sent before is let go, and a break that needs it is a loss.
const KEPT_BYTES_MAX: usize = 16 << 20;
/// A host confirms after so many bytes.
const CONFIRM_BYTES: usize = 64 << 10;

/// A connection that broke.
#[derive(Clone, Debug)]
struct Break {
    /// Until then another one is wanted in its place.
    until_ns: u64,
    reason: DisconnectReason,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Resume {
    /// Until another connection has taken its place: one that stands before that is for what the
    /// other host has received.
    broken: Option<Break>,
    /// This host's first number in its witness, and the other's: the names of the connection, which
    /// nobody else knows.
    own: Option<Nonce>,
    theirs: Option<Nonce>,
    /// What was sent and is not confirmed, and the length of each message in it.
    kept: VecDeque<u8>,
    kept_lengths: VecDeque<usize>,
    /// Messages sent before those that are kept.
    let_go: u64,
    /// Messages received.
    received: u64,
    /// `received` when the connection was last resumed, and until when it was wanted: no time is
    /// given to a connection that breaks again before anything has come.
    resumed: Option<(u64, u64)>,
    unconfirmed_bytes: usize,
}

impl Resume {
    /// Notes a message that is sent, or would be if there were a connection.
    fn keep(&mut self, frame: &[u8]) {
        self.kept.extend(frame);
        self.kept_lengths.push_back(frame.len());
        while self.kept.len() > KEPT_BYTES_MAX {
            self.let_go_first();
        }
    }

    /// Whether another connection is to take this one's place.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    #[cfg(test)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept.len()
    }

    fn let_go_first(&mut self) {
        if let Some(length) = self.kept_lengths.pop_front() {
            self.kept.drain(..length);
            self.let_go += 1;
        }
    }

    /// The other host has received so many messages. `false` when it cannot have.
    fn confirmed(&mut self, messages: u64) -> bool {
        let sent = self.let_go + self.kept_lengths.len() as u64;
        while self.let_go < messages.min(sent) {
            self.let_go_first();
        }
        messages <= sent
    }

    /// Whether this break may be one of the network alone.
    fn may_follow(&self, reason: &DisconnectReason) -> bool {
        let is_networks = matches!(
            reason,
            DisconnectReason::Transport { .. } | DisconnectReason::Wire(WireError::Checksum { .. })
        );
        is_networks && self.own.is_some() && self.theirs.is_some()
    }

    /// Until when a connection that breaks is wanted again, if that is until `until_ns` where it
    /// has been of use.
    fn wanted_until_ns(&self, until_ns: u64) -> u64 {
        match self.resumed {
            Some((received, before_ns)) if received == self.received => before_ns,
            _ => until_ns,
        }
    }
}

impl PeerCore {
    /// True while a connection that broke is to be made again: whoever made it connects, and the
    /// other host takes it.
    #[must_use]
    pub fn wants_connection(&self) -> bool {
        self.connection.resume.is_broken() && !self.has_connection() && self.stop.is_none()
    }

    /// For how long a connection is made again before the other host is lost, in nanoseconds. The
    /// backup waits until it may claim in any case. The primary does not wait as long: it has the
    /// guest, and its timer may be late.
    fn resume_longest_ns(&self) -> u64 {
        match self.session.role() {
            Role::Primary => self.session.lease_ns() / 8 * 5,
            Role::Backup => self.session.promise_ns(),
        }
    }

    /// The numbers by which the two hosts know this connection. The first ones stay.
    pub(super) fn name_line(&mut self) {
        let (own, theirs) = self.last_numbers();
        self.connection.resume.own = self.connection.resume.own.or(own);
        self.connection.resume.theirs = self.connection.resume.theirs.or(theirs);
    }

    /// The connection is gone for the `reason`; whether it is to be made again.
    pub(super) fn breaks(&mut self, now_ns: u64, reason: &DisconnectReason) -> bool {
        let until_ns = now_ns.saturating_add(self.resume_longest_ns());
        let is_proved = self.is_proved();
        let line = &mut self.connection.resume;
        // One that breaks before it has taken the place of another is of no other kind.
        let broken = line.broken.take().or_else(|| {
            let until_ns = line.wanted_until_ns(until_ns);
            (is_proved && line.may_follow(reason))
                .then(|| Break { until_ns, reason: reason.clone() })
        });
        line.broken = broken.filter(|broken| now_ns < broken.until_ns);
        if !self.connection.resume.is_broken() {
            return false;
        }
        self.session.forget_lease();
        true
    }

    /// A connection stands; whether it continues one that broke.
    pub(super) fn greet_again(&mut self) -> bool {
        let line = &mut self.connection.resume;
        let (Some(_), Some(own), Some(theirs)) = (&line.broken, line.own, line.theirs) else {
            return false;
        };
        let received = line.received;
        line.unconfirmed_bytes = 0;
        self.connection.decoder = Some(Decoder::new());
        let unsent = self.unsent();
        unsent.extend_from_slice(&wire::PREAMBLE);
        wire::encode(&Message::Resume { own, theirs, received }, unsent);
        true
    }

    /// Takes what belongs to the connection itself; returns what is for the session.
    pub(super) fn resume_first(&mut self, now_ns: u64, message: Message) -> Option<Message> {
        match (&self.connection.resume.broken, message) {
            (Some(_), Message::Resume { own, theirs, received }) => {
                self.go_on(now_ns, own, theirs, received);
                None
            }
            // Not the host that this one was connected to.
            (Some(_), message) => {
                self.not_resumed(now_ns, &format!("{} instead of Resume", message.name()));
                None
            }
            (None, Message::Received { messages }) => {
                if !self.connection.resume.confirmed(messages) {
                    let what = format!("the peer has received {messages} messages, which is more");
                    self.breach(now_ns, format!("{what} than it was sent"));
                }
                None
            }
            (None, Message::Resume { .. }) => {
                self.breach(now_ns, "Resume of a connection that has not broken".into());
                None
            }
            (None, message) => {
                self.connection.resume.received += 1;
                Some(message)
            }
        }
    }

    fn go_on(&mut self, now_ns: u64, own: Nonce, theirs: Nonce, received: u64) {
        let line = &mut self.connection.resume;
        let is_it = line.own == Some(theirs) && line.theirs == Some(own);
        if !is_it || received < line.let_go || !line.confirmed(received) {
            return self.not_resumed(now_ns, "it does not continue what was said before");
        }
        line.resumed = line.broken.take().map(|broken| (line.received, broken.until_ns));
        let again = line.kept.make_contiguous().to_vec();
        self.unsent().extend_from_slice(&again);
        let messages = self.connection.resume.kept_lengths.len();
        self.notice(Notice::Resumed { messages });
    }

    /// What connected is of no use; the host that is meant may still come.
    fn not_resumed(&mut self, now_ns: u64, what: &str) {
        let description = format!("the connection is not resumed: {what}");
        self.disconnect(now_ns, DisconnectReason::Transport { description });
    }

    /// What the other host says no network does.
    fn breach(&mut self, now_ns: u64, description: String) {
        self.connection.resume = Resume::default();
        self.disconnect(now_ns, DisconnectReason::Transport { description });
    }

    /// So many bytes came: the other host may let go of them, sooner or later.
    pub(super) fn confirm(&mut self, bytes: usize) {
        self.connection.resume.unconfirmed_bytes += bytes;
        if self.connection.resume.unconfirmed_bytes >= CONFIRM_BYTES
            && !self.connection.resume.is_broken()
        {
            self.connection.resume.unconfirmed_bytes = 0;
            let messages = self.connection.resume.received;
            wire::encode(&Message::Received { messages }, self.unsent());
        }
    }

    /// Sends a message, now or when the connection stands again.
    pub(super) fn send_message(&mut self, message: &Message) {
        self.count(message);
        if !self.is_connected() {
            return;
        }
        if self.connection.resume.is_broken() {
            let mut frame = Vec::new();
            wire::encode(message, &mut frame);
            return self.connection.resume.keep(&frame);
        }
        let unsent = self.unsent();
        let start = unsent.len();
        wire::encode(message, unsent);
        if let Some(Effect::Send(unsent)) = self.effects.last() {
            self.connection.resume.keep(&unsent[start..]);
        }
    }

    /// When the other host is lost if no connection comes.
    pub(super) fn resume_deadline_ns(&self) -> Option<u64> {
        self.connection.resume.broken.as_ref().map(|broken| broken.until_ns)
    }

    /// The time for another connection is over.
    pub(super) fn give_up_resuming(&mut self, now_ns: u64) {
        let broken = &mut self.connection.resume.broken;
        let Some(Break { reason, .. }) = broken.take_if(|broken| now_ns >= broken.until_ns) else {
            return;
        };
        if self.has_connection() {
            self.effects.push(Effect::HangUp);
        }
        self.end_line();
        self.step(now_ns, SessionEvent::Disconnected { reason });
    }

    /// The session wants this connection no more.
    pub(super) fn end_line(&mut self) {
        self.connection.decoder = None;
        self.connection.resume = Resume::default();
    }
}
