//! Inputs of one of two hosts: the other's log, or this host's own.

use std::sync::Arc;
use std::sync::atomic::Ordering as MemoryOrdering;

use ftvmm_devices::Input;
use ftvmm_replication::{
    Check, CursorStep, DiskAnswer, GuestClock, GuestNs, Ordinal, SessionEvent, Slice, SnapshotMark,
    StatePart,
};

use super::Peer;
use super::disk::{Compared, compare};
use crate::disk::Answer;
use crate::input::{InputError, LiveInputs, Recorded};
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
    reported: Ordinal,
    expected: Option<Box<Check>>,
    /// A request that ended in the log, while this host's disk is not done with it.
    awaited: Option<DiskAnswer>,
}

impl<'a> PairInputs<'a> {
    /// Inputs as `peer`'s session says; `live` are this host's own.
    pub fn new(peer: Arc<Peer>, live: ShippedInputs<Recorded<'a, LiveInputs>>) -> Self {
        let clock = GuestClock::anchored(peer.clock.host_now(), GuestNs(0));
        let is_live = !peer.follows();
        let (reported, expected, awaited) = (Ordinal(0), None, None);
        Self { peer, live, is_live, clock, last_ns: 0, reported, expected, awaited }
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
        self.live.source().source().resume(self.clock, GuestNs(self.last_ns));
        let mut state = self.peer.lock();
        self.peer.step_locked(&mut state, SessionEvent::TookOver { through });
        state.took_over(self.peer.clock.host_now_ns());
        drop(state);
        self.live.next(situation)
    }

    /// Lets the roles change, if they are to.
    fn take_turn(&mut self) -> Option<Step> {
        if !self.peer.turn.swap(false, MemoryOrdering::AcqRel) {
            return None;
        }
        let mut state = self.peer.lock();
        if std::mem::take(&mut state.yield_wanted) && state.session.may_yield() {
            self.peer.send_log(&mut state);
            let through = state.horizon;
            let since_ns = self.peer.clock.host_now_ns();
            self.peer.step_locked(&mut state, SessionEvent::Yield { through });
            while state.session.is_yielding() && state.stop.is_none() {
                state = self.peer.wait_as_guest(state);
            }
            let stood_ms = (self.peer.clock.host_now_ns() - since_ns) as f64 / 1e6;
            tracing::info!(stood_ms, "the guest stood still for a change of roles");
        }
        if state.stop.is_some() {
            return Some(Step::Stop(StopCause::Protocol));
        }
        if state.follows() && self.is_live {
            self.is_live = false;
            self.reported = state.horizon;
            self.expected = None;
        }
        None
    }

    fn report(&mut self, through: Ordinal) {
        if through > self.reported {
            self.reported = through;
            self.peer.step(SessionEvent::Executed(through));
        }
    }

    fn keep_time(&mut self, now_ns: u64) {
        self.last_ns = now_ns;
        self.clock = GuestClock::anchored(self.peer.clock.host_now(), GuestNs(now_ns));
    }

    /// The next part of the state this host is given that is for the guest; what is for the disk is put there.
    fn next_part(&mut self) -> Step {
        loop {
            let mut state = self.peer.lock();
            if state.stop.is_some() {
                return Step::Stop(StopCause::Protocol);
            }
            let Some(part) = state.incoming.pop_front() else {
                drop(self.peer.wait_as_guest(state));
                continue;
            };
            drop(state);
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
        let mut state = self.peer.lock();
        if state.stop.is_some() {
            return Ok(Step::Stop(StopCause::Protocol));
        }
        let next = situation.last.next();
        if state.cursor.has_slice(next)
            && let CursorStep::Load(parts) = state.cursor.next(next)
        {
            return Ok(Step::Load(parts));
        }
        // A guest that computes may not make an exit for long.
        if state.cursor.is_used_up(next) {
            drop(state);
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
        if self.peer.lock().joining {
            self.awaited = None;
            return Ok(self.next_part());
        }
        let Some(at) = situation.at else { return self.between_exits(situation) };
        let before = Ordinal(at.0.saturating_sub(1));
        if before.0 >= self.reported.0 + REPORT_EVERY_EXITS {
            self.report(before);
        }
        loop {
            let mut state = self.peer.lock();
            if state.stop.is_some() {
                return Ok(Step::Stop(StopCause::Protocol));
            }
            if state.joining {
                return Ok(Step::Again);
            }
            if let Some(primary) = self.awaited {
                if let Some(own) = self.peer.disk.as_ref().and_then(|disk| disk.take(primary.id)) {
                    self.awaited = None;
                    drop(state);
                    return Ok(self.answer(at, own, primary));
                }
                if before > self.reported {
                    drop(state);
                    self.report(before);
                } else {
                    drop(self.peer.wait_as_guest(state));
                }
                continue;
            }
            match state.cursor.next(at) {
                CursorStep::ApplyDisk(answer) => self.awaited = Some(answer),
                CursorStep::Apply(input) => {
                    drop(state);
                    if let Input::Time { now_ns } = input {
                        self.keep_time(now_ns);
                    }
                    return Ok(Step::Apply(input));
                }
                CursorStep::Proceed => return Ok(Step::Proceed),
                CursorStep::Load(parts) => return Ok(Step::Load(parts)),
                CursorStep::Check(check) => {
                    let memory = check.memory_look();
                    self.expected = Some(check);
                    return Ok(Step::Measure { memory });
                }
                CursorStep::Missed { record, .. } => {
                    drop(state);
                    return Ok(self.fault(at, format!("went past the primary's '{record}'")));
                }
                CursorStep::End(_) => return Ok(Step::Stop(StopCause::EndOfLog)),
                CursorStep::Exhausted => {
                    drop(state);
                    return self.go_live(situation);
                }
                CursorStep::Wait if before > self.reported => {
                    drop(state);
                    self.report(before);
                }
                CursorStep::Wait => drop(self.peer.wait_as_guest(state)),
            }
        }
    }

    /// After the guest ended by itself: what the primary's guest did at `at`, the first exit this one did not
    /// get past. `None` when it ended too or is gone.
    pub fn primary_went_on(&mut self, at: Ordinal) -> Option<String> {
        if self.is_live {
            return None;
        }
        loop {
            let mut state = self.peer.lock();
            if state.stop.is_some() {
                return None;
            }
            match state.cursor.next(at) {
                CursorStep::End(_) | CursorStep::Exhausted => return None,
                CursorStep::Wait => drop(self.peer.wait_as_guest(state)),
                _ => return Some(format!("exit {at}: the guest ended, the primary's went on")),
            }
        }
    }
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
                self.peer.lock().guest_is_here();
            }
            return self.live.state_put(part, stands);
        }
        self.peer.gauge.take(part);
        if stands.is_some() {
            self.peer.gauge.end();
        }
        let mut state = self.peer.lock();
        state.taken_bytes += part.len_bytes();
        let taken_bytes = state.taken_bytes;
        if stands.is_some() {
            state.joining = false;
        }
        self.peer.step_locked(&mut state, SessionEvent::StateTaken { taken_bytes });
        drop(state);
        if let Some((at, now_ns)) = stands {
            // What the guest had not had of its disk came with the state.
            self.peer.queue.disk_answered();
            self.reported = Ordinal(at.0.saturating_sub(1));
            self.keep_time(now_ns);
        }
    }

    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        if self.is_live {
            return self.live.run_mode(at, interrupt_waits);
        }
        self.peer.queue.leave_exit(at);
        let state = self.peer.lock();
        match state.joining || state.cursor.has_slice(at.next()) {
            true => RunMode::Not,
            false => RunMode::Free,
        }
    }
}
