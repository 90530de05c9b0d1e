//! Which phases and rows of the decision table a schedule has led to, and what else happened.

use std::collections::BTreeMap;

use ftvmm_replication::Role;
use ftvmm_replication::session::decision::DECISIONS;

/// Every phase a caller can see.
const PHASES: [(Role, &[&str]); 2] = [
    (
        Role::Primary,
        &[
            "AwaitingBackup",
            "ClaimingFirstTerm",
            "AwaitingReady",
            "Beginning",
            "Protected",
            "AwaitingEvidence",
            "ClaimingTerm",
            "Alone",
            "StartingAlone",
            "Attaching",
            "Yielding",
            "HandingOver",
            "Stopped",
        ],
    ),
    (
        Role::Backup,
        &[
            "AwaitingWelcome",
            "Joining",
            "Following",
            "AwaitingVerdict",
            "ClaimingTerm",
            "Live",
            "Stopped",
        ],
    ),
];

/// What must happen around the cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    /// Effects were performed later than they were decided.
    PerformedLate,
    /// The guest was held because the other host is far behind.
    Congested,
    /// A follower compared a check, or put a slice in place.
    CheckCompared,
    SliceLoaded,
    /// A host crashed with half a slice in the log.
    SliceTorn,
    /// A whole state was put in place: of another host, or from a file.
    Attached,
    Restored,
    /// A part of a state waited until the other host had taken others.
    WaitedForRoom,
    /// A running guest was saved to a file.
    Saved,
    /// The answer in the log was compared with the own disk's.
    DiskCompared,
    /// A guest was told of a flush that both disks had.
    FlushOnBoth,
    /// A guest was told that its disk failed, or its host left for it.
    DiskFailureTold,
    LeftWithDisk,
    /// Frames came to the guest by way of its old place.
    StraysGiven,
    /// A host that had stood still read what had arrived meanwhile.
    ReadLate,
    /// The client got a frame again from the host that took over, as it may.
    Repeated,
    /// A disk was half overwritten, was behind the guest, or could have been used, when a host was
    /// lost.
    DiskIncomplete,
    DiskOutdated,
    DiskUsable,
    /// The witness was asked while it answered nobody.
    WitnessDown,
    /// The guest was started with the old command line while it ran elsewhere.
    SecondStartRefused,
    /// A connection that broke was made again, and both hosts went on; messages were sent again.
    ConnectedAgain,
    Resumed,
    SentAgain,
}

const MARKS: [Mark; 24] = [
    Mark::PerformedLate,
    Mark::Congested,
    Mark::CheckCompared,
    Mark::SliceLoaded,
    Mark::SliceTorn,
    Mark::Attached,
    Mark::Restored,
    Mark::WaitedForRoom,
    Mark::Saved,
    Mark::DiskCompared,
    Mark::FlushOnBoth,
    Mark::DiskFailureTold,
    Mark::LeftWithDisk,
    Mark::StraysGiven,
    Mark::ReadLate,
    Mark::Repeated,
    Mark::DiskIncomplete,
    Mark::DiskOutdated,
    Mark::DiskUsable,
    Mark::WitnessDown,
    Mark::SecondStartRefused,
    Mark::ConnectedAgain,
    Mark::Resumed,
    Mark::SentAgain,
];

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    marks: BTreeMap<Mark, u64>,
    phases: BTreeMap<(&'static str, &'static str), u64>,
    rows: BTreeMap<&'static str, u64>,
}

impl Coverage {
    pub fn phase(&mut self, role: Role, name: &'static str) {
        *self.phases.entry((role.name(), name)).or_default() += 1;
    }

    pub fn row(&mut self, letter: &'static str) {
        *self.rows.entry(letter).or_default() += 1;
    }

    /// How often a row was applied.
    pub fn row_count(&self, letter: &str) -> u64 {
        self.rows.get(letter).copied().unwrap_or_default()
    }

    pub fn mark(&mut self, mark: Mark) {
        *self.marks.entry(mark).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (mark, count) in &other.marks {
            *self.marks.entry(*mark).or_default() += count;
        }
        for (phase, count) in &other.phases {
            *self.phases.entry(*phase).or_default() += count;
        }
        for (row, count) in &other.rows {
            *self.rows.entry(row).or_default() += count;
        }
    }

    /// Prints how often each was reached; names those that were not.
    pub fn report(&self) -> Vec<String> {
        let mut missed = Vec::new();
        for mark in MARKS {
            let count = self.marks.get(&mark).copied().unwrap_or_default();
            println!("{mark:<27?} {count:>7}");
            if count == 0 {
                missed.push(format!("{mark:?}"));
            }
        }
        for (role, names) in PHASES {
            for name in names {
                let count = self.phases.get(&(role.name(), *name)).copied().unwrap_or_default();
                println!("{role:>8} {name:<18} {count:>7}");
                if count == 0 {
                    missed.push(format!("{role} {name}"));
                }
            }
        }
        for row in DECISIONS {
            let count = self.rows.get(row.letter).copied().unwrap_or_default();
            let (letter, situation, trouble) = (row.letter, row.situation, row.trouble);
            println!("row {letter:>3} {count:>6} {situation:?} {trouble:?}");
            if count == 0 {
                missed.push(format!("row {letter} ({situation:?} {trouble:?})"));
            }
        }
        missed
    }
}
