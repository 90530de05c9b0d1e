//! Any source with a log beside it: what it hands out is what is written.

use ftvmm_replication::{
    Check, Event, MemoryLook, Ordinal, Record, Slice, SnapshotMark, StatePart,
};

use super::InputError;
use crate::run_loop::{InputSource, RunMode, Situation, Step};

/// How often the recorder states what a replayer must agree with.
#[derive(Clone, Copy, Debug)]
pub struct CheckPlan {
    /// Exits between two checks of the exits and the processor; 0 for none.
    pub every_exits: u64,
    /// Exits between two checks of all memory as well; 0 for none.
    pub memory_every_exits: u64,
    /// No check before this exit.
    pub from: Ordinal,
    /// What a check of memory does. A replay must not renew the copy where the recorder did not.
    pub memory: MemoryLook,
}

impl CheckPlan {
    /// Whether a check is due at this exit, and what it does about memory. The first exit has one: from there
    /// on both sides have a copy of what was loaded, and slices need not carry it.
    fn due(&self, at: Ordinal) -> Option<MemoryLook> {
        let is_due =
            |every: u64| every > 0 && at >= self.from && (at.0 == 1 || at.0.is_multiple_of(every));
        match is_due(self.memory_every_exits) {
            true => Some(self.memory),
            false => is_due(self.every_exits).then_some(MemoryLook::None),
        }
    }
}

/// Where log records go: a file, the channel to a backup, or both.
pub trait LogSink {
    /// Takes a record.
    ///
    /// # Errors
    /// When the sink is broken.
    fn append(&mut self, record: &Record) -> Result<(), InputError>;

    /// The guest leaves exit `at`: no further record will name it.
    ///
    /// # Errors
    /// When the sink is broken.
    fn left(&mut self, at: Ordinal) -> Result<(), InputError>;

    /// The guest waits at its exit: what was appended should get where it goes.
    ///
    /// # Errors
    /// When the sink is broken.
    fn rest(&mut self) -> Result<(), InputError>;
}

/// A source and its log.
pub struct Recorded<'a, S> {
    source: S,
    log: &'a mut dyn LogSink,
    plan: CheckPlan,
    measured: Ordinal,
}

impl<'a, S: InputSource> Recorded<'a, S> {
    /// Writes what `source` hands out to `log`.
    pub fn new(source: S, log: &'a mut dyn LogSink, plan: CheckPlan) -> Self {
        Self { source, log, plan, measured: Ordinal(0) }
    }

    /// The source under it.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// The source again, when the run has ended.
    pub fn into_source(self) -> S {
        self.source
    }
}

impl<S: InputSource> InputSource for Recorded<'_, S> {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        if situation.halted {
            self.log.rest()?;
        }
        let step = self.source.next(situation)?;
        if let Step::Load(parts) = step {
            let at = situation.at.unwrap_or_else(|| situation.last.next());
            self.captured(at, parts.clone())?;
            return Ok(Step::Load(parts));
        }
        let Some(at) = situation.at else {
            return Ok(step);
        };
        match step {
            Step::Apply(input) => {
                let record = Record { at, event: Event::Input(input) };
                self.log.append(&record)?;
                let Event::Input(input) = record.event else {
                    unreachable!("made two lines above")
                };
                Ok(Step::Apply(input))
            }
            Step::Measure { memory } => {
                Ok(Step::Measure { memory: memory.max(self.plan.due(at).unwrap_or_default()) })
            }
            Step::Proceed => {
                if at > self.measured
                    && let Some(memory) = self.plan.due(at)
                {
                    return Ok(Step::Measure { memory });
                }
                self.log.left(at)?;
                Ok(Step::Proceed)
            }
            step => Ok(step),
        }
    }

    fn measured(&mut self, at: Ordinal, check: Check) -> Result<(), InputError> {
        self.measured = at;
        self.log.append(&Record { at, event: Event::Check(Box::new(check.clone())) })?;
        self.source.measured(at, check)
    }

    fn captured(&mut self, at: Ordinal, parts: Vec<Slice>) -> Result<(), InputError> {
        parts
            .into_iter()
            .try_for_each(|part| self.log.append(&Record { at, event: Event::Slice(part) }))
    }

    fn saved(&mut self, at: Ordinal, mark: SnapshotMark) -> Result<(), InputError> {
        self.log.append(&Record { at, event: Event::Snapshot(mark) })
    }

    fn state_put(&mut self, part: &StatePart, stands: Option<(Ordinal, u64)>) {
        self.source.state_put(part, stands);
    }

    fn run_mode(&mut self, at: Ordinal, interrupt_waits: bool) -> RunMode {
        self.source.run_mode(at, interrupt_waits)
    }
}
