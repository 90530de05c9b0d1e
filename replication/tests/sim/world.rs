//! Hosts, network, witness, faults and the order of events.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use ftvmm_devices::Input;
use ftvmm_replication::wire::{self, Decoder};
use ftvmm_replication::witness::judge;
use ftvmm_replication::{
    Action, Check, Claim, CursorStep, DisconnectReason, DivergencePolicy, End, EndReason, Event,
    Fingerprint, GroupEncoder, Limits, Ordinal, OutputDigest, PROTOCOL_VERSION, Record,
    ReleasePolicy, ReplayCursor, Role, Session, SessionConfig, SessionEvent, StopReason, Term,
    TscMode, WitnessEntry, decode_group,
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::Random;
use crate::checker::{Checker, Right};
use crate::guest::Guest;

const US: u64 = 1_000;
const MS: u64 = 1_000_000;
/// Faults happen before this; then the survivor has until [`END_NS`].
const FAULTS_END_NS: u64 = 300 * MS;
const END_NS: u64 = 900 * MS;
const PRIMARY: usize = 0;
const BACKUP: usize = 1;
const ROLES: [Role; 2] = [Role::Primary, Role::Backup];

/// What a seed decides beforehand.
pub struct Options {
    /// When outputs are released.
    pub release: ReleasePolicy,
    /// What a divergence leads to.
    pub on_divergence: DivergencePolicy,
    /// How many faults are tried.
    pub faults: u64,
    /// Whether a bit of the backup's memory flips.
    pub diverges: bool,
    /// Exit at which the guest powers off.
    pub ends_at: Option<u64>,
}

impl Options {
    /// The options of a seed.
    pub fn from_seed(seed: u64) -> Self {
        let mut random = Random::new(!seed);
        Self {
            release: [ReleasePolicy::Compare, ReleasePolicy::Ack][random.between(0, 2) as usize],
            on_divergence: [DivergencePolicy::Failover, DivergencePolicy::Halt]
                [random.between(0, 2) as usize],
            faults: random.between(0, 4),
            diverges: random.one_in(5),
            ends_at: random.one_in(4).then(|| random.between(20, 800)),
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

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// The guest goes on, if it may.
    Turn(usize),
    Tick(usize),
    /// The next bytes on the pipe to this host arrive.
    Arrive {
        host: usize,
        connection: u64,
    },
    Connect,
    /// The claim reaches the witness.
    Judge {
        host: usize,
        term: u64,
    },
    Answer {
        host: usize,
        term: u64,
        granted: bool,
    },
    Fault,
}

enum Parcel {
    Bytes(Vec<u8>),
    Closed,
}

struct Host {
    session: Session,
    connection: u64,
    decoder: Decoder,
    /// On their way to this host, in order.
    pipe: VecDeque<Parcel>,
    guest: Guest,
    encoder: GroupEncoder,
    /// `Some` while the guest follows a log.
    cursor: Option<ReplayCursor>,
    begun: bool,
    ended: bool,
    congested: bool,
    crashed: bool,
    paused_until_ns: u64,
    /// Deadline of the tick under way.
    tick_due_ns: Option<u64>,
    received_through: u64,
    /// The term won by this host alone.
    own_term: Option<u64>,
    stopped: Option<StopReason>,
    frames_after_faults: u64,
}

/// See the module documentation.
pub struct World {
    random: Random,
    options: Options,
    verbose: bool,
    now_ns: u64,
    sequence: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Due)>>,
    hosts: [Host; 2],
    /// Number of the connection that stands or is being torn down; 0 before the first.
    connections: u64,
    /// The connection delivers nothing any more, and nobody is told.
    cut: bool,
    witness: Option<WitnessEntry>,
    checker: Checker,
    flip_at: Option<u64>,
    flipped: bool,
    trace_hash: u64,
}

impl World {
    /// A world before its first event.
    pub fn new(seed: u64, options: Options, verbose: bool) -> Self {
        let mut random = Random::new(seed);
        let hosts = [PRIMARY, BACKUP].map(|index| Host::new(ROLES[index], &options));
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
        world.after(MS, Due::Connect);
        for _ in 0..world.options.faults {
            let delay_ns = world.random.between(0, FAULTS_END_NS);
            world.after(delay_ns, Due::Fault);
        }
        world
    }

    fn after(&mut self, delay_ns: u64, due: Due) {
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
        if let Due::Turn(host)
        | Due::Tick(host)
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
            Due::Turn(host) => self.turn(host),
            Due::Tick(host) => {
                self.hosts[host].tick_due_ns = None;
                self.step(host, SessionEvent::Tick);
            }
            Due::Arrive { host, connection } => self.arrive(host, connection),
            Due::Connect => self.connect(),
            Due::Judge { host, term } => self.judge_claim(host, term),
            Due::Answer { host, term, granted } => {
                self.step(host, SessionEvent::TermClaimed { term: Term(term), granted });
            }
            Due::Fault => self.fault(),
        }
    }

    // Network.

    fn connect(&mut self) {
        let retry_ns = self.random.between(5 * MS, 20 * MS);
        self.after(retry_ns, Due::Connect);
        let idle = |host: &Host| host.connection == 0 && !host.crashed && host.stopped.is_none();
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
        let kind = self.random.between(0, 6);
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
            _ => {
                let pause_ns = self.random.between(MS, 150 * MS);
                self.hosts[victim].paused_until_ns = self.now_ns + pause_ns;
            }
        }
    }

    // Witness.

    fn judge_claim(&mut self, host: usize, term: u64) {
        let holder = format!("host-{host}");
        let claim = judge(self.witness.as_ref(), Term(term), &holder);
        let granted = claim == Claim::Granted;
        self.trace(&format!("host {host} claims term {term}: {granted}"));
        if granted {
            self.witness = Some(WitnessEntry { term: Term(term), holder });
            self.checker.on_granted(host, term);
        }
        let delay_ns = self.random.between(100 * US, 30 * MS);
        self.after(delay_ns, Due::Answer { host, term, granted });
    }

    // Sessions.

    fn step(&mut self, host: usize, event: SessionEvent) {
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
            self.after(deadline_ns.saturating_sub(self.now_ns) + late_ns, Due::Tick(host));
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
                self.after(delay_ns, Due::Judge { host, term });
            }
            Action::Begin { rtc_epoch_s, .. } => {
                assert!(!self.hosts[host].begun, "a guest begins once");
                self.hosts[host].begun = true;
                self.hosts[host].guest = Guest::new(rtc_epoch_s);
                self.after(0, Due::Turn(host));
            }
            Action::DeliverGroup(bytes) => {
                let group = decode_group(&bytes).expect("the group is sound");
                self.hosts[host].received_through = group.horizon.0;
                let cursor = self.hosts[host].cursor.as_mut().expect("a backup has a cursor");
                cursor.push_group(group).expect("the log continues");
            }
            Action::GoLive { term: Term(term) } | Action::GoAlone { term: Term(term) } => {
                self.checker.on_speaks(host, term);
                self.hosts[host].own_term = Some(term);
                if let Some(cursor) = &mut self.hosts[host].cursor {
                    cursor.seal();
                }
            }
            Action::Incident(_) => assert!(self.flipped, "a divergence out of nothing"),
            Action::TellFlushes { .. } | Action::TellDisk { .. } => {
                unreachable!("this guest has no disk")
            }
            Action::Congested(congested) => self.hosts[host].congested = congested,
            Action::HangUp => self.close(host),
            Action::Decided { .. } => {}
            Action::ShipState
            | Action::StateTaken { .. }
            | Action::Protect { .. }
            | Action::Join { .. }
            | Action::TakeState(_)
            | Action::Follow { .. }
            | Action::Receive(_) => panic!("nobody joins or switches roles here"),
            Action::Stop(reason) => {
                self.close(host);
                self.hosts[host].stopped = Some(reason);
            }
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
                assert_eq!(host, PRIMARY, "a backup speaks without a term");
                Right::Gated { backup_received: self.hosts[BACKUP].received_through }
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

    // Guests: what the run loop of a host does.

    fn turn(&mut self, host: usize) {
        let delay_ns = self.random.between(20 * US, MS);
        if self.hosts[host].stopped.is_some() || self.hosts[host].ended {
            return;
        }
        self.after(delay_ns, Due::Turn(host));
        if self.hosts[host].cursor.is_some() {
            self.replay(host);
        } else if self.hosts[host].congested {
            self.flush(host);
        } else {
            self.record(host);
        }
    }

    fn record(&mut self, host: usize) {
        let (now_ns, at) = (self.now_ns, self.hosts[host].guest.at);
        for _ in 0..self.random.between(0, 3) {
            let input = match self.random.one_in(3) {
                true => Input::NetRx { frame: self.random.number().to_le_bytes().to_vec() },
                false => Input::Time { now_ns },
            };
            self.log(host, at, Event::Input(input.clone()));
            self.hosts[host].guest.apply(&input);
        }
        if self.options.ends_at == Some(at) {
            let state_digest = self.hosts[host].guest.digest();
            self.log(host, at, Event::End(End { state_digest, reason: EndReason::PowerOff }));
            self.finish_group(host, at);
            return self.end(host);
        }
        if self.random.one_in(10) {
            let chain = self.hosts[host].guest.state;
            let check = Check { chain, ..Check::default() };
            self.log(host, at, Event::Check(Box::new(check)));
        }
        if self.random.one_in(10) {
            self.flush(host);
        }
        self.run_guest(host);
        if self.random.one_in(2) {
            self.flush(host);
        }
    }

    fn log(&mut self, host: usize, at: u64, event: Event) {
        self.hosts[host].encoder.push(&Record { at: Ordinal(at), event });
    }

    /// Closes the group while the guest stands at its exit.
    fn flush(&mut self, host: usize) {
        let horizon = self.hosts[host].guest.at.saturating_sub(1);
        self.finish_group(host, horizon);
    }

    fn finish_group(&mut self, host: usize, horizon: u64) {
        let bytes = self.hosts[host].encoder.finish(Ordinal(horizon));
        self.step(host, SessionEvent::Group { bytes });
    }

    fn run_guest(&mut self, host: usize) {
        let guest = &mut self.hosts[host].guest;
        let left = guest.at;
        let transmitted = guest.run();
        if host == BACKUP && self.flip_at == Some(guest.at) && !self.flipped {
            self.flipped = true;
            guest.state ^= 1;
        }
        let (at, chain) = (Ordinal(guest.at), guest.state);
        let frame = guest.sent.last().filter(|_| transmitted).map(|sent| sent.frame.clone());
        self.step(host, SessionEvent::Executed(Ordinal(left)));
        if let Some(frame) = frame {
            let digest = OutputDigest::of(at, chain, &frame);
            self.step(host, SessionEvent::Output { at, digest, frame });
        }
    }

    fn replay(&mut self, host: usize) {
        let Host { cursor, guest, .. } = &mut self.hosts[host];
        let at = guest.at;
        let Some(cursor) = cursor else { return };
        match cursor.next(Ordinal(at)) {
            CursorStep::Apply(input) => guest.apply(&input),
            CursorStep::Check(check) if check.chain == guest.state => {}
            CursorStep::End(End { state_digest, .. }) if state_digest == guest.digest() => {
                self.end(host);
            }
            CursorStep::Proceed if self.options.ends_at != Some(at) => self.run_guest(host),
            CursorStep::Wait => {}
            CursorStep::Exhausted => {
                self.hosts[host].cursor = None;
                self.hosts[host].encoder = GroupEncoder::new();
            }
            other => {
                let description = format!("{other:?} at exit {at}");
                self.hosts[host].ended = true;
                self.step(host, SessionEvent::ReplayFault { description });
            }
        }
    }

    fn end(&mut self, host: usize) {
        self.hosts[host].ended = true;
        let state_digest = self.hosts[host].guest.digest();
        self.step(host, SessionEvent::GuestEnded { state_digest });
    }

    // The end.

    fn judge_ending(&self) -> String {
        let trusted = self.trusted();
        let gone = |host: &Host| host.crashed || host.stopped.is_some();
        let [primary, backup] = &self.hosts;
        if self.hosts.iter().all(|host| host.stopped == Some(StopReason::Clean)) {
            self.checker.on_survivor(&primary.guest, trusted);
            return "ended on both".into();
        }
        for host in &self.hosts {
            if host.stopped == Some(StopReason::Clean) {
                self.checker.on_survivor(&host.guest, trusted);
                return "ended on one".into();
            }
        }
        if self.hosts.iter().any(|host| host.stopped == Some(StopReason::Divergence))
            && gone(primary)
        {
            assert!(self.flipped);
            return format!("divergence under {:?}", self.options.on_divergence);
        }
        if primary.session.state_name() == "Protected" && !gone(primary) && !gone(backup) {
            assert!(primary.frames_after_faults > 0, "the pair stands still");
            return "pair".into();
        }
        // Whoever holds the last term goes on, unless it crashed.
        let holder = self.checker.holder().map(|holder| &self.hosts[holder]);
        match holder.filter(|host| host.begun) {
            Some(host) if !host.crashed && host.stopped.is_none() => {
                assert!(host.frames_after_faults > 0, "the survivor stands still");
                self.checker.on_survivor(&host.guest, trusted);
                let name = if host.own_term.is_some() && core::ptr::eq(host, backup) {
                    "backup live"
                } else {
                    "primary alone"
                };
                name.into()
            }
            Some(host) => {
                assert!(host.crashed, "the holder stopped: {:?}", host.stopped);
                "nobody: the holder of the last term crashed".into()
            }
            None => {
                assert!(primary.crashed || backup.crashed, "a healthy pair never met");
                "nobody: a host crashed before the guest began".into()
            }
        }
    }
}

impl Host {
    fn new(role: Role, options: &Options) -> Self {
        let fingerprint = Fingerprint {
            protocol_version: PROTOCOL_VERSION,
            kernel_sha256: [1; 32],
            initramfs_sha256: None,
            disk_bytes: None,
            disk_sha256: None,
            cmdline: "console=ttyS0".into(),
            cpu_template: "sim".into(),
            cpu_template_sha256: [2; 32],
            tsc: TscMode::Trap,
            memory_mib: 1,
            net_mac: None,
        };
        let config = SessionConfig {
            release: options.release,
            on_divergence: options.on_divergence,
            heartbeat_ns: 5 * MS,
            failure_ns: 50 * MS,
            handshake_ns: 100 * MS,
            evidence_ns: 40 * MS,
            limits: Limits {
                log_bytes_max: 2000,
                gated_frames_max: 12,
                gated_bytes_max: 4000,
                ..Limits::default()
            },
            ..SessionConfig::new(role, fingerprint, Term(0), 1_700_000_000)
        };
        Self {
            session: Session::new(config).expect("the configuration works"),
            connection: 0,
            decoder: Decoder::new(),
            pipe: VecDeque::new(),
            guest: Guest::new(0),
            encoder: GroupEncoder::new(),
            cursor: (role == Role::Backup).then(ReplayCursor::new),
            begun: false,
            ended: false,
            congested: false,
            crashed: false,
            paused_until_ns: 0,
            tick_due_ns: None,
            received_through: 0,
            own_term: None,
            stopped: None,
            frames_after_faults: 0,
        }
    }
}
