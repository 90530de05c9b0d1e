//! What a session's actions come to.

use ftvmm_replication::witness::claim::Purpose;
use ftvmm_replication::{Action, Event, Role, SessionEvent, StatePart, Term, decode_group};

use crate::guest::Guest;
use crate::host::{Asked, Host, Mode};
use crate::world::{Parcel, World};

impl Host {
    fn ask(&mut self, term: Term, ran: Term) {
        let state = self.session.state_name();
        let starts = matches!(state, "ClaimingFirstTerm" | "StartingAlone" | "Beginning");
        let purpose = match (self.overrides, starts) {
            (true, _) => Purpose::Replace,
            (false, true) => Purpose::Start,
            (false, false) => Purpose::GoOn,
        };
        self.claim = Some(Asked { term, ran, purpose, answer: None });
    }

    fn receive_log(&mut self, bytes: &[u8]) {
        let group = decode_group(bytes).expect("a group");
        self.horizon = group.horizon.0;
        for record in group.records {
            let Event::Input(ftvmm_devices::Input::NetRx { frame }) = record.event else {
                panic!("a record of no input");
            };
            self.pending.push_back((record.at.0, frame[0]));
        }
    }
}

impl World {
    /// Something happened on a host that is there.
    pub fn step(&mut self, host: usize, event: SessionEvent) {
        if self.hosts[host].gone {
            return;
        }
        let mut actions = Vec::new();
        let own = &mut self.hosts[host];
        own.session.step(self.now_ns, event, &mut actions);
        if own.session.has_release() {
            own.session.release(self.now_ns, &mut actions);
        }
        for action in actions {
            self.perform(host, action);
        }
    }

    fn perform(&mut self, host: usize, action: Action) {
        let own = &mut self.hosts[host];
        match action {
            Action::Send(message) => self.post(host, Parcel::Message(Box::new(message))),
            Action::Transmit(frame) => self.transmit(host, &frame),
            Action::ClaimTerm(term) => own.ask(term, term),
            Action::HoldTerm(term) => own.ask(term, Term(0)),
            Action::Begin { .. } => {
                own.guest = Guest::default();
                let is_primary = own.session.role() == Role::Primary;
                own.mode = if is_primary { Mode::Recording } else { Mode::Following };
                if is_primary {
                    self.checker.on_begins((host, self.hosts[host].life));
                }
            }
            Action::DeliverGroup(bytes) => own.receive_log(&bytes),
            Action::GoLive { .. } => {
                own.mode = Mode::CatchingUp;
                own.horizon = u64::MAX;
                let (life, disk) = (own.life, own.disk);
                self.checker.on_speaks((host, life));
                self.checker.on_disk(disk);
            }
            Action::GoAlone { .. } => {
                own.mode = Mode::Alone;
                self.checker.on_speaks((host, own.life));
                self.checker.on_goes_on(&own.guest);
                self.checker.on_disk(own.disk);
            }
            Action::SendState => (own.mode, own.sends) = (Mode::Alone, true),
            Action::Protect { .. } => own.mode = Mode::Recording,
            Action::Join { .. } => {
                own.mode = Mode::None;
                own.pending.clear();
                own.disk.done = 0;
            }
            Action::RestoreState(StatePart::Machine(machine)) => {
                let (done, inputs) = machine.split_first().expect("a machine");
                own.guest = Guest { inputs: inputs.to_vec() };
                own.disk.done = u64::from(*done);
                own.disk.asked = own.guest.flush_asked();
                own.mode = Mode::Following;
            }
            Action::Follow { .. } => {
                own.mode = Mode::Following;
                (own.horizon, own.sends) = (own.guest.left().0, false);
                own.pending.clear();
            }
            Action::CompleteFlushes { through } => self.tell_flushes(host, through),
            Action::TurnedAway(reason) => panic!("turned away by nobody: {reason}"),
            Action::HangUp => self.hang_up(host, Parcel::Closed),
            Action::Stop(_) => self.leave(host, Parcel::Closed),
            Action::Incident(report) => panic!("a divergence out of nothing: {report}"),
            Action::RestoreState(_)
            | Action::BackupRestored { .. }
            | Action::SwitchRoles
            | Action::Receive(_)
            | Action::Congested(_)
            | Action::CompleteDisk { .. }
            | Action::Decided { .. } => {}
        }
    }

    fn transmit(&mut self, host: usize, frame: &[u8]) {
        let own = &self.hosts[host];
        // A gated frame is one that the other host has sent too.
        let peer = (own.mode == Mode::Recording).then(|| &self.hosts[1 - host].guest);
        self.checker.on_frame((host, own.life), &own.guest, peer, frame);
    }

    fn tell_flushes(&mut self, host: usize, through: u64) {
        let own = &self.hosts[host];
        let peer = (own.mode == Mode::Recording).then_some(self.hosts[1 - host].disk);
        self.checker.on_flush_told((host, own.life), own.disk, peer, through);
    }
}
