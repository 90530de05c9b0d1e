//! Which phases and rows of the decision table a schedule has led to.

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

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
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

    pub fn add(&mut self, other: &Self) {
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
