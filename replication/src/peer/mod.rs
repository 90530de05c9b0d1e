//! One host of a pair, without I/O: the [`Session`] and everything its decisions touch.
//!
//! ```text
//! vCPU thread    exits, inputs, outputs ─┐               ┌─► other host, network, witness
//!                                        ├─► PeerCore ─► effects
//! host events    bytes, ticks, orders ───┘               └─► the guest's inputs and disk
//! ```
//! The caller tells the core what happened and what time it is, takes the [`Effect`]s and performs
//! them in order, after it has let go of the core. The `vmm` crate does so with sockets and
//! threads; the simulator in `tests/sim` does so in memory.
//!
//! An effect that leads to another event (a send that fails) is a new call. An action that leads to
//! another event inside the core waits until the actions before it are done.

mod announce;
mod counters;
mod effect;
mod follower;
mod pacing;
mod transfer;

use std::collections::VecDeque;

pub use announce::Announcer;
pub use counters::PeerCounters;
pub use effect::{Effect, Notice};
pub use follower::Follower;
pub use pacing::{LogPacer, Pace};
pub use transfer::Transfer;

use crate::group::decode_group;
use crate::message::Message;
use crate::record::{End, Event, Ordinal, Record, Term};
use crate::session::policy::{ReleasePolicy, Role, SessionConfig, SessionConfigError, StopReason};
use crate::session::{Action, DisconnectReason, Session, SessionEvent};
use crate::state::StatePart;
use crate::wire::{self, Decoder};

/// How long after a switch of roles the network may send the guest's frames to its old place, in
/// nanoseconds.
const STRAYS_NS: u64 = 1_000_000_000;
/// Frames in a message: of the greatest length they take 4 MiB.
const STRAYS_AT_ONCE: usize = 64;

/// What the session said at the guest's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Unix time of power-on in seconds.
    pub rtc_epoch_s: u64,
    /// When frames leave.
    pub release: ReleasePolicy,
}

/// Where the guest's inputs come from and whether they are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// From this host; nobody follows.
    Alone,
    /// From this host, and to the backup.
    Recording,
    /// From the other host.
    Following,
}

/// See the module documentation.
#[derive(Debug)]
pub struct PeerCore {
    mode: Mode,
    session: Session,
    /// Of the connection that stands.
    decoder: Option<Decoder>,
    log: LogPacer,
    follower: Follower,
    transfer: Transfer,
    announcer: Announcer,
    counters: PeerCounters,
    begin: Option<Begin>,
    stop: Option<StopReason>,
    guest: GuestOrders,
    /// Until then frames that come here for the guest are handed on.
    strays_until_ns: u64,
    now_ns: u64,
    events: VecDeque<SessionEvent>,
    effects: Vec<Effect>,
}

/// What is wanted of the guest's thread, and of the guest when nobody follows it.
#[derive(Debug, Default)]
struct GuestOrders {
    /// It must wait at its exit.
    congested: bool,
    /// It is to stand still for a switch of roles.
    yields: bool,
    /// Alone, it takes inputs between exits too, where no log could name them.
    unrecorded_when_alone: bool,
}

impl PeerCore {
    /// A host that is not connected yet. `horizon_ns` is the longest time a horizon is held back
    /// while the guest makes exits; with `unrecorded_when_alone` nobody else records the guest.
    ///
    /// # Errors
    /// When the session's configuration cannot work.
    pub fn new(
        config: SessionConfig,
        horizon_ns: u64,
        unrecorded_when_alone: bool,
    ) -> Result<Self, SessionConfigError> {
        let mode = match config.role {
            Role::Primary => Mode::Recording,
            Role::Backup => Mode::Following,
        };
        let mut follower = Follower::default();
        follower.set_active(mode == Mode::Following);
        Ok(Self {
            mode,
            session: Session::new(config)?,
            decoder: None,
            log: LogPacer::new(horizon_ns),
            follower,
            transfer: Transfer::default(),
            announcer: Announcer::default(),
            counters: PeerCounters::default(),
            begin: None,
            stop: None,
            guest: GuestOrders { unrecorded_when_alone, ..GuestOrders::default() },
            strays_until_ns: 0,
            now_ns: 0,
            events: VecDeque::new(),
            effects: Vec::new(),
        })
    }

    // What the caller may know.

    /// The role state machine.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Numbers for the report.
    #[must_use]
    pub fn counters(&self) -> &PeerCounters {
        &self.counters
    }

    /// Set when the guest may start.
    #[must_use]
    pub fn begin(&self) -> Option<Begin> {
        self.begin
    }

    /// Why the session is over, if it is.
    #[must_use]
    pub fn stop(&self) -> Option<&StopReason> {
        self.stop.as_ref()
    }

    /// True while the log goes to a backup.
    #[must_use]
    pub fn records_log(&self) -> bool {
        self.mode == Mode::Recording
    }

    /// True while inputs come from the other host's log.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.mode == Mode::Following
    }

    /// True while the guest takes inputs between exits, because nobody follows and nobody records.
    #[must_use]
    pub fn is_unrecorded(&self) -> bool {
        self.mode == Mode::Alone && self.guest.unrecorded_when_alone
    }

    /// True while a whole state comes or goes.
    #[must_use]
    pub fn is_transferring(&self) -> bool {
        self.follower.is_joining() || self.session.is_attaching()
    }

    /// True while a connection stands.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.decoder.is_some()
    }

    /// True while the guest must wait at its exit.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        self.guest.congested
    }

    /// True while the guest is to stand still for a switch of roles.
    #[must_use]
    pub fn wants_yield(&self) -> bool {
        self.guest.yields
    }

    /// True when the guest's thread has to look at the roles before it asks for inputs.
    #[must_use]
    pub fn wants_turn(&self) -> bool {
        self.follower.is_joining() || self.follows() || self.guest.yields
    }

    /// What follows the other host's log.
    #[must_use]
    pub fn follower(&mut self) -> &mut Follower {
        &mut self.follower
    }

    /// The log of a guest that is followed.
    #[must_use]
    pub fn log(&self) -> &LogPacer {
        &self.log
    }

    /// The state on its way to the backup.
    #[must_use]
    pub fn transfer(&self) -> &Transfer {
        &self.transfer
    }

    /// Counts a state that has been sent.
    pub fn count_attach(&mut self, stopped_ns: u64) {
        self.counters.attaches += 1;
        self.counters.attach_stopped_ns = self.counters.attach_stopped_ns.max(Some(stopped_ns));
    }

    /// What is to be done, in this order. Empty at the next call.
    #[must_use]
    pub fn take_effects(&mut self) -> Vec<Effect> {
        core::mem::take(&mut self.effects)
    }

    /// Whether there is anything to be done.
    #[must_use]
    pub fn has_effects(&self) -> bool {
        !self.effects.is_empty()
    }

    // The connection.

    /// A connection stands.
    pub fn connect(&mut self, now_ns: u64) {
        self.send(&wire::PREAMBLE);
        self.decoder = Some(Decoder::new());
        self.step(now_ns, SessionEvent::Connected);
    }

    /// The other host sent these bytes.
    pub fn receive(&mut self, now_ns: u64, bytes: &[u8]) {
        let Some(decoder) = &mut self.decoder else { return };
        decoder.push(bytes);
        // A message may end the connection.
        while let Some(decoder) = &mut self.decoder {
            match decoder.next_message() {
                Ok(Some(message)) => {
                    self.count(&message);
                    self.step(now_ns, SessionEvent::Received(message));
                }
                Ok(None) => return,
                Err(error) => return self.disconnect(now_ns, DisconnectReason::Wire(error)),
            }
        }
    }

    /// The connection is gone, or of no use any more.
    pub fn disconnect(&mut self, now_ns: u64, reason: DisconnectReason) {
        if self.decoder.take().is_some() {
            self.effects.push(Effect::HangUp);
            self.notice(Notice::Disconnected { reason: reason.clone() });
            self.step(now_ns, SessionEvent::Disconnected { reason });
        }
    }

    /// What time of day it is: it becomes the guest's at power-on.
    pub fn tell_time_of_day(&mut self, unix_s: u64) {
        self.session.tell_time_of_day(unix_s);
    }

    /// Lets time pass; when it should again at the latest, on the same clock.
    pub fn tick(&mut self, now_ns: u64) -> Option<u64> {
        if self.session.next_deadline_ns().is_some_and(|deadline_ns| deadline_ns <= now_ns) {
            self.step(now_ns, SessionEvent::Tick);
        }
        if self.announcer.is_due(now_ns) {
            self.effects.push(Effect::Announce);
        }
        self.session.next_deadline_ns()
    }

    // The guest's log.

    /// The recorder has a record of the guest. Does nothing while nobody follows.
    pub fn append(&mut self, now_ns: u64, record: &Record) {
        if self.records_log() && self.log.append(record) == Pace::Send {
            self.flush_log(now_ns);
        }
    }

    /// The guest leaves exit `at`: no further record will name it.
    pub fn exit_complete(&mut self, now_ns: u64, at: Ordinal) {
        if !self.records_log() {
            return;
        }
        match self.log.exit_complete(at, now_ns, self.session.lag_exits()) {
            Pace::Send => self.flush_log(now_ns),
            Pace::LookIn { ns } => self.effects.push(Effect::LookAtLogIn { ns }),
            Pace::Wait => {}
        }
        // The backup must not wait for a group while the guest waits for the backup.
        if self.guest.congested {
            self.flush_log(now_ns);
        }
    }

    /// The guest waits at its exit: what was logged goes out. A horizon alone is not worth a
    /// message: the timer or the next input takes it along.
    pub fn idle(&mut self, now_ns: u64) {
        if self.log.has_records() {
            self.flush_log(now_ns);
        }
    }

    /// The time of [`Effect::LookAtLogIn`] is over.
    pub fn look_at_log(&mut self, now_ns: u64) {
        match self.log.look(now_ns) {
            Pace::Send => self.flush_log(now_ns),
            Pace::LookIn { ns } => self.effects.push(Effect::LookAtLogIn { ns }),
            Pace::Wait => {}
        }
    }

    /// Sends what the backup may not know yet: the records since the last time, and how far they
    /// are complete.
    pub fn flush_log(&mut self, now_ns: u64) {
        if self.records_log()
            && let Some(bytes) = self.log.take_group(now_ns)
        {
            self.counters.log_bytes += bytes.len() as u64;
            self.step(now_ns, SessionEvent::Group { bytes });
            self.effects.push(Effect::LogSent);
        }
    }

    /// Sending the last group took so long.
    pub fn log_cost(&mut self, cost_ns: u64) {
        self.log.note_cost(cost_ns);
    }

    /// The guest ended here; `at` is the first exit it did not get past.
    pub fn guest_ended(&mut self, now_ns: u64, at: Ordinal, end: End) {
        self.append(now_ns, &Record { at, event: Event::End(end) });
        self.flush_log(now_ns);
        self.step(now_ns, SessionEvent::GuestEnded { state_digest: end.state_digest });
    }

    // The roles.

    /// The guest's thread lets the roles change, if they are to; whether it has to wait for the
    /// backup.
    pub fn take_turn(&mut self, now_ns: u64) -> bool {
        if !core::mem::take(&mut self.guest.yields) || !self.session.may_yield() {
            return false;
        }
        self.flush_log(now_ns);
        self.step(now_ns, SessionEvent::Yield { through: self.log.horizon() });
        true
    }

    /// Has the guest stand still at its next exit for a switch of roles.
    pub fn want_switch(&mut self) {
        self.guest.yields = true;
        self.effects.push(Effect::AttendGuest);
    }

    /// The log is used up and sealed: the guest has left exit `through` and takes this host's
    /// inputs from now on.
    pub fn took_over(&mut self, now_ns: u64, through: Ordinal) {
        self.follower.set_active(false);
        self.step(now_ns, SessionEvent::TookOver { through });
        // A planned one follows no loss.
        if !self.session.is_protected() {
            self.counters.took_over(now_ns);
        }
    }

    /// This host cannot follow the log.
    pub fn fault(&mut self, now_ns: u64, description: String) {
        // A state that has come whole, so that the session counts on it, cannot be put in place:
        // this host has no guest that could be compared or believed, and leaves.
        let event = match self.follower.is_joining() && self.session.is_protected() {
            true => SessionEvent::DiskFailed { id: 0, description },
            false => SessionEvent::ReplayFault { description },
        };
        self.follower.fault();
        self.step(now_ns, event);
    }

    /// A follower has left exit `through`.
    pub fn executed(&mut self, now_ns: u64, through: Ordinal) {
        if self.follower.report(through) {
            self.step(now_ns, SessionEvent::Executed(through));
        }
    }

    /// A part of the state that comes is in place; after the last one the guest stands at `stands`.
    pub fn part_restored(&mut self, now_ns: u64, part_bytes: u64, stands: Option<Ordinal>) {
        let taken_bytes = self.follower.part_restored(part_bytes, stands);
        self.step(now_ns, SessionEvent::StateTaken { taken_bytes });
    }

    /// Sends a part of the state of transfer `number`; `None` when nobody wants it any more, and
    /// `Some(false)` when the backup has to take others first.
    pub fn send_part(
        &mut self,
        now_ns: u64,
        number: u64,
        part: &mut Option<StatePart>,
    ) -> Option<bool> {
        if !(self.session.is_attaching() && self.transfer.is_number(number)) {
            return None;
        }
        if !self.transfer.has_room() {
            return Some(false);
        }
        if let Some(part) = part.take() {
            self.transfer.sent(part.len_bytes());
            self.step(now_ns, SessionEvent::State(part));
        }
        Some(true)
    }

    /// Clients reach the guest on this host from now on, or again: the switches may know it
    /// elsewhere.
    pub fn guest_is_here(&mut self) {
        if !self.follows() {
            self.announcer.start(self.now_ns);
        }
    }

    /// Whether a frame that came here may be one for the guest's old place.
    #[must_use]
    pub fn takes_strays(&self, now_ns: u64) -> bool {
        now_ns < self.strays_until_ns
    }

    /// Frames for the guest came here although the other host speaks for it.
    pub fn strays(&mut self, now_ns: u64, frames: Vec<Vec<u8>>) {
        // Few enough for one message, whatever their length.
        let mut frames = frames.into_iter().peekable();
        while frames.peek().is_some() {
            let some = frames.by_ref().take(STRAYS_AT_ONCE).collect();
            self.step(now_ns, SessionEvent::Strays(some));
        }
    }

    // The session.

    /// Tells the session what happened and performs what it decides, in order.
    pub fn step(&mut self, now_ns: u64, event: SessionEvent) {
        self.now_ns = self.now_ns.max(now_ns);
        self.events.push_back(event);
        let mut actions = Vec::new();
        while let Some(event) = self.events.pop_front() {
            self.counters.outputs += u64::from(matches!(event, SessionEvent::Output { .. }));
            self.session.step(self.now_ns, event, &mut actions);
            actions.drain(..).for_each(|action| self.perform(action));
        }
    }

    fn count(&mut self, message: &Message) {
        self.counters.digests += u64::from(matches!(message, Message::Digest { .. }));
    }

    fn notice(&mut self, notice: Notice) {
        self.effects.push(Effect::Tell(notice));
    }

    /// Bytes that leave together are one effect.
    fn send(&mut self, bytes: &[u8]) {
        match self.effects.last_mut() {
            Some(Effect::Send(unsent)) => unsent.extend_from_slice(bytes),
            _ => self.effects.push(Effect::Send(bytes.to_vec())),
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.send_message(&message),
            Action::Transmit(frame) => self.effects.push(Effect::Transmit(frame)),
            Action::ClaimTerm(term) => {
                self.counters.lost_peer(self.now_ns);
                self.effects.push(Effect::ClaimTerm(term));
            }
            Action::Begin { term, rtc_epoch_s, release } => {
                self.begin_guest(term, Begin { rtc_epoch_s, release });
            }
            Action::DeliverGroup(bytes) => self.deliver(&bytes),
            Action::GoLive { term } => self.go_live(term),
            Action::GoAlone { term } => {
                self.notice(Notice::GoesAlone { term });
                self.be_alone();
            }
            Action::ShipState => {
                self.be_alone();
                let number = self.transfer.begin();
                self.effects.push(Effect::SendState { number });
            }
            Action::StateTaken { taken_bytes } => self.transfer.taken(taken_bytes),
            Action::Protect { at } => {
                self.notice(Notice::Protected { at });
                self.mode = Mode::Recording;
                self.log.start(Ordinal(at.0.saturating_sub(1)));
                self.counters.found_peer();
            }
            Action::Join { release } => self.join(release),
            Action::TakeState(part) => self.follower.push_part(part),
            Action::Follow { term, through } => self.follow(term, through),
            // The run loop reports when the guest stands still.
            Action::SwitchRoles => self.want_switch(),
            Action::Receive(frames) => self.effects.push(Effect::GiveFrames(frames)),
            Action::Incident(report) => {
                self.counters.divergences += 1;
                self.effects.push(Effect::KeepIncident(report));
            }
            Action::Congested(congested) => self.guest.congested = congested,
            Action::TellFlushes { through } => {
                self.effects.push(Effect::CompleteFlushes { through });
            }
            Action::TellDisk { id } => self.effects.push(Effect::CompleteDisk { id }),
            Action::HangUp => {
                self.decoder = None;
                self.effects.push(Effect::HangUp);
            }
            Action::Decided { row, detail } => self.notice(Notice::Decided { row, detail }),
            Action::Stop(reason) => {
                self.notice(Notice::Over { reason: reason.clone() });
                self.stop = Some(reason);
                self.effects.push(Effect::StopGuest);
            }
        }
    }

    fn send_message(&mut self, message: &Message) {
        self.count(message);
        if self.decoder.is_none() {
            return;
        }
        match self.effects.last_mut() {
            Some(Effect::Send(unsent)) => wire::encode(message, unsent),
            _ => {
                let mut bytes = Vec::new();
                wire::encode(message, &mut bytes);
                self.effects.push(Effect::Send(bytes));
            }
        }
    }

    fn begin_guest(&mut self, term: Term, begin: Begin) {
        self.notice(Notice::Begins { term, release: begin.release });
        self.begin = Some(begin);
        if self.session.role() == Role::Primary {
            // The switches may know its addresses behind another host.
            self.announcer.start(self.now_ns);
        }
        self.counters.found_peer();
    }

    fn deliver(&mut self, bytes: &[u8]) {
        self.counters.log_bytes += bytes.len() as u64;
        let group = decode_group(bytes).map_err(|error| error.to_string());
        match group.and_then(|group| self.follower.push_group(group)) {
            // The guest may be computing past that point.
            Ok(has_slice) if has_slice => self.effects.push(Effect::InterruptGuest),
            Ok(_) => {}
            Err(description) => {
                self.events.push_back(SessionEvent::ReplayFault { description });
            }
        }
    }

    fn go_live(&mut self, term: Term) {
        self.notice(Notice::TakesOver { term });
        self.guest.congested = false;
        self.follower.go_live();
        match self.session.takes_over_by_switch() {
            true => self.counters.switches += 1,
            false => self.counters.takeovers += 1,
        }
        self.be_alone();
        self.effects.push(Effect::InterruptGuest);
        self.announcer.start(self.now_ns);
        if self.announcer.is_due(self.now_ns) {
            self.effects.push(Effect::Announce);
        }
    }

    fn be_alone(&mut self) {
        self.mode = Mode::Alone;
        self.effects.push(Effect::OpenInputs);
    }

    fn join(&mut self, release: ReleasePolicy) {
        self.mode = Mode::Following;
        self.follower.join();
        self.begin.get_or_insert(Begin { rtc_epoch_s: 0, release });
        let orders = [Effect::CloseInputs, Effect::InterruptGuest, Effect::AttendGuest];
        self.effects.extend(orders);
    }

    fn follow(&mut self, term: Term, through: Ordinal) {
        self.notice(Notice::Follows { term });
        self.counters.switches += 1;
        self.mode = Mode::Following;
        self.follower.follow(through);
        self.strays_until_ns = self.now_ns + STRAYS_NS;
        self.effects.push(Effect::CloseInputs);
    }
}

#[cfg(test)]
mod tests;
