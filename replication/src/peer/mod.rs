//! One host of a pair, without I/O: the [`Session`] and everything its decisions touch.
//!
//! ```text
//! vCPU thread    exits, inputs, outputs ─┐               ┌─► other host, network, witness
//!                                        ├─► PeerCore ─► effects
//! host events    bytes, ticks, orders ───┘               └─► the guest's inputs and disk
//! ```
//! The caller tells the core what happened and what time it is, takes the [`Effect`]s and performs
//! them in order, after it has let go of the core. `ftvmm-runtime` does so with sockets and
//! threads; the simulator in `tests/sim` does so in memory.
//!
//! An effect that leads to another event (a send that fails) is a new call. An action that leads to
//! another event inside the core waits until the actions before it are done.

mod announce;
mod connection;
mod counters;
mod disk;
mod effect;
mod follower;
mod pacing;
mod perform;
mod proof;
mod resume;
mod transfer;
mod view;

use std::collections::VecDeque;

pub use announce::Announcer;
use connection::Connection;
pub use counters::PeerCounters;
pub use effect::{Effect, Notice};
pub use follower::Follower;
pub use pacing::{LogPacer, Pace};
use proof::Proof;
pub use proof::{Common, Look};
pub use transfer::Transfer;

use crate::disk_label::{DiskMark, DiskState};
use crate::message::STRAYS_MAX;
use crate::policy::{ReleasePolicy, Role, SessionConfig, SessionConfigError, StopReason};
use crate::record::{End, Event, Ordinal, Record};
use crate::session::{DisconnectReason, Session, SessionEvent};
use crate::state::StatePart;
use crate::wire;

/// How long after a switch of roles the network may send the guest's frames to its old place, in
/// nanoseconds.
const STRAYS_NS: u64 = 1_000_000_000;

/// What the session decided at the guest's start.
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
    /// From this host; no backup follows.
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
    connection: Connection,
    log: LogPacer,
    follower: Follower,
    transfer: Transfer,
    announcer: Announcer,
    counters: PeerCounters,
    proof: Proof,
    stop: Option<StopReason>,
    guest: GuestOrders,
    /// Until this time, frames that reach this (old) host are forwarded to the new primary.
    strays_until_ns: u64,
    now_ns: u64,
    events: VecDeque<SessionEvent>,
    effects: Vec<Effect>,
}

/// Which host is active, and what is to change about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// The other host does.
    pub follows: bool,
    /// A whole state comes.
    pub joins: bool,
    /// The guest is to stand still for a switch.
    pub yields: bool,
    /// The session is over.
    pub is_over: bool,
}

/// Orders to the vCPU thread, and what the guest's disk is.
#[derive(Debug, Default)]
struct GuestOrders {
    /// It may start.
    begin: Option<Begin>,
    /// It must wait at its exit.
    congested: bool,
    /// It is to stand still for a switch of roles.
    yields: bool,
    /// Alone, it takes inputs between exits too, where no log could name them.
    unrecorded_when_alone: bool,
    /// Since the guest began here.
    disk_mark: Option<DiskMark>,
    /// What the disk is once the state that comes is in place.
    disk_when_whole: DiskState,
}

impl PeerCore {
    /// A host that is not connected yet. `horizon_ns` is the longest time a horizon is held back
    /// while the guest makes exits; `unrecorded_when_alone` says that no recording needs the log
    /// either.
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
            connection: Connection::default(),
            log: LogPacer::new(horizon_ns),
            follower,
            transfer: Transfer::default(),
            announcer: Announcer::default(),
            counters: PeerCounters::default(),
            proof: Proof::default(),
            stop: None,
            guest: GuestOrders { unrecorded_when_alone, ..GuestOrders::default() },
            strays_until_ns: 0,
            now_ns: 0,
            events: VecDeque::new(),
            effects: Vec::new(),
        })
    }

    // The connection.

    /// A connection stands.
    pub fn connect(&mut self, now_ns: u64) {
        if self.greet_again() {
            return;
        }
        self.unsent().extend_from_slice(&wire::PREAMBLE);
        self.connection = Connection::begin(now_ns);
        self.step(now_ns, SessionEvent::Connected);
        self.begin_proof();
    }

    /// The other host sent these bytes.
    pub fn receive(&mut self, now_ns: u64, bytes: &[u8]) {
        let Some(decoder) = &mut self.connection.decoder else { return };
        decoder.push(bytes);
        self.confirm(bytes.len());
        // A message may end the connection.
        while let Some(decoder) = &mut self.connection.decoder {
            match decoder.next_message() {
                Ok(Some(message)) => {
                    let message = self.resume_first(now_ns, message);
                    if let Some(message) = message.and_then(|said| self.prove_first(now_ns, said)) {
                        self.count(&message);
                        self.step(now_ns, SessionEvent::Received(message));
                    }
                }
                Ok(None) => return,
                Err(error) => return self.disconnect(now_ns, DisconnectReason::Wire(error)),
            }
        }
    }

    /// The connection is gone, or of no use any more.
    pub fn disconnect(&mut self, now_ns: u64, reason: DisconnectReason) {
        if self.connection.decoder.take().is_none() {
            return;
        }
        let is_to_come_again = self.breaks(now_ns, &reason);
        self.effects.push(if is_to_come_again { Effect::BreakOff } else { Effect::HangUp });
        self.notice(Notice::Disconnected { reason: reason.clone() });
        if !is_to_come_again {
            self.step(now_ns, SessionEvent::Disconnected { reason });
        }
    }

    /// When [`Self::tick`] is due next.
    #[must_use]
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.session.next_deadline_ns().into_iter().chain(self.resume_deadline_ns()).min()
    }

    /// What time of day it is: it becomes the guest's at power-on.
    pub fn tell_time_of_day(&mut self, unix_s: u64) {
        self.session.tell_time_of_day(unix_s);
    }

    /// Lets time pass. Due at [`Self::next_deadline_ns`].
    pub fn tick(&mut self, now_ns: u64) {
        self.give_up_resuming(now_ns);
        if self.session.next_deadline_ns().is_some_and(|deadline_ns| deadline_ns <= now_ns) {
            self.step(now_ns, SessionEvent::Tick);
        }
        self.announce(now_ns);
    }

    // The guest's log.

    /// Takes a log record. Does nothing while no backup follows.
    pub fn append(&mut self, now_ns: u64, record: &Record) {
        if self.records_log() {
            let pace = self.log.append(record);
            self.keep_pace(now_ns, pace);
        }
    }

    /// The guest leaves exit `at`: no further record will name it.
    pub fn exit_complete(&mut self, now_ns: u64, at: Ordinal) {
        if !self.records_log() {
            return;
        }
        let pace = self.log.exit_complete(at, now_ns, self.session.lag_exits());
        self.keep_pace(now_ns, pace);
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
        let pace = self.log.look(now_ns);
        self.keep_pace(now_ns, pace);
    }

    fn keep_pace(&mut self, now_ns: u64, pace: Pace) {
        match pace {
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

    /// The last group has left this host ([`Effect::LogSent`]).
    pub fn log_sent(&mut self, now_ns: u64) {
        self.log.note_sent(now_ns);
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
    pub fn change_role(&mut self, now_ns: u64) -> bool {
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
        self.effects.push(Effect::RequestAttention);
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
        let event = match self.follower.is_joining() {
            true => SessionEvent::StateUnusable { description },
            false => SessionEvent::ReplayFault { description },
        };
        self.follower.fault();
        self.step(now_ns, event);
    }

    /// A part of the state that comes is in place; with the last one it is whole.
    pub fn part_restored(&mut self, now_ns: u64, part_bytes: u64, is_whole: bool) {
        let restored_bytes = self.follower.part_restored(part_bytes, is_whole);
        if is_whole {
            self.disk_is_whole();
        }
        self.step(now_ns, SessionEvent::StateRestored { restored_bytes });
    }

    /// Sends a part of the state of transfer `number`; `None` when the transfer is over, and
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
    pub fn announce_guest(&mut self) {
        if !self.follows() {
            self.announcer.start(self.now_ns);
        }
    }

    /// A frame from the guest's own address came from the network: another host sends as the guest,
    /// and the switches look for the guest there now.
    pub fn guest_is_elsewhere(&mut self, now_ns: u64) {
        if !self.follows() {
            self.announcer.again(now_ns);
        }
    }

    /// Whether a frame that came here may be one for the guest's old place.
    #[must_use]
    pub fn takes_strays(&self, now_ns: u64) -> bool {
        now_ns < self.strays_until_ns
    }

    /// Frames for the guest came here although the other host is active.
    pub fn strays(&mut self, now_ns: u64, frames: Vec<Vec<u8>>) {
        // Few enough for one message, whatever their length.
        let mut frames = frames.into_iter().peekable();
        while frames.peek().is_some() {
            let some = frames.by_ref().take(STRAYS_MAX).collect();
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
}

#[cfg(test)]
mod proof_tests;
#[cfg(test)]
mod resume_tests;
#[cfg(test)]
mod tests;
