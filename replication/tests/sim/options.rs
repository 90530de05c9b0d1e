//! What a seed decides beforehand.

use ftvmm_replication::{DivergencePolicy, LinkPolicy, ReleasePolicy, Role};

use crate::Random;
use crate::world::MS;

/// A fault that waits for a host to come into a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// The connection breaks; both are told.
    Cut,
    /// The connection breaks; nobody is told.
    CutInSilence,
    /// The host crashes, or the other does.
    Crash,
    CrashOther,
    /// The host crashes with half a slice in the log.
    CrashInSlice,
    /// The host, or the other, is asked to stop at once.
    Stop,
    StopOther,
    /// The operator lets the backup go.
    Detach,
    /// A bit of the host's guest flips while its processor stands still, then the connection
    /// breaks: what it has received and not executed does not fit.
    FlipAndCut,
    /// The other host says that this one is not believed, out of nothing.
    Forge,
    /// The disk fails at the next thing it does.
    BadDisk,
    /// The guest's processor does not come back.
    Stuck,
    /// The host stands still for longer than the other waits.
    Pause,
    /// A user insists that another guest is started in this one's place.
    StartAnother,
}

/// Phases in which a fault has a row of its own, and what strikes there. What seldom leads to its
/// row stands twice.
const AMBUSHES: &[(&str, Strike)] = &[
    ("AwaitingBackup", Strike::Cut),
    ("ClaimingFirstTerm", Strike::Cut),
    ("AwaitingReady", Strike::Cut),
    ("AwaitingReady", Strike::StartAnother),
    ("Beginning", Strike::Cut),
    ("AwaitingWelcome", Strike::Cut),
    ("AwaitingEvidence", Strike::Cut),
    ("AwaitingEvidence", Strike::Stop),
    ("AwaitingVerdict", Strike::Cut),
    ("ClaimingTerm", Strike::Cut),
    ("Attaching", Strike::Cut),
    ("Attaching", Strike::CutInSilence),
    ("Attaching", Strike::Detach),
    ("Attaching", Strike::CrashOther),
    ("Protected", Strike::CrashInSlice),
    ("Joining", Strike::Stop),
    ("Joining", Strike::Forge),
    ("Joining", Strike::BadDisk),
    ("Joining", Strike::Crash),
    ("Yielding", Strike::Cut),
    ("Yielding", Strike::StopOther),
    ("Yielding", Strike::StopOther),
    ("Following", Strike::FlipAndCut),
    ("Following", Strike::FlipAndCut),
    ("Following", Strike::Forge),
    ("Following", Strike::Stop),
    ("Protected", Strike::Detach),
    ("Protected", Strike::Stuck),
    ("Protected", Strike::Pause),
    ("Protected", Strike::Pause),
];

/// How quickly the witness answers, and which one.
#[derive(Clone, Copy, Debug)]
pub struct WitnessCare {
    /// How long a message to or from it takes at most.
    pub ns_max: u64,
    /// From when to when it answers nobody.
    pub outage_ns: Option<(u64, u64)>,
    /// From when on the second host sees a copy of it in its place.
    pub copied_at_ns: Option<u64>,
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Options {
    /// When outputs are released.
    pub release: ReleasePolicy,
    /// What a divergence leads to.
    pub on_divergence: DivergencePolicy,
    /// Whose state counts after one.
    pub believe: Role,
    /// What a broken way to the clients leads to.
    pub on_link_down: LinkPolicy,
    /// How many faults are tried.
    pub faults: u64,
    /// How many times the operator wants something.
    pub orders: u64,
    /// How the witness is.
    pub witness: WitnessCare,
    /// He wants nothing but the roles to change.
    pub only_switches: bool,
    /// Whether a host that is gone is replaced by a fresh one.
    pub replaces: bool,
    /// Whether the guest starts without a backup.
    pub starts_alone: bool,
    /// The guest starts alone from a snapshot that was taken while it ran.
    pub from_snapshot: bool,
    /// Whether a bit of the second host's memory flips.
    pub diverges: bool,
    /// Exit at which the guest powers off.
    pub ends_at: Option<u64>,
    /// Another pair has taken the first term.
    pub term_is_taken: bool,
    /// One in so many requests to a disk fails; 0 for none.
    pub disk_fails: u64,
    /// A primary whose disk fails leaves.
    pub disk_failover: bool,
    /// The state of the guest is more than the window of a transfer holds.
    pub big_state: bool,
    /// Strikes when a host comes into the phase.
    pub ambush: Option<(&'static str, Strike)>,
}

impl Options {
    /// The options of a seed.
    pub fn from_seed(seed: u64) -> Self {
        let mut random = Random::new(!seed);
        let mut any = |number: u64| random.between(0, number) as usize;
        let policies =
            [DivergencePolicy::Failover, DivergencePolicy::Halt, DivergencePolicy::Resync];
        let options = Self {
            release: [ReleasePolicy::Compare, ReleasePolicy::Ack][any(2)],
            on_divergence: policies[any(3)],
            believe: [Role::Primary, Role::Backup][any(2)],
            on_link_down: [LinkPolicy::Switch, LinkPolicy::Ignore][any(3) / 2],
            faults: any(4) as u64,
            orders: [0, 0, 1, 2, 4][any(5)],
            witness: WitnessCare { ns_max: 30 * MS, outage_ns: None, copied_at_ns: None },
            only_switches: false,
            replaces: any(2) == 0,
            starts_alone: any(4) == 0,
            from_snapshot: any(10) == 0,
            diverges: any(5) == 0,
            ends_at: (any(4) == 0).then(|| 20 + any(780) as u64),
            term_is_taken: any(60) == 0,
            disk_fails: [0, 0, 200, 40][any(4)],
            disk_failover: any(2) == 0,
            big_state: any(24) == 0,
            ambush: (any(5) < 2).then(|| AMBUSHES[any(AMBUSHES.len() as u64)]),
        };
        let from_ns = any(300) as u64 * MS;
        let outage_ns = (any(4) == 0).then(|| (from_ns, from_ns + (1 + any(60) as u64) * MS));
        let witness = WitnessCare { outage_ns, ..options.witness };
        let options = Self { witness, ..options };
        options.steered()
    }

    /// With what leads to the phase of the ambush.
    fn steered(mut self) -> Self {
        if self.ambush == Some(("Joining", Strike::Stop)) {
            (self.big_state, self.believe) = (true, Role::Primary);
        }
        match self.ambush.map(|(phase, _)| phase) {
            Some("AwaitingEvidence" | "AwaitingVerdict") => self.diverges = true,
            Some("Yielding") => self.orders = self.orders.max(2),
            Some("Attaching" | "Joining") if self.believe == Role::Primary => {
                (self.diverges, self.on_divergence) = (true, DivergencePolicy::Resync);
            }
            Some("Attaching" | "Joining") => self.starts_alone = true,
            Some("ClaimingTerm") => {
                (self.diverges, self.on_divergence) = (true, DivergencePolicy::Failover);
            }
            Some("Following" | "Protected") => self.starts_alone = false,
            _ => return self,
        }
        if self.diverges {
            (self.faults, self.ends_at) = (0, None);
        }
        self
    }
}
