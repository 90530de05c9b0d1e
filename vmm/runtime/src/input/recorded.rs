//! Writes every input that the guest is given to a log.

use ftvmm_host::WriteBehind;
use ftvmm_machine::situation::RunSituation;
use ftvmm_replication::{Check, Event, MemoryCheckMode, Ordinal, Record, Slice, SnapshotMark};

use super::file_log::FileLog;
use super::log_sink::LogSink;
use crate::input_error::InputError;
use crate::step::Step;

/// How often the recorder writes a check.
#[derive(Clone, Copy, Debug)]
pub struct CheckPlan {
    /// Exits between two checks of the exits and the processor; 0 for none.
    pub every_exits: u64,
    /// Exits between two checks of all memory as well; 0 for none.
    pub memory_every_exits: u64,
    /// No check before this exit.
    pub from: Ordinal,
    /// What a check of memory does. A replay must not renew the copy where the recorder did not.
    pub memory: MemoryCheckMode,
}

impl CheckPlan {
    /// Whether a check is due at this exit, and what it does about memory. The first exit has one:
    /// from there on both sides have a copy of what was loaded, and slices need not carry it.
    fn due(&self, at: Ordinal) -> Option<MemoryCheckMode> {
        let is_due =
            |every: u64| every > 0 && at >= self.from && (at.0 == 1 || at.0.is_multiple_of(every));
        match is_due(self.memory_every_exits) {
            true => Some(self.memory),
            false => is_due(self.every_exits).then_some(MemoryCheckMode::None),
        }
    }
}

/// A recording in a file.
pub type Recording = FileLog<WriteBehind>;

/// Writes the inputs of the guest, and checks for a replayer.
pub struct Recorder {
    /// Written before the channel, so that the recording has everything that the backup knows.
    recording: Option<Recording>,
    channel: Option<Box<dyn LogSink>>,
    plan: CheckPlan,
    measured: Ordinal,
}

impl Recorder {
    /// Writes to `recording`, `channel` or both.
    pub fn new(
        recording: Option<Recording>,
        channel: Option<Box<dyn LogSink>>,
        plan: CheckPlan,
    ) -> Self {
        Self { recording, channel, plan, measured: Ordinal(0) }
    }

    /// The recording, to end it.
    pub fn into_recording(self) -> Option<Recording> {
        self.recording
    }

    fn sinks(&mut self) -> impl Iterator<Item = &mut dyn LogSink> {
        let file = self.recording.as_mut().map(|recording| recording as &mut dyn LogSink);
        let channel = self.channel.as_mut().map(|channel| &mut **channel as &mut dyn LogSink);
        file.into_iter().chain(channel)
    }

    fn append(&mut self, at: Ordinal, event: Event) -> Result<Event, InputError> {
        let record = Record { at, event };
        self.sinks().try_for_each(|sink| sink.append(&record))?;
        Ok(record.event)
    }

    /// The guest waits at its exit: what was appended should get where it goes.
    ///
    /// # Errors
    /// When the log is broken.
    pub fn idle(&mut self) -> Result<(), InputError> {
        self.sinks().try_for_each(LogSink::idle)
    }

    /// Writes `step`, which the source chose here; what is to be done, which may be a check that is
    /// due first.
    ///
    /// # Errors
    /// When the log is broken.
    pub fn record(&mut self, situation: &RunSituation, step: Step) -> Result<Step, InputError> {
        if let Step::Load(parts) = step {
            let at = situation.at.unwrap_or_else(|| situation.last.next());
            self.captured(at, parts.clone())?;
            return Ok(Step::Load(parts));
        }
        let Some(at) = situation.at else {
            return Ok(step);
        };
        match step {
            Step::Apply(input) => match self.append(at, Event::Input(input))? {
                Event::Input(input) => Ok(Step::Apply(input)),
                _ => unreachable!("it is what was appended"),
            },
            Step::Measure { memory } => {
                Ok(Step::Measure { memory: memory.max(self.plan.due(at).unwrap_or_default()) })
            }
            Step::Proceed => {
                if at > self.measured
                    && let Some(memory) = self.plan.due(at)
                {
                    return Ok(Step::Measure { memory });
                }
                self.sinks().try_for_each(|sink| sink.exit_complete(at))?;
                Ok(Step::Proceed)
            }
            step => Ok(step),
        }
    }

    /// The execution was measured at exit `at`.
    ///
    /// # Errors
    /// When the log is broken.
    pub fn measured(&mut self, at: Ordinal, check: Check) -> Result<(), InputError> {
        self.measured = at;
        self.append(at, Event::Check(Box::new(check))).map(drop)
    }

    /// Exit `at` is a slice of these parts.
    ///
    /// # Errors
    /// When the log is broken.
    pub fn captured(&mut self, at: Ordinal, parts: Vec<Slice>) -> Result<(), InputError> {
        parts.into_iter().try_for_each(|part| self.append(at, Event::Slice(part)).map(drop))
    }

    /// The state as it stands at exit `at` goes into a snapshot.
    ///
    /// # Errors
    /// When the log is broken.
    pub fn saved(&mut self, at: Ordinal, mark: SnapshotMark) -> Result<(), InputError> {
        self.append(at, Event::Snapshot(mark)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;

    use super::*;
    use crate::testing::Told;

    fn recorder(every_exits: u64, memory_every_exits: u64) -> (Told, Recorder) {
        let told = Told::default();
        let from = Ordinal(1);
        let memory = MemoryCheckMode::Renew;
        let plan = CheckPlan { every_exits, memory_every_exits, from, memory };
        (told.clone(), Recorder::new(None, Some(Box::new(told)), plan))
    }

    fn at(at: u64) -> RunSituation {
        RunSituation { at: Some(Ordinal(at)), last: Ordinal(at), ..RunSituation::default() }
    }

    #[test]
    fn a_check_that_is_due_comes_before_the_exit_is_complete() {
        let (told, mut recorder) = recorder(4, 8);
        for (exit, look) in
            [(1, MemoryCheckMode::Renew), (4, MemoryCheckMode::None), (8, MemoryCheckMode::Renew)]
        {
            let step = recorder.record(&at(exit), Step::Proceed).unwrap();
            assert!(matches!(step, Step::Measure { memory } if memory == look), "{exit}: {step:?}");
            assert!(told.take().is_empty(), "the exit is not complete");
            recorder.measured(Ordinal(exit), Check::default()).unwrap();
            assert!(matches!(recorder.record(&at(exit), Step::Proceed), Ok(Step::Proceed)));
            assert_eq!(told.take(), [format!("{exit} check"), format!("{exit} complete")]);
        }
        assert!(matches!(recorder.record(&at(9), Step::Proceed), Ok(Step::Proceed)));
        assert_eq!(told.take(), ["9 complete"]);
    }

    #[test]
    fn a_check_that_is_asked_for_does_what_a_due_one_does() {
        let (_, mut recorder) = recorder(0, 8);
        let asked = || Step::Measure { memory: MemoryCheckMode::Digest };
        let step = recorder.record(&at(8), asked()).unwrap();
        assert!(matches!(step, Step::Measure { memory: MemoryCheckMode::Renew }), "{step:?}");
        let step = recorder.record(&at(9), asked()).unwrap();
        assert!(matches!(step, Step::Measure { memory: MemoryCheckMode::Digest }), "{step:?}");
    }

    #[test]
    fn what_the_guest_is_given_is_written_and_what_is_between_exits_is_not() {
        let (told, mut recorder) = recorder(0, 0);
        let time = || Step::Apply(Input::Time { now_ns: 1 });
        let step = recorder.record(&at(3), time()).unwrap();
        assert!(matches!(step, Step::Apply(Input::Time { now_ns: 1 })));
        let between = RunSituation { last: Ordinal(3), ..RunSituation::default() };
        assert!(matches!(recorder.record(&between, Step::Proceed), Ok(Step::Proceed)));
        assert!(matches!(recorder.record(&between, time()), Ok(Step::Apply(_))));
        let slice = Slice { pages: vec![], cpu: Some(vec![]) };
        recorder.record(&between, Step::Load(vec![slice])).unwrap();
        assert_eq!(told.take(), ["3 input", "4 slice"]);
    }
}
