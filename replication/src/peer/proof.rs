//! The proof that both hosts see the same witness, before either hears what the other wants.
//!
//! Each host writes a number of its own into its witness and sends it (Prove); the other must find
//! it in its own witness (Proved). Until both have been found, what else the other host says waits
//! here. Why before Hello takes effect: two hosts with a witness each would be granted the same
//! term.

use super::{Effect, Notice, PeerCore};
use crate::message::Message;
use crate::policy::Refusal;
use crate::session::{DisconnectReason, SessionEvent};
use crate::witness::{Nonce, Place};

/// Messages that a host may have said before the proof is complete: its Hello, and Bye.
const HELD_MAX: usize = 2;

/// What is proved of the connection that stands, or stood last.
#[derive(Debug, Default)]
pub(super) struct Proof {
    /// The witness as this host's user named it; `None` asks for no proof.
    place: Option<Place>,
    /// Of the connection; an answer for another one has no effect.
    number: u64,
    /// What this host has written last, and whether the other found the last one it looked for.
    own: Option<Nonce>,
    own_found: bool,
    /// What the other host has written last, where, and whether this host found the last one it
    /// looked for.
    theirs: Option<(Nonce, Place)>,
    theirs_found: bool,
    /// What is being looked for: a host that sends many numbers does not start many looks.
    looks_for: Option<Nonce>,
    /// Each has found a number of the other.
    is_complete: bool,
    /// What the other host has said meanwhile.
    held: Vec<Message>,
}

/// What came of the look for a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is there.
    Found,
    /// The witness answers, and it is not there.
    Missing,
    /// The witness does not answer.
    Unknown,
}

/// Whether the last proof says that the two hosts have one witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Common {
    /// It does, or none was asked for.
    Yes,
    /// The other host found this one's number, and this one not the other's, which is this. Where
    /// it is found later, they have one witness.
    IfSeen(Nonce),
    /// The other host did not find this one's number.
    No,
}

impl Proof {
    fn lets_pass(&self) -> bool {
        self.place.is_none() || self.is_complete
    }
}

impl PeerCore {
    /// Asks each host that connects for the proof that it sees the witness at `place` too.
    pub fn require_proof(&mut self, place: Place) {
        self.proof.place = Some(place);
    }

    /// What the last proof says of the connection that stands, or stood last. A host that follows
    /// claims no term unless it is [`Common::Yes`].
    #[must_use]
    pub fn common_witness(&self) -> Common {
        let Proof { own_found, theirs_found, theirs, .. } = &self.proof;
        match theirs {
            _ if !self.proof.is_complete || (*own_found && *theirs_found) => Common::Yes,
            Some((nonce, _)) if *own_found => Common::IfSeen(*nonce),
            _ => Common::No,
        }
    }

    /// Whether the last proof succeeded; `None` before the first has.
    #[must_use]
    pub fn witness_is_common(&self) -> Option<bool> {
        self.proof.is_complete.then(|| self.common_witness() == Common::Yes)
    }

    /// The last numbers of this host and of the other.
    pub(super) fn last_numbers(&self) -> (Option<Nonce>, Option<Nonce>) {
        (self.proof.own, self.proof.theirs.as_ref().map(|(nonce, _)| *nonce))
    }

    /// Whether both hosts have found a number of the other on this connection.
    pub(super) fn is_proved(&self) -> bool {
        self.proof.is_complete
    }

    /// A connection stands, unless the session wants none. Then what is known of the last one
    /// stays: it decides about a claim that is under way.
    pub(super) fn begin_proof(&mut self) {
        if !self.is_connected() {
            return;
        }
        let place = self.proof.place.take();
        let number = self.proof.number + 1;
        self.proof = Proof { place, number, ..Proof::default() };
        self.prove();
    }

    /// Has a new number written and sent, if the first is proved.
    pub fn prove_again(&mut self) {
        if self.proof.is_complete {
            self.prove();
        }
    }

    fn prove(&mut self) {
        if self.proof.place.is_some() && self.is_connected() {
            self.effects.push(Effect::Prove { number: self.proof.number });
        }
    }

    /// This host's witness holds `nonce` ([`Effect::Prove`]).
    pub fn proof_written(&mut self, number: u64, nonce: Nonce) {
        if number == self.proof.number
            && self.is_connected()
            && let Some(place) = self.proof.place.clone()
        {
            self.proof.own = Some(nonce);
            self.name_line();
            self.send_message(&Message::Prove { nonce, place });
        }
    }

    /// What came of [`Effect::LookFor`].
    pub fn proof_looked_for(&mut self, now_ns: u64, number: u64, nonce: Nonce, look: Look) {
        if number != self.proof.number || !self.is_connected() {
            return;
        }
        self.proof.looks_for = None;
        if let Some((newer, _)) = self.proof.theirs.as_ref().filter(|(last, _)| *last != nonce) {
            return self.look_for(*newer);
        }
        let found = look == Look::Found;
        match look {
            // Nothing is known, so nothing is said: the other host waits, and asks again.
            Look::Unknown => return,
            Look::Found | Look::Missing => self.send_message(&Message::Proved { nonce, found }),
        }
        let was_found = core::mem::replace(&mut self.proof.theirs_found, found);
        self.judge(now_ns, found, was_found);
    }

    fn look_for(&mut self, nonce: Nonce) {
        self.proof.looks_for = Some(nonce);
        self.effects.push(Effect::LookFor { number: self.proof.number, nonce });
    }

    /// Takes what belongs to the proof, and what has to wait for it; returns what may be heard now.
    pub(super) fn prove_first(&mut self, now_ns: u64, message: Message) -> Option<Message> {
        match message {
            Message::Prove { nonce, place } => {
                self.proof.theirs = Some((nonce, place));
                self.name_line();
                if self.proof.place.is_some() && self.proof.looks_for.is_none() {
                    self.look_for(nonce);
                }
            }
            // Not of a number before the last one.
            Message::Proved { nonce, found } => {
                if self.proof.own == Some(nonce) {
                    let was_found = core::mem::replace(&mut self.proof.own_found, found);
                    self.judge(now_ns, found, was_found);
                }
            }
            message if self.proof.lets_pass() => return Some(message),
            // Heard at once: it is what a host says that does not go on to a proof.
            message @ Message::Refuse { .. } => return Some(message),
            message @ (Message::Hello { .. } | Message::Bye { .. })
                if self.proof.held.len() < HELD_MAX =>
            {
                self.proof.held.push(message);
            }
            message => {
                let description = format!("{} before the proof of the witness", message.name());
                self.disconnect(now_ns, DisconnectReason::Transport { description });
            }
        }
        None
    }

    /// A number was looked for, here or there.
    fn judge(&mut self, now_ns: u64, found: bool, was_found: bool) {
        let Proof { own_found, theirs_found, is_complete, .. } = self.proof;
        if is_complete {
            // A pair that runs goes on, and a backup does not claim (`common_witness`).
            if found != was_found {
                let (ours, theirs) = self.witness_places();
                self.notice(Notice::Witness { is_common: own_found && theirs_found, ours, theirs });
            }
        } else if !found {
            self.refuse_witness(now_ns);
        } else if own_found && theirs_found {
            self.proof.is_complete = true;
            for message in core::mem::take(&mut self.proof.held) {
                self.count(&message);
                self.step(now_ns, SessionEvent::Received(message));
            }
        }
    }

    fn witness_places(&self) -> (Place, Place) {
        let theirs = self.proof.theirs.as_ref().map(|(_, place)| place.clone());
        let unknown = || Place::from("another".to_owned());
        (self.proof.place.clone().unwrap_or_else(unknown), theirs.unwrap_or_else(unknown))
    }

    /// The pair does not begin. A guest that runs already goes on alone.
    fn refuse_witness(&mut self, now_ns: u64) {
        let (ours, theirs) = self.witness_places();
        let refusal = Refusal::OtherWitness { ours: ours.clone(), theirs: theirs.clone() };
        self.send_message(&Message::Refuse { refusal: refusal.clone() });
        let refusal = refusal.swapped();
        self.step(now_ns, SessionEvent::Received(Message::Refuse { refusal }));
        if self.stop.is_none() {
            self.notice(Notice::Witness { is_common: false, ours, theirs });
        }
    }
}
