//! Where this host asks for terms: on threads of its own, since a shared folder may not answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use ftvmm_host::Seldom;
use ftvmm_host::clock::host_unix_seconds;
use ftvmm_host::contain::Thread;
use ftvmm_host::sync::{Mutex, lock};
use ftvmm_replication::witness::{
    Claim, Doing, Entry, GuestId, Holder, Purpose, WitnessError, WitnessStore, claim, moment,
};
use ftvmm_replication::{SessionEvent, Term};

use super::Peer;

/// Pause between two claims to a witness that does not answer.
const RETRY: Duration = Duration::from_millis(100);
/// An error that goes on is said again after so long, in seconds, and then ever more seldom.
const SAID_AFTER_S: u64 = 10;
/// But at least so often, in seconds.
const SAID_EVERY_S: u64 = 60;
/// How often a host proves its witness, and an active one renews its last sign of life, in
/// nanoseconds.
const SIGN_EVERY_NS: u64 = 10_000_000_000;

/// The witness, and what this host asks it for.
pub struct WitnessAccess {
    /// Decides which host is active.
    pub store: Box<dyn WitnessStore + Send>,
    /// This process.
    pub holder: Holder,
    /// The guest it starts. One that follows another host's takes that guest's identity.
    pub guest: GuestId,
    /// Why the first term is claimed.
    pub purpose: Purpose,
    /// The other host has to show that it sees the same witness.
    pub asks_for_proof: bool,
}

/// [`WitnessAccess`] in use.
pub struct WitnessDesk {
    pub(super) access: Mutex<WitnessAccess>,
    /// A thread gives a sign of life.
    is_signing: AtomicBool,
    /// When the last one began, by the session's clock.
    signed_ns: AtomicU64,
    /// Threads that write or look for a number.
    pub(super) proofs: AtomicU32,
    /// Of proofs and signs of life.
    lines: Mutex<Seldom>,
}

const fn said_seldom() -> Seldom {
    Seldom::new(SAID_AFTER_S, SAID_EVERY_S)
}

impl WitnessAccess {
    /// Claims `term`. With `begun`, the guest runs already, here or on the other host. `ran` is the
    /// term itself, or 0 to hold it only: another term in which the guest ran is kept.
    fn claim(&mut self, term: Term, ran: Term, begun: bool) -> Result<Claim, WitnessError> {
        let purpose = if begun { Purpose::GoOn } else { self.purpose };
        if begun && let Some(entry) = self.store.read()? {
            // The term before is the one this host has followed or held: no two have its number.
            if entry.term.next() == term {
                self.guest = entry.guest;
            }
        }
        let wanted = Entry {
            term,
            guest: self.guest,
            holder: self.holder.clone(),
            doing: Doing::Live,
            ran: Some(ran),
            seen: moment(host_unix_seconds()),
        };
        claim(self.store.as_mut(), &wanted, purpose)
    }

    /// Writes what this host does in the term it holds; nothing when it holds none.
    fn note(&mut self, doing: Doing) -> Result<(), WitnessError> {
        let Some(entry) = self.store.read()?.filter(|entry| entry.holder == self.holder) else {
            return Ok(());
        };
        let new = Entry { doing, seen: moment(host_unix_seconds()), ..entry.clone() };
        self.store.replace(Some(&entry), &new).map(|_| ())
    }
}

impl WitnessDesk {
    pub(super) fn new(access: WitnessAccess) -> Self {
        Self {
            access: Mutex::new(access),
            is_signing: AtomicBool::new(false),
            signed_ns: AtomicU64::new(0),
            proofs: AtomicU32::new(0),
            lines: Mutex::new(said_seldom()),
        }
    }
}

impl Peer {
    /// Asks the witness on a thread of its own, until it answers. `ran` is as in
    /// [`WitnessAccess::claim`].
    pub(super) fn claim(self: &Arc<Self>, term: Term, ran: Term) {
        let peer = Arc::clone(self);
        let ask = move || {
            let begun = peer.lock().begin().is_some();
            // One attempt fails at once, another after seconds: time counts, not attempts.
            let (clock, mut lines) = (peer.clocks.session, said_seldom());
            loop {
                if !peer.may_claim() {
                    if lines.may_say(clock.host_now_ns()).is_some() {
                        tracing::warn!(
                            %term,
                            "this backup claims nothing: the last proof that both hosts see the \
                             same witness failed"
                        );
                    }
                    std::thread::sleep(RETRY);
                    continue;
                }
                match lock(&peer.witness.access).claim(term, ran, begun) {
                    Ok(claim) => return peer.answered(term, &claim),
                    Err(error) => {
                        if lines.may_say(clock.host_now_ns()).is_some() {
                            tracing::warn!(
                                %error, %term, "the witness grants nothing; asking again"
                            );
                        }
                    }
                }
                std::thread::sleep(RETRY);
            }
        };
        let started = Thread::Witness.start(ask);
        if let Err(error) = started {
            tracing::error!(%error, "no thread to ask the witness; this host cannot become live");
        }
    }

    fn answered(self: &Arc<Self>, term: Term, claim: &Claim) {
        if let Claim::Denied { current } = claim {
            let (holder, won, seen) = (&current.holder, current.term, &current.seen);
            tracing::warn!(%term, %won, %holder, seen, "the witness gave the term to another host");
        }
        self.step(SessionEvent::TermClaimed { term, granted: *claim == Claim::Granted });
    }

    /// Proves the witness again and renews the last sign of life when they are old, on threads of
    /// their own; the sign while this host runs the guest. Only people read it.
    pub(super) fn give_sign_of_life(self: &Arc<Self>, now_ns: u64) {
        let desk = &self.witness;
        if now_ns.saturating_sub(desk.signed_ns.load(Ordering::Relaxed)) < SIGN_EVERY_NS {
            return;
        }
        desk.signed_ns.store(now_ns, Ordering::Relaxed);
        self.tell(|core, _| core.prove_again());
        let is_active = {
            let core = self.lock();
            core.begin().is_some() && !core.follows()
        };
        if !is_active || desk.is_signing.swap(true, Ordering::AcqRel) {
            return;
        }
        let peer = Arc::clone(self);
        let sign = move || {
            let noted = lock(&peer.witness.access).note(Doing::Live);
            peer.say_of_witness(noted.err(), "the witness does not take a sign of life");
            peer.witness.is_signing.store(false, Ordering::Release);
        };
        if Thread::Witness.start(sign).is_err() {
            desk.is_signing.store(false, Ordering::Release);
        }
    }

    /// Says what the witness has refused, or not: all that goes on beside a claim has one line at a
    /// time.
    pub(super) fn say_of_witness(&self, error: Option<WitnessError>, what: &str) {
        let mut lines = lock(&self.witness.lines);
        match error {
            None => lines.is_over(),
            Some(error) => {
                if lines.may_say(self.clocks.session.host_now_ns()).is_some() {
                    tracing::warn!(%error, "{what}");
                }
            }
        }
    }

    /// What the witness holds; `None` also when it does not answer, which is said.
    pub fn read_witness(&self) -> Option<Entry> {
        lock(&self.witness.access).store.read().unwrap_or_else(|error| {
            tracing::warn!(%error, "the witness does not say which guest it is");
            None
        })
    }

    /// The guest has ended here and may be started anew. A term that another host holds is left
    /// alone.
    pub fn tell_witness_of_the_end(&self) {
        if let Err(error) = lock(&self.witness.access).note(Doing::Ended) {
            tracing::warn!(
                %error,
                "the witness does not learn that the guest ended; its next start needs \
                 --force-new-guest"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Memory, access, of_another};
    use super::*;

    #[test]
    fn a_start_beside_a_live_guest_is_denied_and_a_take_over_keeps_the_guest() {
        let other = of_another(1);
        let mut own = access(Memory::with(other.clone()), "here");
        let denied = Claim::Denied { current: other.clone() };
        assert_eq!(own.claim(Term(2), Term(2), false).unwrap(), denied);
        assert_eq!(own.claim(Term(2), Term(2), true).unwrap(), Claim::Granted);
        let stored = own.store.read().unwrap().unwrap();
        assert_eq!((stored.guest, stored.doing), (other.guest, Doing::Live));
        assert_eq!(stored.holder, own.holder);
    }

    #[test]
    fn a_term_that_is_held_is_no_guest_that_runs() {
        let store = Memory::default();
        let [mut own, mut other] = ["here", "there"].map(|host| access(store.clone(), host));
        assert_eq!(own.claim(Term(1), Term(0), false).unwrap(), Claim::Granted);
        let held = own.store.read().unwrap().unwrap();
        assert_eq!((held.doing, held.ran, held.may_run()), (Doing::Live, Some(Term(0)), false));
        // A sign of life says no more than that.
        own.note(Doing::Live).unwrap();
        assert!(!own.store.read().unwrap().unwrap().may_run());
        // Its host is lost, and the guest is started elsewhere. Should the host be back, its own
        // guest does not start.
        assert_eq!(other.claim(Term(2), Term(2), false).unwrap(), Claim::Granted);
        let runs = other.store.read().unwrap().unwrap();
        assert!(runs.may_run());
        let denied = Claim::Denied { current: runs };
        assert_eq!(own.claim(Term(1), Term(1), false).unwrap(), denied);
    }

    #[test]
    fn only_the_holder_says_that_the_guest_has_ended() {
        let other = of_another(1);
        let mut own = access(Memory::with(other.clone()), "here");
        own.note(Doing::Ended).unwrap();
        assert_eq!(own.store.read().unwrap(), Some(other));
        own.claim(Term(2), Term(2), true).unwrap();
        own.note(Doing::Ended).unwrap();
        assert_eq!(own.store.read().unwrap().unwrap().doing, Doing::Ended);
    }
}
