//! The order in which a run's inputs are asked for: [`Inputs`] puts together what a role has of the
//! sources.

use ftvmm_devices::Input;
use ftvmm_host::profile::{self, Phase};
use ftvmm_machine::situation::{RunMode, RunSituation, StopCause};
use ftvmm_replication::{Check, GuestNs, Ordinal, StatePart};

use crate::input::{FileFeed, LiveInputs, Recorder, Recording, Replay};
use crate::input_error::InputError;
use crate::peer::PairPort;
use crate::step::{Answer, InputSource, Standpoint, Step};
use crate::transfer::{Restore, TransferPort};

/// Where a guest's inputs come from when nothing comes first.
pub enum Source {
    /// The live host: its clock, its tap, its console. Of a pair, while this host is
    /// active.
    Live(Box<LiveInputs>),
    /// A recording.
    Recording(Box<Replay<FileFeed>>),
}

impl Source {
    fn next(&mut self, situation: &RunSituation) -> Result<Step, InputError> {
        match self {
            Self::Live(live) => live.next(situation),
            Self::Recording(log) => {
                let _log = profile::enter(Phase::Log);
                Ok(log.next(situation)?.unwrap_or(Step::Stop(StopCause::EndOfLog)))
            }
        }
    }
}

/// All inputs of one run.
pub struct Inputs {
    restore: Option<Restore>,
    pair: Option<PairPort>,
    transfer: Option<TransferPort>,
    source: Source,
    recorder: Option<Recorder>,
}

impl Inputs {
    /// Inputs from `source` alone.
    pub fn new(source: Source) -> Self {
        Self { restore: None, pair: None, transfer: None, source, recorder: None }
    }

    /// The guest is first put into the state of a snapshot.
    #[must_use]
    pub fn restored(mut self, restore: Option<Restore>) -> Self {
        self.restore = restore;
        self
    }

    /// The other host of a pair has the inputs while it is active.
    #[must_use]
    pub fn paired(mut self, pair: PairPort) -> Self {
        self.pair = Some(pair);
        self
    }

    /// The guest can be stopped for its state.
    #[must_use]
    pub fn transferable(mut self, transfer: Option<TransferPort>) -> Self {
        self.transfer = transfer;
        self
    }

    /// What the guest is given is written.
    #[must_use]
    pub fn recorded(mut self, recorder: Option<Recorder>) -> Self {
        self.recorder = recorder;
        self
    }

    /// The recording, to end it; the run is over.
    pub fn take_recording(&mut self) -> Option<Recording> {
        self.recorder.take().and_then(Recorder::into_recording)
    }

    /// The recording that is replayed.
    pub fn replayed(&mut self) -> Option<&mut Replay<FileFeed>> {
        match &mut self.source {
            Source::Live(_) => None,
            Source::Recording(log) => Some(log),
        }
    }

    /// The other host's part in the inputs.
    pub fn pair(&mut self) -> Option<&mut PairPort> {
        self.pair.as_mut()
    }

    fn follows(&self) -> bool {
        self.pair.as_ref().is_some_and(PairPort::follows)
    }

    /// What the other host of a pair says: a role that changes, or its log. `None` when this host's
    /// own inputs are to be asked.
    fn of_the_pair(&mut self, situation: &RunSituation) -> Result<Option<Step>, InputError> {
        let Some(pair) = &mut self.pair else { return Ok(None) };
        if let Some(step) = pair.change_roles() {
            return Ok(Some(step));
        }
        if !pair.follows() {
            return Ok(None);
        }
        let _log = profile::enter(Phase::Log);
        let step = pair.follow(situation)?;
        if step.is_none() {
            let (clock, last) = pair.take_over(situation);
            if let Source::Live(live) = &mut self.source {
                live.resume(clock, last);
            }
        }
        Ok(step)
    }

    fn measured(&mut self, at: Ordinal, check: Check) -> Result<(), InputError> {
        if let Some(pair) = self.pair.as_mut().filter(|pair| pair.follows()) {
            return pair.measured(at, &check);
        }
        if let Some(transfer) = &mut self.transfer {
            transfer.measured(at, &check);
        }
        match &mut self.source {
            Source::Live(_) => match &mut self.recorder {
                Some(recorder) => recorder.measured(at, check),
                None => Ok(()),
            },
            Source::Recording(log) => {
                // A check that differs is in the new recording too.
                if let Some(recorder) = &mut self.recorder {
                    recorder.measured(at, check.clone())?;
                }
                log.measured(at, &check)
            }
        }
    }

    fn has_restored(&mut self, part: &StatePart, stands: Option<Standpoint>) {
        if stands.is_some() {
            self.restore = None;
        }
        let follows = self.follows();
        if let Some(pair) = &mut self.pair {
            pair.restored(part, stands);
        }
        if let (Source::Live(live), Some(Standpoint { guest_ns, .. }), false) =
            (&mut self.source, stands, follows)
        {
            live.restored(GuestNs(guest_ns));
        }
    }
}

impl InputSource for Inputs {
    fn next(&mut self, situation: &RunSituation) -> Result<Step, InputError> {
        let _inputs = profile::enter(Phase::Inputs);
        // 1. The state of a snapshot, before the guest executes anything.
        if let Some(step) = self.restore.as_mut().map(Restore::next_step).transpose()?.flatten() {
            return Ok(step);
        }
        // 2. A change of roles, and the other host's log while this one follows.
        if let Some(step) = self.of_the_pair(situation)? {
            return Ok(step);
        }
        // 3. A transfer that looks at memory, or stops the guest for its state.
        if let Some(step) = self.transfer.as_mut().and_then(|port| port.wanted(situation)) {
            return Ok(step);
        }
        if let (Some(recorder), true) = (&mut self.recorder, situation.halted) {
            let _log = profile::enter(Phase::Log);
            recorder.idle()?;
        }
        // 4. The source: the live host or a recording.
        let mut step = self.source.next(situation)?;
        // 5. The recorder, which writes what the source says and adds its checks.
        if let Some(recorder) = &mut self.recorder {
            let _log = profile::enter(Phase::Log);
            step = recorder.record(situation, step)?;
        }
        if let Some(transfer) = &mut self.transfer {
            transfer.given(&step);
        }
        if let (Some(pair), Step::Apply(Input::Time { now_ns })) = (&mut self.pair, &step) {
            pair.keep_time(GuestNs(*now_ns));
        }
        Ok(step)
    }

    fn answer(&mut self, answer: Answer) -> Result<(), InputError> {
        match answer {
            Answer::Measured { at, check } => self.measured(at, check)?,
            Answer::Captured { at, parts } => {
                if let Some(transfer) = &mut self.transfer {
                    transfer.captured(at);
                }
                if let Some(recorder) = &mut self.recorder {
                    recorder.captured(at, parts)?;
                }
            }
            Answer::Saved(state) => {
                let at = state.at;
                let Some(transfer) = &mut self.transfer else { return Ok(()) };
                if let (Some(mark), Some(recorder)) = (transfer.saved(*state)?, &mut self.recorder)
                {
                    recorder.saved(at, mark)?;
                }
            }
            Answer::Restored { part, stands } => self.has_restored(&part, stands),
        }
        Ok(())
    }

    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        if self.restore.is_some() {
            return RunMode::Not;
        }
        if let Some(pair) = self.pair.as_mut().filter(|pair| pair.follows()) {
            return pair.run_mode(at);
        }
        match &mut self.source {
            Source::Live(live) => live.run_mode(at, interrupt_waits),
            Source::Recording(log) => log.run_mode(at),
        }
    }
}

#[cfg(test)]
mod tests;
