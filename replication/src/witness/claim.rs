//! The one decider: whether a claim for a term is granted, whatever store the witness is.

use super::{Entry, Replaced, WitnessError, WitnessStore};
use crate::record::Term;

/// Why a host claims a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To start a guest that runs nowhere.
    Start,
    /// To go on with the guest, which runs in the term before.
    GoOn,
    /// To start a guest of another identity, whatever runs: the operator has said so.
    Replace,
}

/// Answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The term is the claimant's.
    Granted,
    /// It is not.
    Denied {
        /// The entry that stands in the way.
        current: Entry,
    },
}

/// What is to be done about a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// The store holds what is wanted.
    Held,
    /// The wanted entry is to take the place of what the store holds.
    Store,
    /// The claim is lost.
    Deny(Entry),
    /// The store does not hold the term before, so it knows too little to say.
    Unknown,
}

/// What follows when the store holds `current`.
///
/// A term is granted to the first holder that claims it while the store holds exactly the term
/// before, and to the same holder again. A store that has forgotten a term, or never had it, grants
/// nothing: another host may have been given that term and the next by the one that remembers.
fn judge(current: Option<&Entry>, wanted: &Entry, purpose: Purpose) -> Verdict {
    let before = current.map_or(Term(0), |entry| entry.term);
    if before > wanted.term {
        return current.cloned().map_or(Verdict::Unknown, Verdict::Deny);
    }
    let Some(entry) = current else {
        return if wanted.term == Term(1) { Verdict::Store } else { Verdict::Unknown };
    };
    let same_guest = entry.guest == wanted.guest;
    let same_holder = entry.holder == wanted.holder;
    if entry.term == wanted.term {
        return match same_holder && same_guest {
            // An entry never goes back: a late wish to wait does not undo that the guest runs.
            true if entry.doing as u8 > wanted.doing as u8 => Verdict::Held,
            true if entry.doing == wanted.doing && entry.last_ran() >= wanted.last_ran() => {
                Verdict::Held
            }
            true => Verdict::Store,
            false => Verdict::Deny(entry.clone()),
        };
    }
    if entry.term.next() != wanted.term {
        return Verdict::Unknown;
    }
    let may = match purpose {
        Purpose::GoOn => same_guest,
        // The holder of a term in which nothing runs starts nothing before it has written that it
        // does, and that fails once this claim is stored.
        Purpose::Start => !entry.may_run() || (same_holder && same_guest),
        Purpose::Replace => true,
    };
    if may { Verdict::Store } else { Verdict::Deny(entry.clone()) }
}

/// Claims `wanted.term`, or changes what its holder does in it. The last term in which a guest ran
/// is kept, unless `wanted` has a later one. Safe to ask again when no answer came: what was stored
/// is found and granted.
///
/// # Errors
/// [`WitnessError`] when there is no answer; nothing may start or be released on one.
pub fn claim(
    store: &mut dyn WitnessStore,
    wanted: &Entry,
    purpose: Purpose,
) -> Result<Claim, WitnessError> {
    let mut current = store.read()?;
    loop {
        match judge(current.as_ref(), wanted, purpose) {
            Verdict::Held => return Ok(Claim::Granted),
            Verdict::Deny(current) => return Ok(Claim::Denied { current }),
            Verdict::Unknown => {
                return Err(WitnessError::Forgotten {
                    place: store.place(),
                    wanted: wanted.term,
                    held: current.map_or(Term(0), |entry| entry.term),
                });
            }
            Verdict::Store => {
                let ran = current.as_ref().map_or(Term(0), Entry::last_ran);
                let new = Entry { ran: Some(ran.max(wanted.last_ran())), ..wanted.clone() };
                match store.replace(current.as_ref(), &new)? {
                    Replaced::Stored => return Ok(Claim::Granted),
                    // Someone was faster. Terms only go up, so this ends.
                    Replaced::Conflict(now) => current = now,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::super::entry::tests::entry;
    use super::super::{Doing, Nonce};
    use super::*;

    /// What goes wrong at the next replacement.
    #[derive(Clone, Copy, Default, PartialEq)]
    enum Trouble {
        #[default]
        None,
        /// It is stored and the answer is lost.
        AnswerLost,
        /// It is not stored and there is no answer.
        Down,
    }

    /// A store that several share.
    #[derive(Clone, Default)]
    struct Memory {
        held: Rc<RefCell<Option<Entry>>>,
        trouble: Trouble,
        /// Stored by another between our read and our replacement.
        rival: Option<Entry>,
    }

    impl Memory {
        fn with(held: Entry) -> Self {
            Self { held: Rc::new(RefCell::new(Some(held))), ..Self::default() }
        }

        fn down(&self) -> WitnessError {
            WitnessError::Unusable {
                place: "memory".into(),
                reason: "it is down".into(),
                remedy: "start it".into(),
            }
        }
    }

    impl WitnessStore for Memory {
        fn place(&self) -> String {
            "memory".into()
        }

        fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
            Ok(self.held.borrow().clone())
        }

        fn replace(
            &mut self,
            expected: Option<&Entry>,
            new: &Entry,
        ) -> Result<Replaced, WitnessError> {
            if self.trouble == Trouble::Down {
                return Err(self.down());
            }
            if let Some(rival) = self.rival.take() {
                *self.held.borrow_mut() = Some(rival);
            }
            if self.held.borrow().as_ref() != expected {
                return Ok(Replaced::Conflict(self.held.borrow().clone()));
            }
            *self.held.borrow_mut() = Some(new.clone());
            if std::mem::take(&mut self.trouble) == Trouble::AnswerLost {
                return Err(self.down());
            }
            Ok(Replaced::Stored)
        }

        fn prove(&mut self, _: Nonce) -> Result<(), WitnessError> {
            Ok(())
        }

        fn sees(&mut self, _: Nonce) -> Result<bool, WitnessError> {
            Ok(true)
        }
    }

    fn live(term: u64, guest: u8, holder: &str) -> Entry {
        entry(term, guest, holder, Doing::Live)
    }

    fn ask(store: &mut Memory, wanted: &Entry, purpose: Purpose) -> String {
        match claim(store, wanted, purpose) {
            Ok(Claim::Granted) => {
                assert_eq!(store.held.borrow().as_ref(), Some(wanted));
                "granted".into()
            }
            Ok(Claim::Denied { current }) => format!("denied by {}", current.holder),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_term_follows_exactly_the_term_before() {
        for (held, wanted, answer) in [
            (None, 1, "granted"),
            (None, 2, "holds no term, but term 1 was given away"),
            (Some(4), 5, "granted"),
            (Some(3), 5, "holds term 3, but term 4 was given away"),
            (Some(5), 5, "denied by a"),
            (Some(6), 5, "denied by a"),
        ] {
            let mut store =
                held.map_or_else(Memory::default, |term| Memory::with(live(term, 1, "a")));
            let said = ask(&mut store, &live(wanted, 1, "b"), Purpose::GoOn);
            assert!(said.contains(answer), "{held:?} {wanted}: {said}");
        }
    }

    #[test]
    fn only_the_guest_that_the_term_is_for_goes_on() {
        let mut store = Memory::with(live(4, 1, "a"));
        assert_eq!(ask(&mut store, &live(5, 2, "b"), Purpose::GoOn), "denied by a");
        assert_eq!(ask(&mut store, &live(5, 1, "b"), Purpose::GoOn), "granted");
    }

    #[test]
    fn a_guest_starts_only_where_none_is_live() {
        for (doing, answer) in
            [(Doing::Waiting, "granted"), (Doing::Live, "denied by a"), (Doing::Ended, "granted")]
        {
            for guest in [1, 2] {
                let mut store = Memory::with(entry(4, 1, "a", doing));
                assert_eq!(ask(&mut store, &live(5, guest, "b"), Purpose::Start), answer);
            }
        }
        let mut store = Memory::with(live(4, 1, "a"));
        assert_eq!(ask(&mut store, &live(5, 2, "b"), Purpose::Replace), "granted");
        assert_eq!(ask(&mut store, &live(5, 1, "a"), Purpose::GoOn), "denied by b", "fenced");
    }

    #[test]
    fn who_waits_is_live_only_while_nobody_took_the_next_term() {
        let mut store = Memory::with(entry(4, 1, "a", Doing::Waiting));
        assert_eq!(ask(&mut store, &live(4, 1, "a"), Purpose::Start), "granted");
        assert_eq!(ask(&mut store, &live(5, 1, "b"), Purpose::Start), "denied by a");
        let mut store = Memory::with(entry(4, 1, "a", Doing::Waiting));
        store.rival = Some(live(5, 1, "b"));
        assert_eq!(ask(&mut store, &live(4, 1, "a"), Purpose::Start), "denied by b");
    }

    /// The holder has the term, and the guest has not run in it.
    fn held(term: u64, guest: u8, holder: &str) -> Entry {
        Entry { ran: Some(Term(0)), ..live(term, guest, holder) }
    }

    #[test]
    fn a_term_in_which_nothing_ran_is_kept_from_nobody_and_its_holder_starts_late_or_never() {
        let mut store = Memory::with(live(4, 1, "a"));
        assert_eq!(claim(&mut store, &held(5, 1, "a"), Purpose::Start).unwrap(), Claim::Granted);
        let now = |store: &Memory| store.held.borrow().clone().unwrap();
        assert_eq!((now(&store).last_ran(), now(&store).may_run()), (Term(4), false));
        // It is killed, and started again.
        let again = held(6, 1, "b");
        assert_eq!(claim(&mut store, &again, Purpose::Start).unwrap(), Claim::Granted);
        assert_eq!(now(&store).last_ran(), Term(4), "of two terms before");
        assert_eq!(ask(&mut store, &live(5, 1, "a"), Purpose::Start), "denied by b", "too late");
        assert_eq!(ask(&mut store, &live(6, 1, "b"), Purpose::Start), "granted");
        assert!(now(&store).may_run());
        assert_eq!(ask(&mut store, &live(7, 1, "c"), Purpose::Start), "denied by b");
        // A late wish to hold it only does not undo that the guest runs.
        assert_eq!(claim(&mut store, &again, Purpose::Start).unwrap(), Claim::Granted);
        assert!(now(&store).may_run());
    }

    #[test]
    fn an_entry_never_goes_back() {
        let mut store = Memory::with(entry(4, 1, "a", Doing::Ended));
        let answer = claim(&mut store, &live(4, 1, "a"), Purpose::Start).unwrap();
        assert_eq!(answer, Claim::Granted);
        assert_eq!(store.held.borrow().as_ref().unwrap().doing, Doing::Ended);
    }

    #[test]
    fn a_claim_whose_answer_was_lost_is_granted_again() {
        let mut store = Memory::with(live(4, 1, "a"));
        store.trouble = Trouble::AnswerLost;
        assert!(ask(&mut store, &live(5, 1, "b"), Purpose::GoOn).contains("cannot be used"));
        let mut rival = Memory { trouble: Trouble::None, ..store.clone() };
        assert_eq!(ask(&mut rival, &live(5, 1, "a"), Purpose::GoOn), "denied by b");
        assert_eq!(ask(&mut store, &live(5, 1, "b"), Purpose::GoOn), "granted");
    }

    #[test]
    fn a_store_that_is_down_grants_nothing() {
        let mut store = Memory::with(live(4, 1, "a"));
        store.trouble = Trouble::Down;
        assert!(ask(&mut store, &live(5, 1, "b"), Purpose::GoOn).contains("down"));
        assert_eq!(store.held.borrow().as_ref().unwrap().term, Term(4));
    }
}
