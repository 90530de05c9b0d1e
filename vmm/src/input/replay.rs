//! Inputs from a recording.

use std::io::Read;

use ftvmm_replication::{
    Check, CursorStep, DiskAnswer, End, LogReader, Ordinal, ReplayCursor, Tail,
};

use super::InputError;
use crate::run_loop::{InputSource, RunMode, Situation, Step, StopCause};

/// Feeds a recording's groups to a cursor and the cursor's steps to the run loop.
pub struct LogInputs<R> {
    reader: LogReader<R>,
    cursor: ReplayCursor,
    until: Option<Ordinal>,
    end: Option<End>,
    stopped: bool,
    torn: Option<String>,
    expected: Option<Box<Check>>,
    /// So many records are part of what the guest was restored from.
    skip: u64,
}

impl<R: Read> LogInputs<R> {
    /// Inputs from `reader`, at most up to the exit `until`.
    /// The guest stands where the log's first `skip` records have been applied.
    pub fn new(reader: LogReader<R>, until: Option<Ordinal>, skip: u64) -> Self {
        let cursor = ReplayCursor::new();
        Self { reader, cursor, until, end: None, stopped: false, torn: None, expected: None, skip }
    }

    /// How the recorded guest ended; `at` is the first exit this guest did not get past.
    ///
    /// # Errors
    /// When the log cannot be read, or the recorded guest went on.
    pub fn recorded_end(&mut self, at: Ordinal) -> Result<Option<End>, InputError> {
        let end = Situation { at: Some(at), ..Situation::default() };
        if self.end.is_none() && !matches!(self.next(&end)?, Step::Stop(_)) {
            let what = "the guest ended before this exit, the recorded one went on".into();
            return Err(InputError::Divergence { at: at.0, what });
        }
        Ok(self.end)
    }

    /// Whether the replay has come to the exit up to which it was to go.
    pub fn was_stopped(&self) -> bool {
        self.stopped
    }

    /// Bytes of the recording read so far.
    pub fn bytes_read(&self) -> u64 {
        self.reader.offset_bytes()
    }

    /// What is wrong with the log's tail, if it was torn off.
    pub fn torn(&self) -> Option<&str> {
        self.torn.as_deref()
    }

    fn take_slice(&mut self, at: Ordinal) -> Step {
        match self.cursor.next(at) {
            CursorStep::Load(parts) => Step::Load(parts),
            _ => Step::Proceed,
        }
    }

    fn read_group(&mut self) -> Result<(), InputError> {
        let group = self.reader.next_group().map_err(|source| InputError::LogRead { source })?;
        match group {
            Some(mut group) => {
                let skipped = self.skip.min(group.records.len() as u64);
                self.skip -= skipped;
                group.records.drain(..skipped as usize);
                self.cursor.push_group(group).map_err(|source| InputError::LogOrder { source })?
            }
            None => {
                if let Some(Tail::Torn { offset_bytes, reason }) = self.reader.tail() {
                    self.torn = Some(format!("at byte {offset_bytes}: {reason}"));
                }
                self.cursor.seal();
            }
        }
        Ok(())
    }
}

impl<R: Read> InputSource for LogInputs<R> {
    fn next(&mut self, situation: &Situation) -> Result<Step, InputError> {
        let Some(at) = situation.at else {
            return Ok(match self.cursor.has_slice(situation.last.next()) {
                true => self.take_slice(situation.last.next()),
                false => Step::Proceed,
            });
        };
        if self.until.is_some_and(|until| at >= until) {
            self.stopped = true;
            return Ok(Step::Stop(StopCause::EndOfLog));
        }
        loop {
            match self.cursor.next(at) {
                CursorStep::Apply(input) => return Ok(Step::Apply(input)),
                // What follows decides how far the guest may run.
                CursorStep::ApplyDisk(DiskAnswer { id, .. }) => {
                    let what = format!("the log does not have what disk request {id} read");
                    return Err(InputError::Divergence { at: at.0, what });
                }
                CursorStep::Proceed if !self.cursor.knows(at.next()) => self.read_group()?,
                CursorStep::Proceed => return Ok(Step::Proceed),
                CursorStep::Load(parts) => return Ok(Step::Load(parts)),
                CursorStep::Wait => self.read_group()?,
                CursorStep::Exhausted => return Ok(Step::Stop(StopCause::EndOfLog)),
                CursorStep::End(end) => {
                    self.end = Some(end);
                    return Ok(Step::Stop(StopCause::EndOfLog));
                }
                CursorStep::Check(check) => {
                    let memory = check.memory_look();
                    self.expected = Some(check);
                    return Ok(Step::Measure { memory });
                }
                CursorStep::Missed { record, at } => {
                    return Err(InputError::Divergence {
                        at: at.0,
                        what: format!("the guest went past the recorded '{record}'"),
                    });
                }
            }
        }
    }

    fn measured(&mut self, at: Ordinal, check: Check) -> Result<(), InputError> {
        match self.expected.take().and_then(|recorded| check.difference(&recorded)) {
            Some(what) => Err(InputError::Divergence { at: at.0, what }),
            None => Ok(()),
        }
    }

    fn run_mode(&mut self, at: Ordinal, _: bool) -> RunMode {
        match self.cursor.has_slice(at.next()) {
            true => RunMode::Not,
            false => RunMode::Free,
        }
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;
    use ftvmm_replication::{Event, GroupEncoder, LogWriter, Record, SnapshotMark};

    use super::*;
    use crate::snapshot::tests::header;

    #[test]
    fn what_a_snapshot_holds_is_not_applied_again() {
        let at = |at, event| Record { at: Ordinal(at), event };
        let time = |now_ns| Event::Input(Input::Time { now_ns });
        let mark = SnapshotMark { path: "/s".into(), memory_digest: 1 };
        let mut encoder = GroupEncoder::new();
        let mut writer = LogWriter::new(Vec::new(), &header()).unwrap();
        encoder.push(&at(3, time(10)));
        writer.write_group(&encoder.finish(Ordinal(4))).unwrap();
        encoder.push(&at(5, time(20)));
        encoder.push(&at(5, Event::Snapshot(mark)));
        encoder.push(&at(5, time(30)));
        writer.write_group(&encoder.finish(Ordinal(5))).unwrap();
        let log = writer.finish().unwrap();
        let mut inputs = LogInputs::new(LogReader::new(&log[..]).unwrap(), None, 3);
        let here = Situation { at: Some(Ordinal(5)), ..Situation::default() };
        let first = inputs.next(&here).unwrap();
        assert!(matches!(first, Step::Apply(Input::Time { now_ns: 30 })), "{first:?}");
    }
}
