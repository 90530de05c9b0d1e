//! Time, and what happens when.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ftvmm_replication::{Claim, PeerCore, ReleasePolicy, Role, SessionEvent, StatePart, Term};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::Random;
use crate::checker::Checker;
use crate::coverage::Coverage;
use crate::host::Host;
use crate::options::{Options, Strike};
use crate::witness::Witness;

/// A microsecond in nanoseconds.
pub const US: u64 = 1_000;
/// A millisecond in nanoseconds.
pub const MS: u64 = 1_000_000;
/// Faults happen before this; then the survivor has until [`END_NS`].
pub const FAULTS_END_NS: u64 = 300 * MS;
const END_NS: u64 = 900 * MS;
/// Silence after which a host is lost, and after which a processor is stuck.
pub const FAILURE_NS: u64 = 50 * MS;
/// The host that is the primary in the beginning.
pub const PRIMARY: usize = 0;
/// The host that is the backup in the beginning.
pub const BACKUP: usize = 1;
const ROLES: [Role; 2] = [Role::Primary, Role::Backup];

/// What a run came to.
pub struct Outcome {
    /// In words.
    pub ending: String,
    /// Digest of everything that happened.
    pub trace_hash: u64,
    /// Where it led.
    pub coverage: Coverage,
}

/// What happens on a host, unless it has been replaced since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OnHost {
    /// The guest's thread goes on, if it may.
    Turn,
    Tick,
    /// The time of [`ftvmm_replication::Effect::LookAtLogIn`] is over.
    LookAtLog,
    /// What was decided is done.
    Perform,
    /// The disk carries out a request.
    Disk,
    /// The thread that sends the guest's state goes on.
    Send,
    /// The watchdog looks at the guest's processor.
    Watch,
    /// It reads what arrived while it stood still.
    Read,
    /// The way to the clients is whole again.
    LinkUp,
    /// The witness has answered.
    Answer {
        term: u64,
        granted: bool,
    },
    /// What waited for this host's phase.
    Strike,
    /// The guest is saved to a file.
    Save,
    /// The witness is given the number.
    Prove {
        number: u64,
        nonce: u128,
    },
    /// The witness is asked for the number.
    LookFor {
        number: u64,
        nonce: u128,
    },
}

/// What happens at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    OnHost {
        host: usize,
        life: u64,
        what: OnHost,
    },
    /// The next bytes on the pipe to this host arrive.
    Arrive {
        host: usize,
        connection: u64,
    },
    Connect,
    /// As `Connect`, once.
    ConnectAgain,
    /// The claim reaches the witness.
    Judge {
        host: usize,
        life: u64,
        term: Term,
        ran: Term,
    },
    Fault,
    /// The operator wants something.
    Order,
    /// A fresh host takes the place of one that is gone.
    Replace(usize),
    /// Both hosts prove their witness.
    ProveAgain,
}

/// See the module documentation.
pub struct World {
    /// Everything that is left to chance.
    pub random: Random,
    /// What the seed has decided.
    pub options: Options,
    verbose: bool,
    /// The time.
    pub now_ns: u64,
    schedule: Schedule,
    /// The hosts.
    pub hosts: [Host; 2],
    /// Number of the connection that stands or is being torn down; 0 before the first.
    pub connections: u64,
    /// The connection delivers nothing any more, and nobody is told.
    pub cut: bool,
    pub witness: Witness,
    pub checker: Checker,
    pub coverage: Coverage,
    pub faults: Faults,
    /// The last snapshot that was taken.
    pub snapshot: Option<Vec<u8>>,
    trace_hash: u64,
}

/// What happens next, in order.
#[derive(Default)]
struct Schedule {
    sequence: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Due)>>,
}

/// What goes wrong on purpose.
pub struct Faults {
    /// Exit from which on the second host's guest loses a bit.
    pub flip_at: Option<u64>,
    /// It has.
    pub flipped: bool,
    /// A host was told something that the other never said.
    pub forged: bool,
    /// A disk failed at what the other's did, which is gone.
    pub bad_disk_alone: bool,
    /// Another guest was started before this one was.
    pub other_guest: bool,
    /// Times the ambush may still strike.
    pub strikes: u64,
}

impl World {
    /// A world before its first event. A guest that starts from a snapshot has it in parts.
    pub fn new(seed: u64, options: Options, snapshot: Vec<StatePart>, verbose: bool) -> Self {
        let mut random = Random::new(seed);
        let hosts = [PRIMARY, BACKUP].map(|index| Host::new(ROLES[index], &options, Term(0)));
        let flip_at = options.diverges.then(|| random.between(1, 300));
        let mut world = Self {
            random,
            verbose,
            now_ns: 0,
            schedule: Schedule::default(),
            hosts,
            connections: 0,
            cut: false,
            witness: Witness::new(options.term_is_taken),
            checker: Checker::default(),
            coverage: Coverage::default(),
            faults: Faults {
                other_guest: false,
                flip_at,
                flipped: false,
                forged: false,
                bad_disk_alone: false,
                strikes: 2,
            },
            snapshot: None,
            trace_hash: 0,
            options,
        };
        let is_alone = world.options.starts_alone || !snapshot.is_empty();
        world.hosts[PRIMARY].state.snapshot = snapshot.into();
        world.see_phase(PRIMARY);
        world.see_phase(BACKUP);
        if is_alone {
            world.step(PRIMARY, SessionEvent::StartAlone);
        }
        world.after(MS, Due::Connect);
        world.after(20 * MS, Due::ProveAgain);
        for _ in 0..world.options.faults {
            let delay_ns = world.random.between(0, FAULTS_END_NS);
            world.after(delay_ns, Due::Fault);
        }
        for _ in 0..world.options.orders {
            let delay_ns = world.random.between(0, FAULTS_END_NS);
            world.after(delay_ns, Due::Order);
        }
        world
    }

    /// Lets something happen later.
    pub fn after(&mut self, delay_ns: u64, due: Due) {
        self.schedule.sequence += 1;
        self.schedule.queue.push(Reverse((self.now_ns + delay_ns, self.schedule.sequence, due)));
    }

    /// Lets something happen later on a host.
    pub fn after_on(&mut self, delay_ns: u64, host: usize, what: OnHost) {
        let life = self.hosts[host].life;
        self.after(delay_ns, Due::OnHost { host, life, what });
    }

    pub fn trace(&mut self, line: &str) {
        self.trace_hash = xxh3_64_with_seed(line.as_bytes(), self.trace_hash ^ self.now_ns);
        if self.verbose {
            println!("{:>12} {line}", self.now_ns);
        }
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        while self.happen() {}
        for host in [PRIMARY, BACKUP] {
            if !self.hosts[host].crashed {
                self.perform_all(host);
            }
        }
        self.judge_disks();
        let ending = self.judge_ending();
        Outcome { ending, trace_hash: self.trace_hash, coverage: self.coverage }
    }

    /// Runs until the guest has been saved to a file.
    pub fn run_to_snapshot(mut self) -> Vec<u8> {
        let delay_ns = self.random.between(20 * MS, 60 * MS);
        self.after_on(delay_ns, PRIMARY, OnHost::Save);
        while self.snapshot.is_none() {
            assert!(self.happen(), "the guest is never saved");
        }
        self.snapshot.take().expect("the guest was saved")
    }

    /// Runs until `to_ns`.
    pub fn run_until(&mut self, to_ns: u64) {
        while self.now_ns < to_ns && self.happen() {}
    }

    /// Runs to the end; from `cut_at_ns` on the hosts do not hear each other.
    pub fn run_apart(mut self, cut_at_ns: u64) -> Self {
        self.run_until(cut_at_ns);
        self.cut = true;
        while self.happen() {}
        self
    }

    /// The terms after the first that the hosts were granted.
    pub fn claimants(&self) -> [Option<u64>; 2] {
        [PRIMARY, BACKUP].map(|host| self.hosts[host].seen.own_term.filter(|term| *term > 1))
    }

    fn happen(&mut self) -> bool {
        match self.schedule.queue.pop() {
            Some(Reverse((at_ns, _, due))) if at_ns < END_NS => {
                self.now_ns = at_ns;
                self.meet(due);
                true
            }
            _ => false,
        }
    }

    fn meet(&mut self, due: Due) {
        if let Due::OnHost { host, life, what } = due {
            let own = &self.hosts[host];
            if own.life != life {
                return;
            }
            if what == OnHost::Turn && self.now_ns < own.held.stuck_until_ns {
                return self.after(own.held.stuck_until_ns - self.now_ns, due);
            }
        }
        if let Due::OnHost { host, .. } | Due::Arrive { host, .. } = due {
            let own = &self.hosts[host];
            if own.crashed {
                return;
            }
            // What arrives reaches the host's kernel.
            let is_own = matches!(due, Due::OnHost { .. });
            if is_own && self.now_ns < own.held.paused_until_ns {
                return self.after(own.held.paused_until_ns - self.now_ns, due);
            }
        }
        match due {
            Due::OnHost { host, what, .. } => self.meet_on(host, what),
            Due::Arrive { host, connection } => self.arrive(host, connection),
            Due::Connect => self.connect(),
            Due::ConnectAgain => self.try_connect(),
            Due::Judge { host, life, term, ran } => self.judge_claim(host, life, term, ran),
            Due::Fault => self.fault(),
            Due::Order => self.order(),
            Due::Replace(host) => self.replace(host),
            Due::ProveAgain => self.prove_again(),
        }
    }

    fn meet_on(&mut self, host: usize, what: OnHost) {
        match what {
            OnHost::Turn => self.turn(host),
            OnHost::Tick => {
                self.hosts[host].held.tick_due_ns = None;
                self.core(host, |core, now_ns| core.tick(now_ns));
            }
            OnHost::LookAtLog => self.core(host, |core, now_ns| core.look_at_log(now_ns)),
            OnHost::Perform => {
                self.hosts[host].pump.performs_late = false;
                self.perform_all(host);
            }
            OnHost::Disk => self.carry_out(host),
            OnHost::Read => self.read(host),
            OnHost::Send => self.send_on(host),
            OnHost::Watch => self.watch(host),
            OnHost::LinkUp => self.step(host, SessionEvent::ClientLink { up: true }),
            OnHost::Answer { term, granted } => {
                self.step(host, SessionEvent::TermClaimed { term: Term(term), granted });
            }
            OnHost::Strike => self.strike(host),
            OnHost::Prove { number, nonce } => self.prove(host, number, nonce),
            OnHost::LookFor { number, nonce } => self.look_for(host, number, nonce),
            OnHost::Save => {
                self.begin_sending(host, None);
                self.after_on(10 * MS, host, OnHost::Save);
            }
        }
    }

    /// Something happened on a host: its core decides what that leads to.
    pub fn core<T>(&mut self, host: usize, call: impl FnOnce(&mut PeerCore, u64) -> T) -> T {
        let result = call(&mut self.hosts[host].core, self.now_ns);
        self.pump(host);
        result
    }

    /// As [`Self::core`], for a host that may be gone.
    pub fn step(&mut self, host: usize, event: SessionEvent) {
        if !self.hosts[host].is_gone() {
            self.core(host, |core, now_ns| core.step(now_ns, event));
        }
    }

    /// Whether the host stands still.
    pub fn is_paused(&self, host: usize) -> bool {
        self.now_ns < self.hosts[host].held.paused_until_ns
    }

    /// The ambush, if the host comes into its phase.
    pub fn see_phase(&mut self, host: usize) {
        let session = self.hosts[host].core.session();
        let (phase, role) = (session.state_name(), session.role());
        if std::mem::replace(&mut self.hosts[host].seen.phase, phase) == phase {
            return;
        }
        self.coverage.phase(role, phase);
        self.trace(&format!("host {host} is {phase}"));
        if self.options.ambush.is_some_and(|(wanted, _)| wanted == phase)
            && self.faults.strikes > 0
            && self.now_ns < FAULTS_END_NS
        {
            self.faults.strikes -= 1;
            let delay_ns = match self.options.ambush {
                Some((_, Strike::FlipAndCut | Strike::Detach | Strike::Stuck | Strike::Pause)) => {
                    self.random.between(10 * MS, 30 * MS)
                }
                _ => self.random.between(0, 2 * MS),
            };
            self.after_on(delay_ns, host, OnHost::Strike);
        }
    }

    fn judge_claim(&mut self, host: usize, life: u64, term: Term, ran: Term) {
        let down_ns = self.witness_is_down_ns();
        let may_claim = self.hosts[host].life != life || self.may_claim(host);
        if down_ns > 0 || !may_claim {
            return self.after(down_ns.max(MS), Due::Judge { host, life, term, ran });
        }
        let begun = self.hosts[host].core.begin().is_some();
        let Some(claim) = self.witness(host).claim(term, ran, (host, life), begun) else {
            self.trace(&format!("host {host} claims term {term}, which the witness cannot judge"));
            return;
        };
        let granted = claim == Claim::Granted;
        self.trace(&format!("host {host} claims term {term}: {granted}"));
        if granted {
            self.checker.on_granted(host, life, term.0);
        }
        let delay_ns = self.random.between(100 * US, self.options.witness.ns_max);
        let what = OnHost::Answer { term: term.0, granted };
        self.after(delay_ns, Due::OnHost { host, life, what });
    }

    /// A flipped bit may show at the client only when outputs are not compared before they leave.
    pub fn is_trusted(&self) -> bool {
        !self.faults.flipped || self.options.release == ReleasePolicy::Compare
    }
}
