//! Whether a disk may be used (decision 0035): one function of what its label says, of what this
//! host is about to do with it, and of what the witness knows.

use thiserror::Error;

use crate::disk_label::{DiskLabel, DiskState};
use crate::record::Term;
use crate::witness::{Entry, GuestId};

/// What a host is about to do with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskPurpose {
    /// Run the guest on it, without a witness.
    Solo,
    /// Run the guest on it, as the witness allows.
    Run,
    /// Follow another host: the disk is overwritten by the other's, or compared with it whole.
    Follow,
}

/// What the witness knows of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastRun {
    /// The guest, if it has an identity.
    pub guest: Option<GuestId>,
    /// The last term in which a host may have run it; 0 when none has.
    pub ran: Term,
    /// The last term given away; 0 for none. In those after `ran` no guest has run.
    pub known: Term,
}

impl LastRun {
    /// What an entry of the witness says.
    #[must_use]
    pub fn of(entry: Option<&Entry>) -> Self {
        let Some(entry) = entry else { return Self::default() };
        Self { guest: Some(entry.guest), ran: entry.last_ran(), known: entry.term }
    }

    /// The same for a host that starts `guest`, of which the witness may know nothing yet.
    #[must_use]
    pub fn or_new(self, guest: GuestId) -> Self {
        Self { guest: self.guest.or(Some(guest)), ..self }
    }
}

/// What the user may overrule, by its name in `--disk …,force=NAME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// The disk is used although it was not copied to its end.
    Incomplete,
    /// The disk is used although another host may have gone on from it.
    Outdated,
    /// The disk is used although it is another guest's.
    Guest,
}

impl Force {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Incomplete, Self::Outdated, Self::Guest];

    /// As the command line names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Incomplete => "incomplete",
            Self::Outdated => "outdated",
            Self::Guest => "guest",
        }
    }
}

/// Why a disk may not be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DiskRefusal {
    /// A state was being written over it when its host died.
    #[error(
        "it is incomplete: since {since} it was being overwritten by the state of a running guest, \
         which did not come to its end; attach it again as a backup's disk"
    )]
    Incomplete {
        /// Since when.
        since: String,
    },
    /// Another host has run the guest since.
    #[error(
        "it is outdated: it was {state} in term {term} (since {since}), and the guest has run \
         until term {last} elsewhere; attach it as a backup's disk"
    )]
    Outdated {
        /// What it was.
        state: DiskState,
        /// When it was last used.
        term: Term,
        /// Since when.
        since: String,
        /// The last term of the guest.
        last: Term,
    },
    /// Nobody can say whether another host has run the guest since.
    #[error(
        "it may be outdated: it was {state} in term {term} of a pair (since {since}), and without \
         the pair's witness nobody can tell whether the other host went on; start it as one of \
         the pair"
    )]
    Unknown {
        /// What it was.
        state: DiskState,
        /// In which term.
        term: Term,
        /// Since when.
        since: String,
    },
    /// The disk has seen a term that the witness does not know.
    #[error(
        "it was {state} in term {term} (since {since}), but the witness knows terms up to {last} \
         only: it is another witness, or was emptied"
    )]
    WitnessBehind {
        /// What it was.
        state: DiskState,
        /// In which term.
        term: Term,
        /// Since when.
        since: String,
        /// The highest that the witness knows.
        last: Term,
    },
    /// It is another guest's.
    #[error("it is the disk of another guest, {theirs}; the witness knows {ours}")]
    Guest {
        /// The guest of the witness.
        ours: GuestId,
        /// The guest of the disk.
        theirs: GuestId,
    },
}

impl DiskRefusal {
    /// What overrules it.
    #[must_use]
    pub fn force(&self) -> Force {
        match self {
            Self::Incomplete { .. } => Force::Incomplete,
            Self::Outdated { .. } | Self::Unknown { .. } | Self::WitnessBehind { .. } => {
                Force::Outdated
            }
            Self::Guest { .. } => Force::Guest,
        }
    }
}

/// Decides whether a disk may be used. `label` is `None` for a disk that was never used.
///
/// # Errors
/// The reason against it that `forced` does not name.
pub fn may_use(
    label: Option<&DiskLabel>,
    purpose: DiskPurpose,
    known: LastRun,
    forced: &[Force],
) -> Result<(), DiskRefusal> {
    let Some(label) = label else { return Ok(()) };
    let reasons = [
        guest_refusal(label, known),
        incomplete_refusal(label, purpose),
        term_refusal(label, purpose, known),
    ];
    let stands = |reason: &DiskRefusal| !forced.contains(&reason.force());
    reasons.into_iter().flatten().find(stands).map_or(Ok(()), Err)
}

fn guest_refusal(label: &DiskLabel, known: LastRun) -> Option<DiskRefusal> {
    let (ours, theirs) = (known.guest?, label.guest?);
    // A start that came to nothing makes it nobody's.
    let has_run = label.mark.state != DiskState::Clean || label.mark.term > Term(0);
    (ours != theirs && has_run).then_some(DiskRefusal::Guest { ours, theirs })
}

fn incomplete_refusal(label: &DiskLabel, purpose: DiskPurpose) -> Option<DiskRefusal> {
    let is_refused = label.mark.state == DiskState::Incomplete && purpose != DiskPurpose::Follow;
    is_refused.then(|| DiskRefusal::Incomplete { since: label.since.clone() })
}

fn term_refusal(label: &DiskLabel, purpose: DiskPurpose, last: LastRun) -> Option<DiskRefusal> {
    let LastRun { ran, known, .. } = last;
    let (state, term, since) = (label.mark.state, label.mark.term, label.since.clone());
    let is_of_no_pair = term == Term(0);
    let is_clean = state == DiskState::Clean;
    match purpose {
        DiskPurpose::Follow => None,
        // Whoever begins anew with what a guest left in order knows where it is from.
        _ if state == DiskState::Incomplete || is_of_no_pair => None,
        DiskPurpose::Solo => (!is_clean).then_some(DiskRefusal::Unknown { state, term, since }),
        DiskPurpose::Run if term < ran => {
            Some(DiskRefusal::Outdated { state, term, since, last: ran })
        }
        DiskPurpose::Run if term > known && !(is_clean && known == Term(0)) => {
            Some(DiskRefusal::WitnessBehind { state, term, since, last: known })
        }
        DiskPurpose::Run => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_label::DiskMark;
    use crate::witness::{Doing, Holder, moment};

    fn label(state: DiskState, term: u64, guest: Option<u8>) -> DiskLabel {
        let guest = guest.map(|number| GuestId::from_random([number; 16]));
        DiskLabel { guest, mark: DiskMark { state, term: Term(term) }, since: "then".into() }
    }

    fn known(term: u64, guest: Option<u8>) -> LastRun {
        let guest = guest.map(|number| GuestId::from_random([number; 16]));
        LastRun { guest, ran: Term(term), known: Term(term) }
    }

    /// `use`, or what has to be forced.
    fn answer(label: &DiskLabel, purpose: DiskPurpose, known: LastRun) -> &'static str {
        match may_use(Some(label), purpose, known, &[]) {
            Ok(()) => "use",
            Err(refusal) => {
                may_use(Some(label), purpose, known, &[refusal.force()]).unwrap();
                for other in Force::ALL.into_iter().filter(|other| *other != refusal.force()) {
                    may_use(Some(label), purpose, known, &[other]).unwrap_err();
                }
                refusal.force().name()
            }
        }
    }

    #[test]
    fn the_table() {
        use DiskPurpose::{Follow, Run, Solo};
        use DiskState::{Active, Clean, Following, Incomplete};
        for (state, term, purpose, last, wanted) in [
            // An incomplete disk is good for another copy only, whatever its term.
            (Incomplete, 0, Solo, 0, "incomplete"),
            (Incomplete, 3, Solo, 0, "incomplete"),
            (Incomplete, 3, Run, 3, "incomplete"),
            (Incomplete, 2, Run, 3, "incomplete"),
            (Incomplete, 4, Run, 3, "incomplete"),
            (Incomplete, 3, Follow, 3, "use"),
            // A guest alone, and what it cannot know.
            (Clean, 0, Solo, 0, "use"),
            (Active, 0, Solo, 0, "use"),
            (Clean, 3, Solo, 0, "use"),
            (Active, 3, Solo, 0, "outdated"),
            (Following, 3, Solo, 0, "outdated"),
            // The host that ran it last, or the one that followed it.
            (Clean, 3, Run, 3, "use"),
            (Active, 3, Run, 3, "use"),
            (Following, 3, Run, 3, "use"),
            // Another host has gone on.
            (Clean, 2, Run, 3, "outdated"),
            (Active, 2, Run, 3, "outdated"),
            (Following, 2, Run, 3, "outdated"),
            // The witness has forgotten; a disk that was left in order begins anew.
            (Active, 4, Run, 3, "outdated"),
            (Clean, 4, Run, 3, "outdated"),
            (Following, 4, Run, 0, "outdated"),
            (Clean, 4, Run, 0, "use"),
            // A guest that was alone becomes one of a pair.
            (Clean, 0, Run, 0, "use"),
            (Active, 0, Run, 0, "use"),
            (Clean, 0, Run, 3, "use"),
            // A copy may go over anything.
            (Clean, 2, Follow, 3, "use"),
            (Active, 2, Follow, 3, "use"),
            (Following, 4, Follow, 3, "use"),
        ] {
            for (of, by) in [(None, None), (Some(1), None), (None, Some(1)), (Some(1), Some(1))] {
                let found = answer(&label(state, term, of), purpose, known(last, by));
                assert_eq!(found, wanted, "{state} in {term}, {purpose:?}, last {last}");
            }
        }
    }

    #[test]
    fn a_disk_of_another_guest_is_refused_in_every_role() {
        for purpose in [DiskPurpose::Run, DiskPurpose::Follow] {
            let other = label(DiskState::Clean, 3, Some(2));
            assert_eq!(answer(&other, purpose, known(3, Some(1))), "guest", "{purpose:?}");
        }
        // A witness that knows nothing yet is that of a new guest.
        let new = LastRun::default().or_new(GuestId::from_random([1; 16]));
        for purpose in [DiskPurpose::Run, DiskPurpose::Follow] {
            let label = |of| label(DiskState::Clean, 3, of);
            assert_eq!(answer(&label(Some(2)), purpose, new), "guest", "{purpose:?}");
            assert_eq!(answer(&label(None), purpose, new), "use", "{purpose:?}");
        }
        assert_eq!(known(3, Some(1)).or_new(GuestId::from_random([2; 16])), known(3, Some(1)));
        // No guest has run on it.
        assert_eq!(answer(&label(DiskState::Clean, 0, Some(2)), DiskPurpose::Run, new), "use");
        // Each reason is to be overruled by its own name.
        let both = label(DiskState::Incomplete, 3, Some(2));
        let asked = |forced: &[Force]| {
            may_use(Some(&both), DiskPurpose::Run, known(3, Some(1)), forced)
                .err()
                .map(|refusal| refusal.force())
        };
        assert_eq!(asked(&[]), Some(Force::Guest));
        assert_eq!(asked(&[Force::Guest]), Some(Force::Incomplete));
        assert_eq!(asked(&[Force::Incomplete]), Some(Force::Guest));
        assert_eq!(asked(&[Force::Incomplete, Force::Guest]), None);
    }

    #[test]
    fn a_disk_without_a_label_is_a_fresh_one() {
        for purpose in [DiskPurpose::Solo, DiskPurpose::Run, DiskPurpose::Follow] {
            may_use(None, purpose, known(3, Some(1)), &[]).unwrap();
        }
    }

    #[test]
    fn terms_in_which_no_guest_ran_outdate_no_disk() {
        let waits = |term, ran: Option<u64>| Entry {
            term: Term(term),
            guest: GuestId::from_random([1; 16]),
            holder: Holder::from_text("a").unwrap(),
            doing: Doing::Waiting,
            ran: ran.map(Term),
            seen: moment(0),
        };
        let last = LastRun::of(Some(&waits(7, Some(3))));
        assert_eq!((last.ran, last.known), (Term(3), Term(7)));
        for state in [DiskState::Clean, DiskState::Active, DiskState::Following] {
            for (term, wanted) in [(2, "outdated"), (3, "use"), (5, "use"), (7, "use")] {
                let found = answer(&label(state, term, Some(1)), DiskPurpose::Run, last);
                assert_eq!(found, wanted, "{state} in {term}");
            }
            let late = answer(&label(state, 8, Some(1)), DiskPurpose::Run, last);
            assert_eq!(late, "outdated", "the witness is behind");
        }
        // One that does not say may mean the term before.
        assert_eq!(LastRun::of(Some(&waits(7, None))).ran, Term(6));
        assert_eq!(LastRun::of(None), LastRun::default());
    }
}
