//! The inputs of a pair: which of the two hosts is active, and the other host's log while this host
//! follows.

use std::sync::Arc;

use ftvmm_machine::disk_completion::Completion;
use ftvmm_machine::situation::{RunMode, RunSituation, StopCause};
use ftvmm_replication::{
    Check, DiskAnswer, GuestClock, GuestNs, Ordinal, PeerCore, ReplayStep, Replayer, SessionEvent,
    StatePart,
};

use super::Peer;
use super::disk::{Compared, compare};
use super::guest::RoleChange;
use crate::input::{Divergence, Fed, Feed, Replay};
use crate::input_error::InputError;
use crate::step::{Standpoint, Step};
use crate::transfer::put_on_disk;

/// The roles of a pair, which may change at any exit, and the log of the other host.
pub struct PairPort {
    peer: Arc<Peer>,
    log: Replay<PeerFeed>,
    follows: bool,
    /// Guest time of the last sample, and host time when it was applied.
    clock: GuestClock,
    last: GuestNs,
}

impl PairPort {
    /// Inputs as `peer`'s session says.
    pub fn new(peer: Arc<Peer>) -> Self {
        let clock = GuestClock::anchored(peer.clocks.guest.host_now(), GuestNs(0));
        let follows = peer.lock().follower().is_active();
        let log = Replay::new(PeerFeed { peer: peer.clone() });
        Self { peer, log, follows, clock, last: GuestNs(0) }
    }

    /// Whether inputs come from the other host's log.
    pub fn follows(&self) -> bool {
        self.follows
    }

    /// Carries out a change of roles if one is due.
    pub fn change_roles(&mut self) -> Option<Step> {
        match self.peer.change_role()? {
            RoleChange::Stopped => return Some(Step::Stop(StopCause::Protocol)),
            RoleChange::Follow { through } if !self.follows => {
                self.follows = true;
                self.log.parts().1.start_after(through);
            }
            RoleChange::Follow { .. } | RoleChange::Live => {}
        }
        None
    }

    /// The next step while this host follows. `None` when the log is used up and sealed: from now
    /// on this host's own inputs count.
    ///
    /// # Errors
    /// None of its own.
    pub fn follow(&mut self, situation: &RunSituation) -> Result<Option<Step>, InputError> {
        self.log.next(situation)
    }

    /// This host is active from now on. The clock its inputs go on with, and the guest
    /// time the guest has seen.
    pub fn take_over(&mut self, situation: &RunSituation) -> (GuestClock, GuestNs) {
        let through = situation.at.map_or(situation.last, Ordinal::previous);
        self.follows = false;
        self.peer.tell(|core, now_ns| core.took_over(now_ns, through));
        (self.clock, self.last)
    }

    /// The guest was told this guest time.
    pub fn keep_time(&mut self, last: GuestNs) {
        self.last = last;
        self.clock = GuestClock::anchored(self.peer.clocks.guest.host_now(), last);
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
        // An active host is given a state by a snapshot only.
        if self.follows {
            self.peer.has_restored(part, stands.is_some());
        } else if stands.is_some() {
            self.peer.tell(|core, _| core.announce_guest());
        }
        let Some(Standpoint { at, guest_ns }) = stands else { return };
        self.keep_time(GuestNs(guest_ns));
        if self.follows {
            // Pending disk completions came with the state.
            self.peer.queue.disk_completed();
            self.log.parts().1.start_after(at.previous());
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

    /// The next part of the state that is for the guest. Parts for the disk are written to it here.
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

    /// Compares the completions of both disks and gives the guest the result.
    fn answer(&self, at: Ordinal, own: Completion, primary: DiskAnswer) -> Step {
        match compare(own, primary) {
            Compared::Apply(input) => Step::Apply(input),
            Compared::Failed { description } => {
                let id = primary.id;
                let what = description.clone();
                self.peer.step(SessionEvent::DiskFailed { id, description });
                match self.peer.stopped() {
                    Some(_) => Step::Stop(StopCause::Protocol),
                    // The primary is gone, and its guest got another completion.
                    None => self.fault(at, what),
                }
            }
            Compared::Differ { description } => self.fault(at, description),
        }
    }

    /// Returns what `ask` returns. While that is `None` the guest waits, and the primary is told
    /// that it has left exit `left`.
    fn ask<T>(
        &self,
        replayer: &mut Replayer,
        left: Ordinal,
        mut ask: impl FnMut(&mut Replayer, &mut PeerCore) -> Option<T>,
    ) -> Result<T, Step> {
        let mut asked = |replayer: &mut Replayer, core: &mut PeerCore| {
            if core.stop().is_some() {
                return Some(Err(Step::Stop(StopCause::Protocol)));
            }
            if core.is_joining() {
                return Some(Err(Step::Again));
            }
            ask(replayer, core).map(Ok)
        };
        let at_once = self.peer.tell(|core, now_ns| {
            let report = |replayer: &mut Replayer, core: &mut PeerCore, waits| {
                if replayer.report_is_due(left, waits) {
                    core.step(now_ns, SessionEvent::Executed(left));
                }
            };
            report(replayer, core, false);
            let answer = asked(replayer, core);
            if answer.is_none() {
                report(replayer, core, true);
            }
            answer
        });
        at_once.unwrap_or_else(|| self.peer.wait_as_guest(|core, _| asked(replayer, core)))
    }

    fn primary_went_on(&self, replayer: &mut Replayer, at: Ordinal) -> bool {
        self.peer.wait_as_guest(|core, _| match core.stop() {
            Some(_) => Some(false),
            None => replayer.recorder_went_on(core.follower().cursor(), at),
        })
    }
}

impl Feed for PeerFeed {
    fn next(
        &mut self,
        replayer: &mut Replayer,
        situation: &RunSituation,
    ) -> Result<Fed, InputError> {
        if self.peer.lock().is_joining() {
            return Ok(Fed::First(self.next_part()));
        }
        let asked = match situation.at {
            Some(at) => self.ask(replayer, at.previous(), |replayer, core| {
                Some(replayer.at_exit(core.follower().cursor(), at))
                    .filter(|step| !matches!(step, ReplayStep::Wait))
            }),
            None => {
                let mut core = self.peer.lock();
                match core.stop() {
                    Some(_) => Err(Step::Stop(StopCause::Protocol)),
                    None => Ok(replayer.between_exits(core.follower().cursor(), situation.last)),
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
        // Without the request the completion would never come.
        if !self.peer.disk.as_ref().is_some_and(|disk| disk.has_request(answer.id)) {
            let id = answer.id;
            return Ok(self.fault(at, format!("disk request {id} was never made here")));
        }
        let own = self.ask(replayer, at.previous(), |_, _| {
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
        let mut core = self.peer.lock();
        core.is_joining() || core.follower().cursor().has_slice(at)
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;
    use ftvmm_replication::{Event, Group, Record, Slice};

    use super::*;
    use crate::peer::tests::backup;

    /// A backup that was sent a log through exit `horizon`.
    fn follower(horizon: u64, records: Vec<(u64, Event)>) -> PairPort {
        let peer = backup(None);
        let record = |(at, event)| Record { at: Ordinal(at), event };
        let records = records.into_iter().map(record).collect();
        let group = Group { horizon: Ordinal(horizon), records };
        peer.lock().follower().cursor().push_group(group).unwrap();
        PairPort::new(peer)
    }

    fn at(at: u64) -> RunSituation {
        RunSituation { at: Some(Ordinal(at)), last: Ordinal(at), ..RunSituation::default() }
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
        let between = RunSituation { last: Ordinal(3), ..RunSituation::default() };
        assert!(matches!(pair.follow(&between), Ok(Some(Step::Load(_)))));
    }

    #[test]
    fn a_log_that_is_used_up_is_this_hosts_turn_also_between_exits() {
        let mut pair = follower(3, vec![]);
        let between = RunSituation { last: Ordinal(3), ..RunSituation::default() };
        assert!(matches!(pair.follow(&between), Ok(Some(Step::Proceed))), "more may come");
        pair.peer.lock().follower().cursor().seal();
        assert!(matches!(pair.follow(&between), Ok(None)));
        assert!(matches!(pair.follow(&at(4)), Ok(None)));
        assert!(matches!(pair.follow(&at(3)), Ok(Some(Step::Proceed))));
    }

    #[test]
    fn the_primary_went_on_where_its_log_goes_on() {
        let mut pair = follower(6, vec![]);
        let what = pair.primary_went_on(Ordinal(6)).unwrap();
        assert_eq!(what, "exit 6: the guest ended, the primary's went on");
        pair.peer.lock().follower().cursor().seal();
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
