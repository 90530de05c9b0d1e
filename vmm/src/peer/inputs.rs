//! Inputs of one of two hosts: the other's log, or this host's own.

use std::sync::Arc;

use ftvmm_devices::Input;
use ftvmm_replication::{
    Check, CursorStep, DiskAnswer, Ordinal, PeerCore, SessionEvent, Slice, SnapshotMark, StatePart,
};

use super::Peer;
use super::disk::{Compared, compare};
use super::guest::Turn;
use crate::disk::Answer;
use crate::input::{GuestClock, InputError, LiveInputs, Recorded};
use crate::machine_state::MachineState;
use crate::run_loop::{InputSource, RunMode, Situation, Step, StopCause};
use crate::shipment::{ShippedInputs, put_on_disk};

/// Exits after which a backup that never waits says how far it is.
const REPORT_EVERY_EXITS: u64 = 256;

/// Inputs of one of two hosts: the other's log, or this host's own with a log beside it. The roles may change hands
/// at any time.
pub struct PairInputs<'a> {
    peer: Arc<Peer>,
    live: ShippedInputs<Recorded<'a, LiveInputs>>,
    is_live: bool,
    /// Guest time of the last sample, and host time when it was applied.
    clock: GuestClock,
    last_ns: u64,
    expected: Option<Box<Check>>,
    /// A request that ended in the log, while this host's disk is not done with it.
    awaited: Option<DiskAnswer>,
}

impl<'a> PairInputs<'a> {
    /// Inputs as `peer`'s session says; `live` are this host's own.
    pub fn new(peer: Arc<Peer>, live: ShippedInputs<Recorded<'a, LiveInputs>>) -> Self {
        let clock = GuestClock::anchored(peer.clock, peer.clock.host_now_ns(), 0);
        let is_live = !peer.follows();
        Self { peer, live, is_live, clock, last_ns: 0, expected: None, awaited: None }
    }

    fn fault(&self, at: Ordinal, what: String) -> Step {
        match self.peer.report_fault(format!("exit {at}: {what}")) {
            Some(_) => Step::Stop(StopCause::Protocol),
            None => Step::Again,
        }
    }

    /// The log is used up and sealed: this host's own inputs from now on.
    fn go_live(&mut self, situation: &Situation) -> Result<Step, InputError> {
        let through = situation.at.map_or(situation.last, |at| Ordinal(at.0.saturating_sub(1)));
        self.is_live = true;
        self.live.source().source().resume(self.clock, self.last_ns);
        self.peer.tell(|core, now_ns| core.took_over(now_ns, through));
        self.live.next(situation)
    }

    /// Lets the roles change, if they are to.
    fn take_turn(&mut self) -> Option<Step> {
        match self.peer.take_turn()? {
            Turn::Stopped => return Some(Step::Stop(StopCause::Protocol)),
            Turn::Follow if self.is_live => {
                self.is_live = false;
                self.expected = None;
            }
            Turn::Follow | Turn::Live => {}
        }
        None
    }

    fn keep_time(&mut self, now_ns: u64) {
        self.last_ns = now_ns;
        self.clock = GuestClock::anchored(self.peer.clock, self.peer.clock.host_now_ns(), now_ns);
    }

    /// The next part of the state this host is given that is for the guest; what is for the disk is put there.
    fn next_part(&mut self) -> Step {
        loop {
            let Some(part) = self.peer.next_part() else {
                return Step::Stop(StopCause::Protocol);
            };
            let disk = self.peer.disk.as_ref();
            if let Some(Err(error)) = disk.map(|disk| put_on_disk(disk, &part)) {
                self.peer.report_fault(format!("the disk cannot be copied: {error}"));
                return Step::Again;
            }
            if !matches!(part, StatePart::Blocks(_)) {
                return Step::PutState(part);
            }
            self.state_put(&part, None);
        }
    }

    /// Between two exits a follower looks for a slice, and for the end of the log.
    fn between_exits(&mut self, situation: &Situation) -> Result<Step, InputError> {
        let next = situation.last.next();
        let mut core = self.peer.lock();
        if core.stop().is_some() {
            return Ok(Step::Stop(StopCause::Protocol));
        }
        let cursor = core.follower().cursor();
        if cursor.has_slice(next)
            && let CursorStep::Load(parts) = cursor.next(next)
        {
            return Ok(Step::Load(parts));
        }
        // A guest that computes may not make an exit for long.
        if cursor.is_used_up(next) {
            drop(core);
            return self.go_live(situation);
        }
        Ok(Step::Proceed)
    }

    /// Gives the guest what both disks say.
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

    fn follow(&mut self, situation: &Situation) -> Result<Step, InputError> {
        if self.peer.lock().is_joining() {
            self.awaited = None;
            return Ok(self.next_part());
        }
        let Some(at) = situation.at else { return self.between_exits(situation) };
        let before = Ordinal(at.0.saturating_sub(1));
        loop {
            match self.ask(at, before) {
                Asked::Stopped => return Ok(Step::Stop(StopCause::Protocol)),
                Asked::Joins => return Ok(Step::Again),
                Asked::Answered(own, primary) => {
                    self.awaited = None;
                    return Ok(self.answer(at, own, primary));
                }
                Asked::Log(CursorStep::ApplyDisk(answer)) => self.awaited = Some(answer),
                Asked::Log(CursorStep::Apply(input)) => {
                    if let Input::Time { now_ns } = input {
                        self.keep_time(now_ns);
                    }
                    return Ok(Step::Apply(input));
                }
                Asked::Log(CursorStep::Proceed) => return Ok(Step::Proceed),
                Asked::Log(CursorStep::Load(parts)) => return Ok(Step::Load(parts)),
                Asked::Log(CursorStep::Check(check)) => {
                    let memory = check.memory_look();
                    self.expected = Some(check);
                    return Ok(Step::Measure { memory });
                }
                Asked::Log(CursorStep::Missed { record, .. }) => {
                    return Ok(self.fault(at, format!("went past the primary's '{record}'")));
                }
                Asked::Log(CursorStep::End(_)) => return Ok(Step::Stop(StopCause::EndOfLog)),
                Asked::Log(CursorStep::Exhausted) => return self.go_live(situation),
                Asked::Log(CursorStep::Wait) => {}
            }
        }
    }

    /// What the log wants at exit `at`, or what else there is. Before it waits, the primary is told
    /// how far this host is.
    fn ask(&self, at: Ordinal, before: Ordinal) -> Asked {
        let (disk, awaited) = (self.peer.disk.as_ref(), self.awaited);
        let ask = |core: &mut PeerCore| {
            if core.stop().is_some() {
                return Some(Asked::Stopped);
            }
            if core.is_joining() {
                return Some(Asked::Joins);
            }
            if let Some(primary) = awaited {
                let own = disk.and_then(|disk| disk.take(primary.id));
                return own.map(|own| Asked::Answered(own, primary));
            }
            match core.follower().cursor().next(at) {
                CursorStep::Wait => None,
                step => Some(Asked::Log(step)),
            }
        };
        let at_once = self.peer.tell(|core, now_ns| {
            if before.0 >= core.follower().reported().0 + REPORT_EVERY_EXITS {
                core.executed(now_ns, before);
            }
            let asked = ask(core);
            if asked.is_none() {
                core.executed(now_ns, before);
            }
            asked
        });
        at_once.unwrap_or_else(|| self.peer.ask_as_guest(|core, _| ask(core)))
    }

    /// After the guest ended by itself: what the primary's guest did at `at`, the first exit this one did not
    /// get past. `None` when it ended too or is gone.
    pub fn primary_went_on(&mut self, at: Ordinal) -> Option<String> {
        if self.is_live {
            return None;
        }
        self.peer.ask_as_guest(|core, _| match core.stop() {
            Some(_) => Some(None),
            None => match core.follower().cursor().next(at) {
                CursorStep::End(_) | CursorStep::Exhausted => Some(None),
                CursorStep::Wait => None,
                _ => Some(Some(format!("exit {at}: the guest ended, the primary's went on"))),
            },
        })
    }
}

/// What a follower learns at an exit.
enum Asked {
    /// The session is over.
    Stopped,
    /// A whole state comes.
    Joins,
    /// This host's disk has answered the request that ended in the log.
    Answered(Answer, DiskAnswer),
    /// What the log wants.
    Log(CursorStep),
}

impl InputSource for PairInputs<'_> {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        if let Some(step) = self.take_turn() {
            return Ok(step);
        }
        if !self.is_live {
            return self.follow(situation);
        }
        let step = self.live.next(situation)?;
        if let Step::Apply(Input::Time { now_ns }) = step {
            self.keep_time(now_ns);
        }
        Ok(step)
    }

    fn measured(&mut self, at: Ordinal, check: Check) -> Result<(), InputError> {
        if self.is_live {
            return self.live.measured(at, check);
        }
        if let Some(what) = self.expected.take().and_then(|theirs| check.difference(&theirs)) {
            // The run ends when the protocol has decided so, at the next question.
            self.fault(at, format!("this host differs from the primary: {what}"));
        }
        Ok(())
    }

    fn captured(&mut self, at: Ordinal, parts: Vec<Slice>) -> Result<(), InputError> {
        self.live.captured(at, parts)
    }

    fn state_taken(&mut self, state: MachineState) -> Result<(), InputError> {
        self.live.state_taken(state)
    }

    fn saved(&mut self, at: Ordinal, mark: SnapshotMark) -> Result<(), InputError> {
        self.live.saved(at, mark)
    }

    fn state_put(&mut self, part: &StatePart, stands: Option<(Ordinal, u64)>) {
        // A host that speaks for the guest is given a state by a snapshot only.
        if self.is_live {
            if let Some((_, now_ns)) = stands {
                self.keep_time(now_ns);
                self.peer.tell(|core, _| core.guest_is_here());
            }
            return self.live.state_put(part, stands);
        }
        let gauge = &self.peer.sending.gauge;
        gauge.take(part);
        if stands.is_some() {
            gauge.end();
        }
        let (part_bytes, at) = (part.len_bytes(), stands.map(|(at, _)| at));
        self.peer.tell(|core, now_ns| core.part_restored(now_ns, part_bytes, at));
        if let Some((_, now_ns)) = stands {
            // What the guest had not had of its disk came with the state.
            self.peer.queue.disk_answered();
            self.keep_time(now_ns);
        }
    }

    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        if self.is_live {
            return self.live.run_mode(at, interrupt_waits);
        }
        self.peer.queue.leave_exit(at);
        let mut core = self.peer.lock();
        let follower = core.follower();
        match follower.is_joining() || follower.cursor().has_slice(at.next()) {
            true => RunMode::Not,
            false => RunMode::Free,
        }
    }
}
