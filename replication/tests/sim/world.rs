//! Hosts, network, witness, faults and the order of events.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ftvmm_replication::wire::{self, Decoder};
use ftvmm_replication::witness::judge;
use ftvmm_replication::{
    Action, Claim, DisconnectReason, DivergencePolicy, GroupEncoder, LinkPolicy, ReleasePolicy,
    ReplayCursor, Role, SessionEvent, StatePart, StopReason, Term, WitnessEntry, decode_group,
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::Random;
use crate::checker::{Checker, Right};
use crate::guest::Guest;
use crate::host::{Host, Parcel};

/// A microsecond in nanoseconds.
pub const US: u64 = 1_000;
/// A millisecond in nanoseconds.
pub const MS: u64 = 1_000_000;
/// Faults happen before this; then the survivor has until [`END_NS`].
const FAULTS_END_NS: u64 = 300 * MS;
const END_NS: u64 = 900 * MS;
/// Silence after which a host is lost, and after which a processor is stuck.
pub const FAILURE_NS: u64 = 50 * MS;
const PRIMARY: usize = 0;
/// The host that is the backup in the beginning.
pub const BACKUP: usize = 1;
const ROLES: [Role; 2] = [Role::Primary, Role::Backup];

/// What a seed decides beforehand.
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
    /// Whether a host that is gone is replaced by a fresh one.
    pub replaces: bool,
    /// Whether the guest starts without a backup.
    pub starts_alone: bool,
    /// Whether a bit of the second host's memory flips.
    pub diverges: bool,
    /// Exit at which the guest powers off.
    pub ends_at: Option<u64>,
}

impl Options {
    /// The options of a seed.
    pub fn from_seed(seed: u64) -> Self {
        let mut random = Random::new(!seed);
        let mut any = |number: u64| random.between(0, number) as usize;
        let policies =
            [DivergencePolicy::Failover, DivergencePolicy::Halt, DivergencePolicy::Resync];
        Self {
            release: [ReleasePolicy::Compare, ReleasePolicy::Ack][any(2)],
            on_divergence: policies[any(3)],
            believe: ROLES[any(2)],
            faults: any(4) as u64,
            orders: [0, 0, 1, 2, 4][any(5)],
            replaces: any(2) == 0,
            starts_alone: any(4) == 0,
            diverges: any(5) == 0,
            ends_at: (any(4) == 0).then(|| 20 + any(780) as u64),
            on_link_down: [LinkPolicy::Switch, LinkPolicy::Ignore][any(3) / 2],
        }
    }
}

/// What a run came to.
pub struct Outcome {
    /// In words.
    pub ending: String,
    /// Digest of everything that happened.
    pub trace_hash: u64,
}

/// What happens at some time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// The guest goes on, if it may.
    Turn {
        /// Where.
        host: usize,
        /// Not on its successor.
        life: u64,
    },
    Tick {
        host: usize,
        life: u64,
    },
    /// The next bytes on the pipe to this host arrive.
    Arrive {
        host: usize,
        connection: u64,
    },
    Connect,
    /// The claim reaches the witness.
    Judge {
        host: usize,
        life: u64,
        term: u64,
    },
    Answer {
        host: usize,
        life: u64,
        term: u64,
        granted: bool,
    },
    Fault,
    /// The watchdog of a host looks at the guest's processor.
    Watch {
        host: usize,
        life: u64,
    },
    /// A host's way to the clients is whole again.
    LinkUp {
        host: usize,
        life: u64,
    },
    /// The operator wants something.
    Order,
    /// A fresh host takes the place of one that is gone.
    Replace(usize),
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
    sequence: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Due)>>,
    /// The hosts.
    pub hosts: [Host; 2],
    /// Number of the connection that stands or is being torn down; 0 before the first.
    connections: u64,
    /// The connection delivers nothing any more, and nobody is told.
    cut: bool,
    witness: Option<WitnessEntry>,
    checker: Checker,
    /// Exit at which the second host's guest loses a bit.
    pub flip_at: Option<u64>,
    /// It has.
    pub flipped: bool,
    trace_hash: u64,
}

impl World {
    /// A world before its first event.
    pub fn new(seed: u64, options: Options, verbose: bool) -> Self {
        let mut random = Random::new(seed);
        let hosts = [PRIMARY, BACKUP].map(|index| Host::new(ROLES[index], &options, Term(0)));
        let flip_at = options.diverges.then(|| random.between(1, 300));
        let mut world = Self {
            random,
            options,
            verbose,
            now_ns: 0,
            sequence: 0,
            queue: BinaryHeap::new(),
            hosts,
            connections: 0,
            cut: false,
            witness: None,
            checker: Checker::default(),
            flip_at,
            flipped: false,
            trace_hash: 0,
        };
        if world.options.starts_alone {
            world.step(PRIMARY, SessionEvent::StartAlone);
        }
        world.after(MS, Due::Connect);
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
        self.sequence += 1;
        self.queue.push(Reverse((self.now_ns + delay_ns, self.sequence, due)));
    }

    fn trace(&mut self, line: &str) {
        self.trace_hash = xxh3_64_with_seed(line.as_bytes(), self.trace_hash ^ self.now_ns);
        if self.verbose {
            println!("{:>12} {line}", self.now_ns);
        }
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        while let Some(Reverse((at_ns, _, due))) = self.queue.pop()
            && at_ns < END_NS
        {
            self.now_ns = at_ns;
            self.perform(due);
        }
        let ending = self.judge_ending();
        Outcome { ending, trace_hash: self.trace_hash }
    }

    fn perform(&mut self, due: Due) {
        if let Due::Turn { host, life }
        | Due::Tick { host, life }
        | Due::Watch { host, life }
        | Due::LinkUp { host, life }
        | Due::Answer { host, life, .. } = due
            && self.hosts[host].life != life
        {
            return;
        }
        if let Due::Turn { host, .. } = due
            && self.now_ns < self.hosts[host].stuck_until_ns
        {
            return self.after(self.hosts[host].stuck_until_ns - self.now_ns, due);
        }
        if let Due::Turn { host, .. }
        | Due::Tick { host, .. }
        | Due::Watch { host, .. }
        | Due::LinkUp { host, .. }
        | Due::Arrive { host, .. }
        | Due::Answer { host, .. } = due
        {
            if self.hosts[host].crashed {
                return;
            }
            let paused_until_ns = self.hosts[host].paused_until_ns;
            if self.now_ns < paused_until_ns {
                return self.after(paused_until_ns - self.now_ns, due);
            }
        }
        match due {
            Due::Turn { host, .. } => self.turn(host),
            Due::Tick { host, .. } => {
                self.hosts[host].tick_due_ns = None;
                self.step(host, SessionEvent::Tick);
            }
            Due::Arrive { host, connection } => self.arrive(host, connection),
            Due::Connect => self.connect(),
            Due::Judge { host, life, term } => self.judge_claim(host, life, term),
            Due::Answer { host, term, granted, .. } => {
                self.step(host, SessionEvent::TermClaimed { term: Term(term), granted });
            }
            Due::Fault => self.fault(),
            Due::Watch { host, .. } => self.watch(host),
            Due::LinkUp { host, .. } => self.step(host, SessionEvent::ClientLink { up: true }),
            Due::Order => self.order(),
            Due::Replace(host) => self.replace(host),
        }
    }

    // Network.

    fn connect(&mut self) {
        let retry_ns = self.random.between(5 * MS, 20 * MS);
        self.after(retry_ns, Due::Connect);
        let idle = |host: &Host| {
            let runs_here = host.begun && host.session.role() == Role::Primary;
            let has_time = !runs_here || host.session.takes_newcomers();
            host.connection == 0 && !host.is_gone() && has_time
        };
        let paused = self.hosts.iter().any(|host| self.now_ns < host.paused_until_ns);
        if paused || !self.hosts.iter().all(idle) {
            return;
        }
        self.connections += 1;
        self.cut = false;
        for host in &mut self.hosts {
            host.connection = self.connections;
            host.decoder = Decoder::new();
            host.decoder.push(&wire::PREAMBLE);
            host.pipe.clear();
        }
        self.trace("connect");
        self.step(PRIMARY, SessionEvent::Connected);
        self.step(BACKUP, SessionEvent::Connected);
    }

    fn post(&mut self, from: usize, parcel: Parcel) {
        let (to, connection) = (1 - from, self.hosts[from].connection);
        // A connection is only dead for one side until the other hears of it.
        if self.cut || connection == 0 || connection != self.hosts[to].connection {
            return;
        }
        self.hosts[to].pipe.push_back(parcel);
        let delay_ns = match self.random.one_in(20) {
            true => self.random.between(2 * MS, 20 * MS),
            false => self.random.between(20 * US, 2 * MS),
        };
        self.after(delay_ns, Due::Arrive { host: to, connection });
    }

    fn arrive(&mut self, host: usize, connection: u64) {
        if self.hosts[host].connection != connection || self.cut {
            return;
        }
        match self.hosts[host].pipe.pop_front() {
            Some(Parcel::Bytes(bytes)) => {
                self.hosts[host].decoder.push(&bytes);
                while let Some(message) =
                    self.hosts[host].decoder.next_message().expect("the wire is sound")
                {
                    self.step(host, SessionEvent::Received(message));
                }
            }
            Some(Parcel::Closed) => self.disconnect(host),
            None => {}
        }
    }

    fn disconnect(&mut self, host: usize) {
        if self.hosts[host].connection != 0 {
            self.hosts[host].connection = 0;
            let reason = DisconnectReason::Closed;
            self.step(host, SessionEvent::Disconnected { reason });
        }
    }

    // Faults.

    fn fault(&mut self) {
        let victim = self.random.between(0, 2) as usize;
        let kind = self.random.between(0, 9);
        self.trace(&format!("fault {kind} at host {victim}"));
        match kind {
            // A crash; what was sent may still arrive, and the peer's kernel may tell it or not.
            0 | 1 => {
                if self.random.one_in(2) {
                    self.post(victim, Parcel::Closed);
                } else if self.random.one_in(2) {
                    self.cut = true;
                }
                self.hosts[victim].crashed = true;
                self.plan_replacement(victim);
            }
            // The connection breaks and both are told at once.
            2 => {
                self.cut = true;
                self.disconnect(victim);
                self.disconnect(1 - victim);
            }
            // The connection breaks; one side is told, the other finds out.
            3 => {
                self.cut = true;
                self.disconnect(victim);
            }
            // The connection breaks in silence.
            4 => self.cut = true,
            // The guest's processor does not come back for a while; the rest of the host is well.
            5 | 6 => {
                let stuck_ns = self.random.between(MS, 250 * MS);
                self.hosts[victim].stuck_until_ns = self.now_ns + stuck_ns;
                let life = self.hosts[victim].life;
                self.after(FAILURE_NS, Due::Watch { host: victim, life });
            }
            // Clients do not reach the host for a while.
            7 => {
                let life = self.hosts[victim].life;
                self.step(victim, SessionEvent::ClientLink { up: false });
                let down_ns = self.random.between(MS, 300 * MS);
                self.after(down_ns, Due::LinkUp { host: victim, life });
            }
            _ => {
                let pause_ns = self.random.between(MS, 150 * MS);
                self.hosts[victim].paused_until_ns = self.now_ns + pause_ns;
            }
        }
    }

    /// A guest that waits for the other host is not stuck, wherever its thread is.
    fn watch(&mut self, host: usize) {
        let own = &self.hosts[host];
        if self.now_ns < own.stuck_until_ns && own.begun && !own.session.is_yielding() {
            self.step(host, SessionEvent::VcpuStuck { unseen_ns: FAILURE_NS });
        }
    }

    // The operator.

    fn order(&mut self) {
        let switches = !self.random.one_in(3);
        let host = self.random.between(0, 2) as usize;
        self.trace(&format!(
            "order: host {host} {}",
            if switches { "switches" } else { "detaches" }
        ));
        match switches {
            true => self.hosts[host].switch_wanted = true,
            false => self.step(host, SessionEvent::Detach),
        }
    }

    fn plan_replacement(&mut self, host: usize) {
        if self.options.replaces && self.now_ns < FAULTS_END_NS {
            let delay_ns = self.random.between(5 * MS, 60 * MS);
            self.after(delay_ns, Due::Replace(host));
        }
    }

    fn replace(&mut self, host: usize) {
        let other = &self.hosts[1 - host];
        if !self.hosts[host].is_gone() || other.is_gone() || !other.begun {
            return self.plan_replacement(host);
        }
        self.trace(&format!("host {host} is replaced"));
        let term = self.witness.as_ref().map_or(Term(0), |entry| entry.term);
        self.hosts[host].replaced(&self.options, term);
        self.checker.on_silent(host);
    }

    // Witness.

    fn judge_claim(&mut self, host: usize, life: u64, term: u64) {
        let holder = format!("host-{host}-{life}");
        let claim = judge(self.witness.as_ref(), Term(term), &holder);
        let granted = claim == Claim::Granted;
        self.trace(&format!("host {host} claims term {term}: {granted}"));
        if granted {
            self.witness = Some(WitnessEntry { term: Term(term), holder });
            self.checker.on_granted(host, life, term);
        }
        let delay_ns = self.random.between(100 * US, 30 * MS);
        self.after(delay_ns, Due::Answer { host, life, term, granted });
    }

    // Sessions.

    /// Tells a host's session, and does what it decides.
    pub fn step(&mut self, host: usize, event: SessionEvent) {
        if self.hosts[host].stopped.is_some() || self.hosts[host].crashed {
            return;
        }
        let mut actions = Vec::new();
        self.hosts[host].session.step(self.now_ns, event, &mut actions);
        actions.into_iter().for_each(|action| self.act(host, action));
        if let Some(deadline_ns) = self.hosts[host].session.next_deadline_ns()
            && self.hosts[host].tick_due_ns.is_none_or(|due_ns| deadline_ns < due_ns)
        {
            self.hosts[host].tick_due_ns = Some(deadline_ns);
            let late_ns = self.random.between(0, 300 * US);
            let life = self.hosts[host].life;
            let delay_ns = deadline_ns.saturating_sub(self.now_ns) + late_ns;
            self.after(delay_ns, Due::Tick { host, life });
        }
    }

    fn act(&mut self, host: usize, action: Action) {
        let state = self.hosts[host].session.state_name();
        self.trace(&format!("host {host} {state}: {action:?}"));
        match action {
            Action::Send(message) => {
                let mut bytes = Vec::new();
                wire::encode(&message, &mut bytes);
                let second = bytes.split_off(self.random.number() as usize % bytes.len());
                self.post(host, Parcel::Bytes(bytes));
                self.post(host, Parcel::Bytes(second));
            }
            Action::Transmit(frame) => self.transmit(host, &frame),
            Action::ClaimTerm(Term(term)) => {
                let delay_ns = self.random.between(100 * US, 30 * MS);
                let life = self.hosts[host].life;
                self.after(delay_ns, Due::Judge { host, life, term });
            }
            Action::Begin { rtc_epoch_s, .. } => {
                assert!(!self.hosts[host].begun, "a guest begins once");
                self.hosts[host].guest = Guest::new(rtc_epoch_s);
                self.begin(host);
            }
            Action::DeliverGroup(bytes) => {
                let group = decode_group(&bytes).expect("the group is sound");
                let received = &mut self.hosts[host].received_through;
                *received = group.horizon.0.max(*received);
                let cursor = self.hosts[host].cursor.as_mut().expect("a backup has a cursor");
                cursor.push_group(group).expect("the log continues");
            }
            Action::GoLive { term } | Action::GoAlone { term } => self.speak(host, term),
            Action::Incident(_) => assert!(self.flipped, "a divergence out of nothing"),
            Action::TellFlushes { .. } | Action::TellDisk { .. } => {
                unreachable!("this guest has no disk")
            }
            Action::Congested(congested) => self.hosts[host].congested = congested,
            Action::HangUp => self.close(host),
            Action::ShipState => {
                self.hosts[host].shipping = Some(self.random.between(0, 20));
            }
            Action::Protect { .. } => {
                self.hosts[host].own_term = None;
                self.hosts[host].encoder = GroupEncoder::new();
            }
            Action::Join { .. } => self.join(host),
            Action::TakeState(part) => self.take_part(host, &part),
            Action::Follow { through, .. } => {
                self.fall_silent(host, ReplayCursor::starting_at(through));
                self.hosts[host].received_through = through.0;
                self.hosts[host].strays = self.random.between(0, 4);
            }
            Action::Receive(frames) => self.hosts[host].received.extend(frames),
            Action::SwitchRoles => self.hosts[host].switch_wanted = true,
            Action::Decided { .. } | Action::StateTaken { .. } => {}
            Action::Stop(reason) => {
                self.close(host);
                if reason != StopReason::Clean {
                    self.plan_replacement(host);
                }
                self.hosts[host].stopped = Some(reason);
            }
        }
    }

    fn begin(&mut self, host: usize) {
        if !std::mem::replace(&mut self.hosts[host].begun, true) {
            let life = self.hosts[host].life;
            self.after(0, Due::Turn { host, life });
        }
    }

    fn speak(&mut self, host: usize, Term(term): Term) {
        self.checker.on_speaks(host, self.hosts[host].life, term);
        let own = &mut self.hosts[host];
        own.own_term = Some(term);
        if std::mem::take(&mut own.faulted) {
            own.cursor = Some(ReplayCursor::new());
        }
        if let Some(cursor) = &mut own.cursor {
            cursor.seal();
        }
    }

    fn fall_silent(&mut self, host: usize, cursor: ReplayCursor) {
        self.checker.on_silent(host);
        let own = &mut self.hosts[host];
        (own.own_term, own.cursor, own.congested) = (None, Some(cursor), false);
        own.shipping = None;
    }

    fn join(&mut self, host: usize) {
        self.fall_silent(host, ReplayCursor::new());
        let own = &mut self.hosts[host];
        (own.joining, own.taken_bytes) = (true, 0);
        (own.ended, own.faulted) = (false, false);
        self.begin(host);
    }

    fn take_part(&mut self, host: usize, part: &StatePart) {
        let own = &mut self.hosts[host];
        own.taken_bytes += part.len_bytes();
        own.untold = true;
        if let StatePart::Machine(machine) = part {
            own.guest = Guest::restore(machine);
            own.received_through = own.guest.at;
            own.joining = false;
        }
    }

    fn close(&mut self, host: usize) {
        self.post(host, Parcel::Closed);
        self.hosts[host].connection = 0;
    }

    fn transmit(&mut self, host: usize, frame: &[u8]) {
        let right = match self.hosts[host].own_term {
            Some(term) => Right::Own { term },
            None => {
                assert_eq!(
                    self.hosts[host].session.role(),
                    Role::Primary,
                    "a backup speaks without a term"
                );
                Right::Gated { backup_received: self.hosts[1 - host].received_through }
            }
        };
        let trusted = self.trusted();
        let [primary, backup] = &self.hosts;
        let guests = [&primary.guest, &backup.guest];
        self.checker.on_frame(host, frame, &right, self.options.release, guests, trusted);
        if self.now_ns > FAULTS_END_NS + 200 * MS {
            self.hosts[host].frames_after_faults += 1;
        }
    }

    /// A flipped bit may show at the client only when outputs are not compared before they leave.
    fn trusted(&self) -> bool {
        !self.flipped || self.options.release == ReleasePolicy::Compare
    }

    // The end.

    fn judge_ending(&self) -> String {
        let trusted = self.trusted();
        let clean = |host: &&Host| host.stopped == Some(StopReason::Clean);
        let ended = self.hosts.iter().filter(clean);
        ended.clone().for_each(|host| self.checker.on_survivor(&host.guest, trusted));
        match ended.count() {
            0 => {}
            1 => return "ended on one".into(),
            _ => return "ended on both".into(),
        }
        let holder = self.checker.holder().map(|(host, life)| (&self.hosts[host], life));
        let [first, second] = &self.hosts;
        let begun = |(host, life): &(&Host, u64)| host.begun || host.life != *life;
        let Some((host, life)) = holder.filter(begun) else {
            assert!(first.crashed || second.crashed, "a healthy pair never met");
            return "nobody: a host crashed before the guest began".into();
        };
        if self.hosts.iter().any(|host| host.stopped == Some(StopReason::Divergence))
            && host.is_gone()
        {
            assert!(self.flipped);
            return format!("divergence under {:?}", self.options.on_divergence);
        }
        if host.life != life || host.is_gone() {
            let crashed = host.life != life || host.crashed;
            assert!(crashed, "the holder stopped: {:?}", host.stopped);
            return "nobody: the holder of the last term crashed".into();
        }
        // Whoever holds the last term goes on, with whoever is there.
        assert!(host.frames_after_faults > 0, "the survivor stands still");
        let other = if core::ptr::eq(host, first) { second } else { first };
        if !other.is_gone() {
            let states = [host, other].map(|host| host.session.state_name());
            assert_eq!(states, ["Protected", "Following"]);
            return if first.life + second.life > 0 { "new pair" } else { "pair" }.into();
        }
        self.checker.on_survivor(&host.guest, trusted);
        let name = if core::ptr::eq(host, second) { "backup live" } else { "primary alone" };
        name.into()
    }
}
