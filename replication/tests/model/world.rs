//! The small world: its state, what may happen next, and what follows.

use std::collections::VecDeque;

use ftvmm_replication::witness::claim::{Claim, claim};
use ftvmm_replication::witness::{Doing, Entry, GuestId, Holder};
use ftvmm_replication::{
    DisconnectReason, Event, GroupEncoder, Message, Ordinal, Record, Role, SessionEvent, Term,
};

use crate::check::Checker;
use crate::host::{FAILURE_NS, Host, MS, Mode};
use crate::store::Store;

/// How much may happen. What is not named here may happen any number of times.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Outputs of the guest.
    pub outputs: u8,
    /// Crashes, cuts, lost answers.
    pub faults: u8,
    /// Long times in which one of the hosts stands still.
    pub pauses: u8,
    /// Short times: up to the next deadline of either host.
    pub beats: u8,
    /// The operator's orders.
    pub orders: u8,
}

/// What the operator, or a supervisor, may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Switch,
    Detach,
    /// A host that is gone is started again as it was started first.
    OldCommand,
    /// A host that is gone, or was never there, starts the guest without a backup.
    StartAlone,
    /// The same, and the witness is told that the operator knows better.
    StartAnyway,
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Connect,
    Deliver(usize),
    /// A live guest makes an exit.
    Run(usize),
    /// A guest executes an exit of the log, or is through with it.
    Follow(usize),
    Disk(usize),
    /// The guest's state is sent.
    SendState(usize),
    Judge(usize),
    Answer(usize),
    /// A deadline that is past.
    Tick(usize),
    Beat,
    /// This host stands still while the other waits for it.
    Pause(usize),
    Order(usize),
    // Faults.
    Crash(usize),
    /// With its machine: nobody is told.
    PowerLoss(usize),
    /// The connection breaks; what is on its way arrives, or does not.
    Break,
    BreakAndLose,
    /// What is sent to this host from now on is lost.
    CutTo(usize),
    CutBoth,
    /// The witness has stored a claim, and its answer is lost.
    LoseAnswer(usize),
    /// A fresh backup in the place of a host that is gone.
    Replace(usize),
}

#[derive(Clone, Debug)]
pub enum Parcel {
    Message(Box<Message>),
    Closed,
    Broken,
}

/// The connection between the hosts.
#[derive(Clone, Debug, Default)]
pub struct Net {
    /// On their way to each host, in order.
    pub pipes: [VecDeque<Parcel>; 2],
    pub cut_to: [bool; 2],
}

#[derive(Clone)]
pub struct World {
    pub bounds: Bounds,
    pub order: Option<Order>,
    pub now_ns: u64,
    pub hosts: [Host; 2],
    pub net: Net,
    pub witness: Store,
    pub checker: Checker,
    pub crashes: u8,
}

impl World {
    /// Two hosts that were just started.
    pub fn cold(bounds: Bounds) -> Self {
        let hosts = [Role::Primary, Role::Backup].map(|role| Host::new(role, Term(0)));
        Self {
            bounds,
            order: None,
            now_ns: MS,
            hosts,
            net: Net::default(),
            witness: Store::default(),
            checker: Checker::default(),
            crashes: 0,
        }
    }

    /// A guest in lockstep.
    pub fn pair(bounds: Bounds) -> Self {
        let mut world = Self::cold(Bounds::default());
        world.settle();
        assert!(world.hosts.iter().all(|host| host.session.is_protected()));
        Self { bounds, ..world }
    }

    /// A guest that runs without a backup; the other host is there.
    pub fn alone(bounds: Bounds) -> Self {
        let mut world = Self::cold(Bounds { outputs: 1, ..Bounds::default() });
        world.step(0, SessionEvent::StartAlone);
        for step in [Step::Judge(0), Step::Answer(0), Step::Run(0), Step::Disk(0)] {
            world.take(step);
        }
        assert!(world.hosts[0].is_live());
        Self { bounds, ..world }
    }

    pub fn with_order(mut self, order: Order) -> Self {
        self.order = Some(order);
        self
    }

    /// The highest term given away.
    pub fn highest(&self) -> Term {
        self.witness.0.as_ref().map_or(Term(0), |entry| entry.term)
    }

    /// What may happen next.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = self.usual_steps();
        let Bounds { faults, pauses, beats, orders, .. } = self.bounds;
        let connected = self.hosts.iter().any(|host| host.connected);
        if beats > 0 && self.next_deadline_ns().is_some() {
            steps.push(Step::Beat);
        }
        for host in 0..2 {
            let own = &self.hosts[host];
            if pauses > 0 && !self.hosts[1 - host].gone && self.deadline_ns(1 - host).is_some() {
                steps.push(Step::Pause(host));
            }
            if orders > 0 && self.may_order(host) {
                steps.push(Step::Order(host));
            }
            if faults == 0 {
                continue;
            }
            if !own.gone {
                steps.extend([Step::Crash(host), Step::PowerLoss(host)]);
            } else {
                steps.push(Step::Replace(host));
            }
            if own.claim.is_some_and(|asked| asked.answer.is_some()) {
                steps.push(Step::LoseAnswer(host));
            }
            if connected && !self.net.cut_to[host] {
                steps.push(Step::CutTo(host));
            }
        }
        if faults > 0 && connected {
            steps.extend([Step::Break, Step::BreakAndLose, Step::CutBoth]);
        }
        steps
    }

    /// What happens by itself.
    pub fn usual_steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for host in 0..2 {
            if self.net.pipes[host].front().is_some() {
                steps.push(Step::Deliver(host));
            }
            let own = &self.hosts[host];
            if own.gone {
                continue;
            }
            let is_through = own.pending.front().is_none_or(|(at, _)| *at > own.horizon);
            if matches!(own.mode, Mode::Following if !is_through) || own.mode == Mode::CatchingUp {
                steps.push(Step::Follow(host));
            }
            if own.disk.asked > own.disk.done && own.mode != Mode::None {
                steps.push(Step::Disk(host));
            }
            if own.is_live() {
                let runs = !own.session.is_yielding() && self.net.pipes[1 - host].len() < 3;
                if runs && own.guest.inputs.len() < usize::from(self.bounds.outputs) {
                    steps.push(Step::Run(host));
                }
                if own.sends {
                    steps.push(Step::SendState(host));
                }
            }
            match own.claim {
                Some(asked) if asked.answer.is_some() => steps.push(Step::Answer(host)),
                Some(_) => steps.push(Step::Judge(host)),
                None => {}
            }
            if self.deadline_ns(host).is_some_and(|deadline_ns| deadline_ns <= self.now_ns) {
                steps.push(Step::Tick(host));
            }
        }
        if self.may_connect() {
            steps.push(Step::Connect);
        }
        steps
    }

    fn may_order(&self, host: usize) -> bool {
        let own = &self.hosts[host];
        let is_out = own.gone && own.mode != Mode::Following;
        match self.order {
            Some(Order::Switch | Order::Detach) => !own.gone && own.session.may_yield(),
            Some(Order::OldCommand) => own.gone && host == 0,
            Some(Order::StartAlone | Order::StartAnyway) => own.gone || is_out,
            None => false,
        }
    }

    fn may_connect(&self) -> bool {
        let joins = |host: usize| {
            let own = &self.hosts[host];
            !own.gone && !own.connected && own.session.state_name() == "AwaitingWelcome"
        };
        let accepts = |host: usize| {
            let own = &self.hosts[host];
            !own.gone && !own.connected && own.session.accepts_backup()
        };
        self.net.pipes.iter().all(VecDeque::is_empty)
            && (joins(0) && accepts(1) || joins(1) && accepts(0))
    }

    pub fn deadline_ns(&self, host: usize) -> Option<u64> {
        let own = &self.hosts[host];
        if own.gone { None } else { own.session.next_deadline_ns() }
    }

    pub fn next_deadline_ns(&self) -> Option<u64> {
        [self.deadline_ns(0), self.deadline_ns(1)].into_iter().flatten().min()
    }

    /// Does one of [`Self::steps`].
    pub fn take(&mut self, step: Step) {
        match step {
            Step::Connect => {
                self.net = Net::default();
                for host in 0..2 {
                    self.hosts[host].connected = true;
                }
                self.step(0, SessionEvent::Connected);
                self.step(1, SessionEvent::Connected);
            }
            Step::Deliver(host) => self.deliver(host),
            Step::Run(host) => self.run(host),
            Step::Follow(host) => self.follow(host),
            Step::Disk(host) => {
                let disk = &mut self.hosts[host].disk;
                disk.done = disk.asked;
                let id = disk.done;
                self.step(host, SessionEvent::DiskFlushed { id });
            }
            Step::SendState(host) => self.send_state(host),
            Step::Judge(host) => self.judge(host),
            Step::Answer(host) => {
                let asked = self.hosts[host].claim.take().expect("a claim");
                let granted = asked.answer.expect("an answer");
                self.step(host, SessionEvent::TermClaimed { term: asked.term, granted });
            }
            Step::Tick(host) => self.step(host, SessionEvent::Tick),
            Step::Beat => {
                self.bounds.beats -= 1;
                let next_ns = self.next_deadline_ns().expect("a deadline");
                self.now_ns = self.now_ns.max(next_ns);
            }
            Step::Pause(host) => {
                self.bounds.pauses -= 1;
                self.wait_on(1 - host, FAILURE_NS + FAILURE_NS / 4);
            }
            Step::Order(host) => self.obey(host),
            fault => self.fail(fault),
        }
        self.check();
    }

    fn fail(&mut self, fault: Step) {
        self.bounds.faults -= 1;
        match fault {
            Step::Crash(host) => {
                self.crashes += 1;
                self.leave(host, Parcel::Closed);
            }
            Step::PowerLoss(host) => {
                self.crashes += 1;
                self.net.cut_to[1 - host] = true;
                self.leave(host, Parcel::Closed);
            }
            Step::Break => self.break_connection(),
            Step::BreakAndLose => {
                self.net.pipes.iter_mut().for_each(VecDeque::clear);
                self.break_connection();
            }
            Step::CutTo(host) => self.net.cut_to[host] = true,
            Step::CutBoth => self.net.cut_to = [true, true],
            Step::LoseAnswer(host) => {
                if let Some(asked) = &mut self.hosts[host].claim {
                    asked.answer = None;
                }
            }
            Step::Replace(host) => self.replace(host),
            step => panic!("{step:?} is no fault"),
        }
    }

    /// A fresh backup.
    pub fn replace(&mut self, host: usize) {
        let highest = self.highest();
        self.hosts[host].again(Role::Backup, highest);
    }

    pub fn break_connection(&mut self) {
        self.net.cut_to = [false, false];
        for host in 0..2 {
            if self.hosts[host].connected {
                self.net.pipes[host].push_back(Parcel::Broken);
            }
        }
    }

    /// The host's process ends.
    pub fn leave(&mut self, host: usize, last: Parcel) {
        let own = &mut self.hosts[host];
        (own.gone, own.claim, own.sends) = (true, None, false);
        self.hang_up(host, last);
    }

    /// The host closes its end.
    pub fn hang_up(&mut self, host: usize, last: Parcel) {
        if core::mem::take(&mut self.hosts[host].connected) {
            self.net.pipes[host].clear();
            self.post(host, last);
        }
    }

    pub fn post(&mut self, from: usize, parcel: Parcel) {
        let to = 1 - from;
        if !self.net.cut_to[to] && self.hosts[to].connected {
            self.net.pipes[to].push_back(parcel);
        }
    }

    fn obey(&mut self, host: usize) {
        self.bounds.orders -= 1;
        let highest = self.highest();
        match self.order.expect("an order") {
            Order::Switch => {
                let through = self.hosts[host].guest.left();
                self.step(host, SessionEvent::Yield { through });
            }
            Order::Detach => self.step(host, SessionEvent::Detach),
            Order::OldCommand => self.hosts[host].again(Role::Primary, highest),
            order => {
                self.hosts[host].again(Role::Primary, highest);
                self.hosts[host].overrides = order == Order::StartAnyway;
                self.step(host, SessionEvent::StartAlone);
            }
        }
    }

    fn deliver(&mut self, host: usize) {
        let parcel = self.net.pipes[host].pop_front().expect("a parcel");
        if self.hosts[host].gone || !self.hosts[host].connected {
            return;
        }
        let event = match parcel {
            Parcel::Message(message) => SessionEvent::Received(*message),
            Parcel::Closed => SessionEvent::Disconnected { reason: DisconnectReason::Closed },
            Parcel::Broken => SessionEvent::Disconnected {
                reason: DisconnectReason::Transport { description: "broken".into() },
            },
        };
        if matches!(event, SessionEvent::Disconnected { .. }) {
            self.hosts[host].connected = false;
            self.net.pipes[host].clear();
        }
        self.step(host, event);
    }

    /// A live guest takes an input at its exit, and leaves it.
    fn run(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        let input = host as u8 + 2 * own.life;
        own.guest.inputs.push(input);
        let at = own.guest.left();
        if own.mode == Mode::Recording {
            let input = ftvmm_devices::Input::NetRx { frame: vec![input] };
            let mut encoder = GroupEncoder::new();
            encoder.push(&Record { at, event: Event::Input(input) });
            let bytes = encoder.finish(at);
            self.step(host, SessionEvent::Group { bytes });
        }
        self.answer(host);
    }

    fn follow(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        match own.pending.pop_front() {
            Some((at, input)) => {
                let next = own.guest.left().next();
                assert!(Ordinal(at) >= next, "an input of exit {at} comes twice, before {next}");
                assert!(Ordinal(at) <= next, "inputs before exit {at} are skipped, after {next}");
                own.guest.inputs.push(input);
                self.answer(host);
                self.step(host, SessionEvent::Executed(Ordinal(at)));
            }
            None if own.mode == Mode::CatchingUp => {
                own.mode = Mode::Alone;
                let through = own.guest.left();
                self.checker.on_goes_on(&own.guest);
                self.step(host, SessionEvent::TookOver { through });
            }
            None => {}
        }
    }

    fn answer(&mut self, host: usize) {
        let (at, digest, frame, flush) = self.hosts[host].guest.answer();
        if let Some(id) = flush {
            self.hosts[host].disk.asked = id;
            self.step(host, SessionEvent::FlushAsked { id });
        }
        self.step(host, SessionEvent::Output { at, digest, frame });
    }

    fn send_state(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        own.sends = false;
        let disk_through = own.disk.done;
        let mut machine = vec![disk_through as u8];
        machine.extend_from_slice(&own.guest.inputs);
        let at = own.guest.left().next();
        self.step(host, SessionEvent::StateEnd { at, machine, disk_through });
    }

    fn judge(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        let asked = own.claim.as_mut().expect("a claim");
        let wanted = Entry {
            term: asked.term,
            guest: GuestId([7; 16]),
            holder: Holder::from_text(&format!("host-{host}/{}", own.life)).expect("a name"),
            doing: Doing::Live,
            ran: Some(asked.ran),
            seen: "then".into(),
        };
        match claim(&mut self.witness, &wanted, asked.purpose) {
            Ok(Claim::Granted) => asked.answer = Some(true),
            Ok(Claim::Denied { .. }) => asked.answer = Some(false),
            // It is asked again.
            Err(_) => {}
        }
    }

    /// So much time passes, of which only this host knows.
    pub fn wait_on(&mut self, host: usize, duration_ns: u64) {
        let until_ns = self.now_ns + duration_ns;
        while let Some(deadline_ns) = self.deadline_ns(host).filter(|at_ns| *at_ns <= until_ns) {
            self.now_ns = self.now_ns.max(deadline_ns);
            self.step(host, SessionEvent::Tick);
        }
        self.now_ns = until_ns;
    }
}
