//! Two hosts that prove their witness to each other.

use super::tests::core;
use super::*;
use crate::message::Message;
use crate::policy::Refusal;
use crate::record::Term;
use crate::wire::Decoder;
use crate::witness::{Nonce, Place};

/// A host, the numbers its witness holds, and what it was told to look for and cannot yet.
pub(super) struct Side {
    pub(super) core: PeerCore,
    /// Which witness it uses.
    witness: usize,
    unanswered: Vec<(u64, Nonce)>,
    pub(super) notices: Vec<Notice>,
    pub(super) claims: u32,
    pub(super) sent: Vec<&'static str>,
    /// Frames that have left.
    pub(super) frames: u32,
}

pub(super) struct Two {
    pub(super) sides: [Side; 2],
    witnesses: [Vec<Nonce>; 2],
    nonces: u8,
    /// The witness of the second host does not answer.
    is_down: bool,
    pub(super) now_ns: u64,
    /// What is sent is lost.
    pub(super) is_cut: bool,
}

fn place(witness: usize) -> Place {
    format!("file:/{witness}").into()
}

impl Two {
    /// A primary and a backup with these witnesses.
    pub(super) fn new(witnesses: [usize; 2]) -> Self {
        let side = |role, witness| {
            let mut core = core(role);
            core.require_proof(place(witness));
            let (unanswered, notices, sent) = (vec![], vec![], vec![]);
            Side { core, witness, unanswered, notices, claims: 0, sent, frames: 0 }
        };
        let sides = [side(Role::Primary, witnesses[0]), side(Role::Backup, witnesses[1])];
        let (witnesses, now_ns) = ([vec![], vec![]], 1_000_000);
        Self { sides, witnesses, nonces: 0, is_down: false, now_ns, is_cut: false }
    }

    pub(super) fn connect(&mut self) {
        let now_ns = self.now_ns;
        self.sides.iter_mut().for_each(|side| side.core.connect(now_ns));
        self.settle();
    }

    /// Until neither has anything to do.
    pub(super) fn settle(&mut self) {
        while let Some(host) = (0..2).find(|host| self.sides[*host].core.has_effects()) {
            self.sides[host].core.release(self.now_ns);
            for effect in self.sides[host].core.take_effects() {
                self.perform(host, effect);
            }
        }
    }

    fn perform(&mut self, host: usize, effect: Effect) {
        let (now_ns, other) = (self.now_ns, 1 - host);
        match effect {
            Effect::Send(bytes) => {
                let [first, second] = &mut self.sides;
                let (own, peer) = if host == 0 { (first, second) } else { (second, first) };
                let mut decoder = Decoder::new();
                if !bytes.starts_with(&wire::PREAMBLE) {
                    decoder.push(&wire::PREAMBLE);
                }
                decoder.push(&bytes);
                while let Some(message) = decoder.next_message().unwrap() {
                    own.sent.push(message.name());
                }
                if !self.is_cut {
                    peer.core.receive(now_ns, &bytes);
                }
            }
            Effect::Prove { number } if !(self.is_down && host == 1) => {
                self.nonces += 1;
                let nonce = Nonce([self.nonces; 16]);
                let side = &mut self.sides[host];
                self.witnesses[side.witness].push(nonce);
                side.core.proof_written(number, nonce);
            }
            Effect::LookFor { number, nonce } => {
                self.sides[host].unanswered.push((number, nonce));
                self.answer(host);
            }
            Effect::HangUp if self.is_cut => {}
            Effect::BreakOff if self.is_cut => {}
            Effect::BreakOff => {
                let description = "connection reset".to_owned();
                let reason = DisconnectReason::Transport { description };
                self.sides[other].core.disconnect(now_ns, reason);
            }
            Effect::HangUp => {
                self.sides[other].core.disconnect(now_ns, DisconnectReason::Closed);
            }
            Effect::HoldTerm(term) | Effect::ClaimTerm(term) => {
                self.sides[host].claims += 1;
                let event = SessionEvent::TermClaimed { term, granted: true };
                self.sides[host].core.step(now_ns, event);
            }
            Effect::Transmit(_) => self.sides[host].frames += 1,
            Effect::Tell(notice) => self.sides[host].notices.push(notice),
            _ => {}
        }
    }

    fn answer(&mut self, host: usize) {
        let side = &mut self.sides[host];
        for (number, nonce) in core::mem::take(&mut side.unanswered) {
            let look = match self.witnesses[side.witness].contains(&nonce) {
                _ if self.is_down && host == 1 => Look::Unknown,
                true => Look::Found,
                false => Look::Missing,
            };
            side.core.proof_looked_for(self.now_ns, number, nonce, look);
        }
    }

    fn prove_again(&mut self) {
        self.sides.iter_mut().for_each(|side| side.core.prove_again());
        self.settle();
    }

    fn common(&self) -> [Common; 2] {
        [0, 1].map(|host| self.sides[host].core.common_witness())
    }

    fn has_begun(&self) -> bool {
        self.sides.iter().any(|side| side.core.begin().is_some())
    }
}

#[test]
fn a_pair_with_one_witness_begins_after_both_have_proved_it() {
    let mut two = Two::new([0, 0]);
    two.connect();
    assert!(two.sides.iter().all(|side| side.core.session().is_protected()));
    assert_eq!(two.common(), [Common::Yes; 2]);
    assert_eq!(two.sides[1].core.witness_is_common(), Some(true));
    let sent = &two.sides[0].sent;
    let at = |name| sent.iter().position(|sent| *sent == name);
    assert!(at("Proved") < at("Welcome") && at("Prove") < at("Welcome"), "{sent:?}");
}

#[test]
fn hosts_with_a_witness_each_refuse_each_other_and_claim_nothing() {
    let mut two = Two::new([0, 1]);
    two.connect();
    assert!(!two.has_begun());
    for host in 0..2 {
        let (ours, theirs) = (place(host), place(1 - host));
        let refusal = Refusal::OtherWitness { ours, theirs };
        let side = &two.sides[host];
        assert_eq!(side.core.stop(), Some(&StopReason::BadConfiguration(refusal)), "{host}");
        assert_eq!(side.claims, 0);
    }
}

#[test]
fn a_witness_of_which_only_one_side_sees_the_other_is_not_common() {
    // The second witness is a copy that is made of the first one all the time.
    let mut two = Two::new([0, 1]);
    let now_ns = two.now_ns;
    two.sides.iter_mut().for_each(|side| side.core.connect(now_ns));
    for _ in 0..20 {
        two.witnesses[1] = [two.witnesses[0].clone(), two.witnesses[1].clone()].concat();
        for host in [0, 1] {
            let effects = two.sides[host].core.take_effects();
            effects.into_iter().for_each(|effect| two.perform(host, effect));
        }
    }
    assert!(!two.has_begun() && two.sides.iter().all(|side| side.core.stop().is_some()));
}

#[test]
fn a_witness_that_does_not_answer_lets_nothing_begin_until_it_does() {
    let mut two = Two::new([0, 0]);
    two.is_down = true;
    two.connect();
    assert!(!two.has_begun() && two.sides.iter().all(|side| side.core.stop().is_none()));
    assert_eq!(two.sides[0].claims, 0);
    two.is_down = false;
    let now_ns = two.now_ns;
    for side in &mut two.sides {
        side.core.disconnect(now_ns, DisconnectReason::Closed);
    }
    two.settle();
    two.connect();
    assert!(two.sides.iter().all(|side| side.core.session().is_protected()));
}

#[test]
fn a_guest_that_runs_goes_on_without_a_backup_of_another_witness() {
    let mut two = Two::new([0, 1]);
    two.sides[0].core.step(two.now_ns, SessionEvent::StartAlone);
    two.settle();
    two.connect();
    let [primary, backup] = &two.sides;
    assert!(primary.core.stop().is_none() && !primary.core.session().is_attaching());
    assert!(!primary.sent.contains(&"Attach"));
    assert!(primary.notices.iter().any(|n| matches!(n, Notice::Witness { is_common: false, .. })));
    assert!(matches!(backup.core.stop(), Some(StopReason::BadConfiguration(_))));
}

#[test]
fn a_pair_whose_witnesses_come_apart_runs_on_and_says_so_once() {
    let mut two = Two::new([0, 0]);
    two.connect();
    two.sides[1].witness = 1;
    two.prove_again();
    two.prove_again();
    assert!(two.sides.iter().all(|side| side.core.session().is_protected()));
    assert_eq!(two.common()[1], Common::No);
    assert_eq!(two.sides[0].core.witness_is_common(), Some(false));
    let told = |two: &Two, common| {
        let is =
            |n: &&Notice| matches!(n, Notice::Witness { is_common, .. } if *is_common == common);
        two.sides.each_ref().map(|side| side.notices.iter().filter(is).count())
    };
    let apart = told(&two, false);
    assert!(apart.iter().all(|count| (1..=2).contains(count)), "{apart:?}");
    two.prove_again();
    assert_eq!(told(&two, false), apart);
    two.sides[1].witness = 0;
    two.prove_again();
    assert_eq!(two.common(), [Common::Yes; 2]);
    assert_eq!(told(&two, true), [1, 1]);
}

#[test]
fn a_backup_that_lost_sight_of_the_witness_knows_it_again_by_the_last_number() {
    let mut two = Two::new([0, 0]);
    two.connect();
    // The other host still finds this one's number, and this one not the other's.
    two.sides[1].witness = 1;
    two.sides[0].core.prove_again();
    two.settle();
    let last = Nonce([two.nonces; 16]);
    two.sides.iter_mut().for_each(|side| side.core.disconnect(2_000_000, DisconnectReason::Closed));
    assert_eq!(two.common()[1], Common::IfSeen(last));
}

#[test]
fn numbers_without_end_are_one_look_at_a_time() {
    let mut core = core(Role::Primary);
    core.require_proof(place(0));
    core.connect(0);
    core.receive(0, &wire::PREAMBLE);
    let _ = core.take_effects();
    let prove = |number: u8| {
        let mut bytes = Vec::new();
        let message = Message::Prove { nonce: Nonce([number; 16]), place: place(1) };
        wire::encode(&message, &mut bytes);
        bytes
    };
    (1..=200).for_each(|number| core.receive(0, &prove(number)));
    let first = Effect::LookFor { number: 1, nonce: Nonce([1; 16]) };
    assert_eq!(core.take_effects(), [first]);
    core.proof_looked_for(0, 1, Nonce([1; 16]), Look::Missing);
    let last = Effect::LookFor { number: 1, nonce: Nonce([200; 16]) };
    assert_eq!(core.take_effects(), [last], "no answer about a number that was taken back");
}

#[test]
fn a_term_is_not_offered_before_the_proof() {
    let mut core = core(Role::Backup);
    core.require_proof(place(0));
    core.connect(0);
    core.receive(0, &wire::PREAMBLE);
    let mut bytes = Vec::new();
    let early = Message::Heartbeat { term: Term(1), released_through: crate::OutputOrdinal(0) };
    wire::encode(&early, &mut bytes);
    core.receive(0, &bytes);
    assert!(!core.is_connected() && core.stop().is_none());
}
