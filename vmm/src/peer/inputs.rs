//! A pair's part in where inputs come from: which of the two hosts speaks for the guest, and the
//! log of the other one while this host follows.

use std::sync::Arc;
use std::sync::atomic::Ordering as MemoryOrdering;

use ftvmm_replication::{
    Check, DiskAnswer, Ordinal, ReplayStep, Replayer, SessionEvent, StatePart,
};

use super::Peer;
use super::disk::{Compared, compare};
use super::state::State;
use crate::disk::Answer;
use crate::input::{Divergence, Fed, Feed, GuestClock, Replay};
use crate::input_error::InputError;
use crate::shipment::put_on_disk;
use crate::step::{RunMode, Situation, Standpoint, Step, StopCause};

/// The roles of a pair, which may change hands at any time, and the log of the other host.
pub struct PairPort {
    peer: Arc<Peer>,
    log: Replay<PeerFeed>,
    follows: bool,
    /// Guest time of the last sample, and host time when it was applied.
    clock: GuestClock,
    last_ns: u64,
}

impl PairPort {
    /// Inputs as `peer`'s session says.
    pub fn new(peer: Arc<Peer>) -> Self {
        let clock = GuestClock::anchored(peer.clock, peer.clock.host_now_ns(), 0);
        let follows = peer.follows();
        let log = Replay::new(PeerFeed { peer: peer.clone() });
        Self { peer, log, follows, clock, last_ns: 0 }
    }

    /// Whether inputs come from the other host's log.
    pub fn follows(&self) -> bool {
        self.follows
    }

    /// Lets the roles change, if they are to.
    pub fn change_roles(&mut self) -> Option<Step> {
        if !self.peer.turn.swap(false, MemoryOrdering::AcqRel) {
            return None;
        }
        let Turn { stopped, follows, through } = self.peer.take_turn();
        if stopped {
            return Some(Step::Stop(StopCause::Protocol));
        }
        if follows && !self.follows {
            self.follows = true;
            self.log.parts().1.start_after(through);
        }
        None
    }

    /// The next thing to do while this host follows; `None` when the log is used up and sealed:
    /// this host's own inputs from now on.
    ///
    /// # Errors
    /// None of its own.
    pub fn follow(&mut self, situation: &Situation) -> Result<Option<Step>, InputError> {
        self.log.next(situation)
    }

    /// This host speaks for the guest from now on. The clock its inputs go on with, and the guest
    /// time the guest has seen.
    pub fn take_over(&mut self, situation: &Situation) -> (GuestClock, u64) {
        let through = situation.at.map_or(situation.last, |at| Ordinal(at.0.saturating_sub(1)));
        self.follows = false;
        self.peer.took_over(through);
        (self.clock, self.last_ns)
    }

    /// The guest was told this guest time.
    pub fn keep_time(&mut self, now_ns: u64) {
        self.last_ns = now_ns;
        self.clock = GuestClock::anchored(self.peer.clock, self.peer.clock.host_now_ns(), now_ns);
    }

    /// The execution of a follower was measured.
    ///
    /// # Errors
    /// None of its own.
    pub fn measured(&mut self, at: Ordinal, check: &Check) -> Result<(), InputError> {
        self.log.measured(at, check)
    }

    /// A part of a state is in place.
    pub fn restored(&mut self, part: &StatePart, stands: Option<Standpoint>) {
        // A host that speaks for the guest is given a state by a snapshot only.
        if self.follows {
            self.peer.has_restored(part, stands.is_some());
        } else if stands.is_some() {
            self.peer.lock().guest_is_here();
        }
        let Some(Standpoint { at, guest_ns }) = stands else { return };
        self.keep_time(guest_ns);
        if self.follows {
            // What the guest had not had of its disk came with the state.
            self.peer.queue.disk_answered();
            self.log.parts().1.start_after(Ordinal(at.0.saturating_sub(1)));
        }
    }

    /// How far a follower may run from exit `at` on.
    pub fn run_mode(&mut self, at: Ordinal) -> RunMode {
        self.peer.queue.leave_exit(at);
        self.log.run_mode(at)
    }

    /// After the guest ended by itself: what the primary's guest did at `at`, the first exit this
    /// one did not get past. `None` when it ended too or is gone.
    pub fn primary_went_on(&mut self, at: Ordinal) -> Option<String> {
        let (feed, replayer) = self.log.parts();
        let went_on = self.follows && feed.primary_went_on(replayer, at);
        went_on.then(|| format!("exit {at}: the guest ended, the primary's went on"))
    }
}

/// The log of the other host, as it comes.
pub struct PeerFeed {
    peer: Arc<Peer>,
}

impl PeerFeed {
    fn fault(&self, at: Ordinal, what: String) -> Step {
        match self.peer.report_fault(format!("exit {at}: {what}")) {
            Some(_) => Step::Stop(StopCause::Protocol),
            None => Step::Again,
        }
    }

    /// The next part of the state this host is given that is for the guest; what is for the disk is
    /// put there.
    fn next_part(&self) -> Step {
        loop {
            let Some(part) = self.peer.next_part() else { return Step::Stop(StopCause::Protocol) };
            let disk = self.peer.disk.as_ref();
            if let Some(Err(error)) = disk.map(|disk| put_on_disk(disk, &part)) {
                self.peer.report_fault(format!("the disk cannot be copied: {error}"));
                return Step::Again;
            }
            if !matches!(part, StatePart::Blocks(_)) {
                return Step::RestoreState(part);
            }
            self.peer.has_restored(&part, false);
        }
    }

    /// Tells the guest what both disks say.
    fn answer(&self, at: Ordinal, own: Answer, primary: DiskAnswer) -> Step {
        match compare(own, primary) {
            Compared::Apply(input) => Step::Apply(input),
            Compared::Failed { description } => {
                let id = primary.id;
                let what = description.clone();
                self.peer.step(SessionEvent::DiskFailed { id, description });
                match self.peer.stopped() {
                    Some(_) => Step::Stop(StopCause::Protocol),
                    // The primary is gone, and its guest was told another thing.
                    None => self.fault(at, what),
                }
            }
            Compared::Differ { description } => self.fault(at, description),
        }
    }

    /// What `ask` says under the peer's lock. While it says nothing the guest waits, and the
    /// primary is told how far it is: it has left `left`.
    fn ask<T>(
        &self,
        replayer: &mut Replayer,
        left: Ordinal,
        mut ask: impl FnMut(&mut Replayer, &mut State) -> Option<T>,
    ) -> Result<T, Step> {
        if replayer.report_is_due(left, false) {
            self.peer.step(SessionEvent::Executed(left));
        }
        loop {
            let mut state = self.peer.lock();
            if state.stop.is_some() {
                return Err(Step::Stop(StopCause::Protocol));
            }
            if state.joining {
                return Err(Step::Again);
            }
            if let Some(answer) = ask(replayer, &mut state) {
                return Ok(answer);
            }
            if replayer.report_is_due(left, true) {
                drop(state);
                self.peer.step(SessionEvent::Executed(left));
            } else {
                drop(self.peer.wait_as_guest(state));
            }
        }
    }

    fn primary_went_on(&self, replayer: &mut Replayer, at: Ordinal) -> bool {
        loop {
            let mut state = self.peer.lock();
            if state.stop.is_some() {
                return false;
            }
            match replayer.recorder_went_on(&mut state.cursor, at) {
                Some(went_on) => return went_on,
                None => drop(self.peer.wait_as_guest(state)),
            }
        }
    }
}

impl Feed for PeerFeed {
    fn next(&mut self, replayer: &mut Replayer, situation: &Situation) -> Result<Fed, InputError> {
        if self.peer.lock().joining {
            return Ok(Fed::First(self.next_part()));
        }
        let asked = match situation.at {
            Some(at) => self.ask(replayer, left_before(at), |replayer, state| {
                Some(replayer.at_exit(&mut state.cursor, at))
                    .filter(|step| !matches!(step, ReplayStep::Wait))
            }),
            None => {
                let mut state = self.peer.lock();
                match state.stop {
                    Some(_) => Err(Step::Stop(StopCause::Protocol)),
                    None => Ok(replayer.between_exits(&mut state.cursor, situation.last)),
                }
            }
        };
        Ok(asked.map_or_else(Fed::First, Fed::Log))
    }

    fn compare_disk(
        &mut self,
        replayer: &mut Replayer,
        at: Ordinal,
        answer: DiskAnswer,
    ) -> Result<Step, InputError> {
        let own = self.ask(replayer, left_before(at), |_, _| {
            self.peer.disk.as_ref().and_then(|disk| disk.take(answer.id))
        });
        Ok(own.map_or_else(|step| step, |own| self.answer(at, own, answer)))
    }

    fn diverged(&mut self, at: Ordinal, how: Divergence) -> Result<Step, InputError> {
        let what = match how {
            Divergence::Missed(record) => format!("went past the primary's '{record}'"),
            Divergence::Check(what) => format!("this host differs from the primary: {what}"),
        };
        Ok(self.fault(at, what))
    }

    fn has_slice(&mut self, at: Ordinal) -> bool {
        let state = self.peer.lock();
        state.joining || state.cursor.has_slice(at)
    }
}

/// The last exit that a guest at exit `at` has left.
fn left_before(at: Ordinal) -> Ordinal {
    Ordinal(at.0.saturating_sub(1))
}

/// What a turn of the roles came to.
struct Turn {
    stopped: bool,
    follows: bool,
    /// The log is complete up to here.
    through: Ordinal,
}

/// All that touches the peer's state here.
impl Peer {
    /// Yields the guest to the other host, if that is wanted, and waits until it is decided who
    /// speaks for it.
    fn take_turn(self: &Arc<Self>) -> Turn {
        let mut state = self.lock();
        if std::mem::take(&mut state.yield_wanted) && state.session.may_yield() {
            self.send_log(&mut state);
            let through = state.horizon;
            let since_ns = self.clock.host_now_ns();
            self.step_locked(&mut state, SessionEvent::Yield { through });
            while state.session.is_yielding() && state.stop.is_none() {
                state = self.wait_as_guest(state);
            }
            let stood_ms = (self.clock.host_now_ns() - since_ns) as f64 / 1e6;
            tracing::info!(stood_ms, "the guest stood still for a change of roles");
        }
        Turn { stopped: state.stop.is_some(), follows: state.follows(), through: state.horizon }
    }

    /// The guest has left exit `through` and goes on with this host's own inputs.
    fn took_over(self: &Arc<Self>, through: Ordinal) {
        let mut state = self.lock();
        self.step_locked(&mut state, SessionEvent::TookOver { through });
        state.took_over(self.clock.host_now_ns());
    }

    /// The next part of the state that is to be put in place first; `None` when the session is
    /// over.
    fn next_part(&self) -> Option<StatePart> {
        let mut state = self.lock();
        loop {
            if state.stop.is_some() {
                return None;
            }
            match state.incoming.pop_front() {
                Some(part) => return Some(part),
                None => state = self.wait_as_guest(state),
            }
        }
    }

    /// A part of the other host's state is in place; with the last one this host has it whole.
    fn has_restored(self: &Arc<Self>, part: &StatePart, whole: bool) {
        self.gauge.take(part);
        if whole {
            self.gauge.end();
        }
        let mut state = self.lock();
        state.taken_bytes += part.len_bytes();
        let taken_bytes = state.taken_bytes;
        if whole {
            state.joining = false;
        }
        self.step_locked(&mut state, SessionEvent::StateTaken { taken_bytes });
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use ftvmm_devices::Input;
    use ftvmm_replication::session::policy::Role;
    use ftvmm_replication::{Event, Group, Record, SessionConfig, Slice, Term};

    use super::*;
    use crate::host::{FileWitness, resting_timer};
    use crate::input::LiveQueue;
    use crate::peer::PeerConfig;

    /// A backup that was sent a log through exit `horizon`.
    fn follower(horizon: u64, records: Vec<(u64, Event)>) -> PairPort {
        let fingerprint = crate::snapshot::tests::header().fingerprint;
        let queue = LiveQueue::new(resting_timer().unwrap(), Duration::from_millis(1));
        let config = PeerConfig {
            session: SessionConfig::new(Role::Backup, fingerprint, Term(0), 0),
            witness: Box::new(FileWitness::new(PathBuf::from("/nowhere"))),
            holder: "test".into(),
            tap: None,
            net_mac: None,
            queue: Arc::new(queue),
            disk: None,
            disk_failover: false,
            horizon_ns: 0,
            incident_dir: PathBuf::from("/nowhere"),
            unrecorded_when_alone: false,
        };
        let peer = Peer::new(config).unwrap();
        let record = |(at, event)| Record { at: Ordinal(at), event };
        let records = records.into_iter().map(record).collect();
        peer.lock().cursor.push_group(Group { horizon: Ordinal(horizon), records }).unwrap();
        PairPort::new(peer)
    }

    fn at(at: u64) -> Situation {
        Situation { at: Some(Ordinal(at)), last: Ordinal(at), ..Situation::default() }
    }

    #[test]
    fn a_follower_does_what_the_log_says_and_stops_at_its_slices() {
        let time = Event::Input(Input::Time { now_ns: 10 });
        let slice = Event::Slice(Slice { pages: vec![], cpu: Some(vec![1]) });
        let mut pair = follower(3, vec![(3, time), (4, slice)]);
        assert!(pair.follows());
        assert_eq!(pair.run_mode(Ordinal(2)), RunMode::Free);
        let step = pair.follow(&at(3)).unwrap();
        assert!(matches!(step, Some(Step::Apply(Input::Time { now_ns: 10 }))), "{step:?}");
        assert!(matches!(pair.follow(&at(3)), Ok(Some(Step::Proceed))));
        assert_eq!(pair.run_mode(Ordinal(3)), RunMode::Not);
        let between = Situation { last: Ordinal(3), ..Situation::default() };
        assert!(matches!(pair.follow(&between), Ok(Some(Step::Load(_)))));
    }

    #[test]
    fn a_log_that_is_used_up_is_this_hosts_turn_also_between_exits() {
        let mut pair = follower(3, vec![]);
        let between = Situation { last: Ordinal(3), ..Situation::default() };
        assert!(matches!(pair.follow(&between), Ok(Some(Step::Proceed))), "more may come");
        pair.peer.lock().cursor.seal();
        assert!(matches!(pair.follow(&between), Ok(None)));
        assert!(matches!(pair.follow(&at(4)), Ok(None)));
        assert!(matches!(pair.follow(&at(3)), Ok(Some(Step::Proceed))));
    }

    #[test]
    fn the_primary_went_on_where_its_log_goes_on() {
        let mut pair = follower(6, vec![]);
        let what = pair.primary_went_on(Ordinal(6)).unwrap();
        assert_eq!(what, "exit 6: the guest ended, the primary's went on");
        pair.peer.lock().cursor.seal();
        assert_eq!(pair.primary_went_on(Ordinal(7)), None, "it is gone");
    }

    #[test]
    fn a_session_that_is_over_ends_the_run() {
        let mut pair = follower(3, vec![]);
        pair.peer.stop_now();
        assert!(matches!(pair.follow(&at(9)), Ok(Some(Step::Stop(StopCause::Protocol)))));
        assert!(matches!(pair.change_roles(), Some(Step::Stop(StopCause::Protocol))));
        assert!(pair.change_roles().is_none(), "said once");
    }
}
