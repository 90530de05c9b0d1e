//! Any source with a log beside it: what it hands out is what is written.

use ftvmm_replication::{Check, Event, Ordinal, Record};

use super::InputError;
use crate::run_loop::{InputSource, Situation, Step};

/// Exits between two records of the exit digest.
const CHECK_EVERY_EXITS: u64 = 1024;

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
}

impl<'a, S: InputSource> Recorded<'a, S> {
    /// Writes what `source` hands out to `log`.
    pub fn new(source: S, log: &'a mut dyn LogSink) -> Self {
        Self { source, log }
    }
}

impl<S: InputSource> InputSource for Recorded<'_, S> {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        if situation.halted {
            self.log.rest()?;
        }
        let step = self.source.next(situation)?;
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
            Step::Proceed => {
                if at.0.is_multiple_of(CHECK_EVERY_EXITS) {
                    let check = Check { chain: situation.chain };
                    self.log.append(&Record { at, event: Event::Check(check) })?;
                }
                self.log.left(at)?;
                Ok(Step::Proceed)
            }
            Step::Stop(cause) => Ok(Step::Stop(cause)),
        }
    }

    fn unrecorded(&self) -> bool {
        self.source.unrecorded()
    }
}
