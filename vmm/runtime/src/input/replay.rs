//! Inputs from a log: one replayer for a recording that is read on and for a channel that is waited
//! for.

use std::io::Read;

use ftvmm_machine::situation::{RunMode, RunSituation, StopCause};
use ftvmm_replication::{
    Check, DiskAnswer, End, LogReader, Ordinal, Record, ReplayCursor, ReplayStep, Replayer, Tail,
};

use crate::input_error::InputError;
use crate::step::Step;

/// What a feed has for the replayer.
pub enum Fed {
    /// What the log says.
    Log(ReplayStep),
    /// Something else comes first.
    First(Step),
}

/// How the guest's execution differs from the log.
pub enum Divergence {
    /// It went past this record.
    Missed(Record),
    /// It differs from the recorder's check.
    Check(String),
}

/// Where a replayer's log comes from.
pub trait Feed {
    /// What the log says of this point. Reads or waits for more of the log, so it never returns
    /// [`ReplayStep::Wait`].
    ///
    /// # Errors
    /// When the log is broken.
    fn next(
        &mut self,
        replayer: &mut Replayer,
        situation: &RunSituation,
    ) -> Result<Fed, InputError>;

    /// What to do about a request that the recorder's disk completed with `answer`.
    ///
    /// # Errors
    /// When there is nothing to compare it with.
    fn compare_disk(
        &mut self,
        replayer: &mut Replayer,
        at: Ordinal,
        answer: DiskAnswer,
    ) -> Result<Step, InputError>;

    /// What to do about a divergence.
    ///
    /// # Errors
    /// When it ends the run.
    fn diverged(&mut self, at: Ordinal, how: Divergence) -> Result<Step, InputError>;

    /// Whether exit `at` is a slice, all of which has come.
    fn has_slice(&mut self, at: Ordinal) -> bool;
}

/// Turns what a log says into steps of the run loop.
pub struct Replay<F> {
    feed: F,
    replayer: Replayer,
}

impl<F: Feed> Replay<F> {
    /// Follows the log that `feed` brings.
    pub fn new(feed: F) -> Self {
        Self { feed, replayer: Replayer::new() }
    }

    /// Where the log comes from.
    pub fn feed(&self) -> &F {
        &self.feed
    }

    /// Where the log comes from, and what is remembered of it.
    pub fn parts(&mut self) -> (&mut F, &mut Replayer) {
        (&mut self.feed, &mut self.replayer)
    }

    /// The next thing to do; `None` when the log is used up.
    ///
    /// # Errors
    /// When the log is broken, or a divergence ends the run.
    pub fn next(&mut self, situation: &RunSituation) -> Result<Option<Step>, InputError> {
        let step = match self.feed.next(&mut self.replayer, situation)? {
            Fed::First(step) => return Ok(Some(step)),
            Fed::Log(step) => step,
        };
        let at = situation.at.unwrap_or_else(|| situation.last.next());
        let step = match step {
            ReplayStep::Apply(input) => Step::Apply(input),
            ReplayStep::CompareDisk(answer) => {
                self.feed.compare_disk(&mut self.replayer, at, answer)?
            }
            ReplayStep::Measure { memory } => Step::Measure { memory },
            ReplayStep::Load(parts) => Step::Load(parts),
            ReplayStep::Proceed => Step::Proceed,
            ReplayStep::Wait => Step::Again,
            ReplayStep::Ended => Step::Stop(StopCause::EndOfLog),
            ReplayStep::UsedUp => return Ok(None),
            ReplayStep::Missed(record) => self.feed.diverged(at, Divergence::Missed(record))?,
        };
        Ok(Some(step))
    }

    /// Compares what was measured with the recorder's check.
    ///
    /// # Errors
    /// When a divergence ends the run.
    pub fn measured(&mut self, at: Ordinal, check: &Check) -> Result<(), InputError> {
        if let Some(what) = self.replayer.difference(check) {
            // If the divergence does not end the run, the next call of `next` says how it
            // continues.
            self.feed.diverged(at, Divergence::Check(what))?;
        }
        Ok(())
    }

    /// How far the guest may run from exit `at` on: not at all when a slice follows.
    pub fn run_mode(&mut self, at: Ordinal) -> RunMode {
        match self.feed.has_slice(at.next()) {
            true => RunMode::Not,
            false => RunMode::Free,
        }
    }
}

/// A recording.
pub struct FileFeed {
    reader: LogReader<Box<dyn Read>>,
    cursor: ReplayCursor,
    until: Option<Ordinal>,
    stopped: bool,
    torn: Option<String>,
    /// So many records are part of what the guest was restored from.
    skip: u64,
}

impl FileFeed {
    /// The recording of `reader`, at most up to the exit `until`.
    /// The guest stands where the log's first `skip` records have been applied.
    pub fn new(reader: LogReader<Box<dyn Read>>, until: Option<Ordinal>, skip: u64) -> Self {
        let cursor = ReplayCursor::new();
        Self { reader, cursor, until, stopped: false, torn: None, skip }
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

    fn stops_at(&mut self, at: Ordinal) -> bool {
        self.stopped |= self.until.is_some_and(|until| at >= until);
        self.stopped
    }

    fn read_group(&mut self) -> Result<(), InputError> {
        let group = self.reader.next_group().map_err(|cause| InputError::LogRead { cause })?;
        match group {
            Some(mut group) => {
                let skipped = self.skip.min(group.records.len() as u64);
                self.skip -= skipped;
                group.records.drain(..skipped as usize);
                self.cursor.push_group(group).map_err(|cause| InputError::LogOrder { cause })?
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

impl Feed for FileFeed {
    fn next(
        &mut self,
        replayer: &mut Replayer,
        situation: &RunSituation,
    ) -> Result<Fed, InputError> {
        let Some(at) = situation.at else {
            return Ok(Fed::Log(match replayer.between_exits(&mut self.cursor, situation.last) {
                // A replay ends at an exit, where there is a state to compare.
                ReplayStep::UsedUp => ReplayStep::Proceed,
                step => step,
            }));
        };
        if self.stops_at(at) {
            return Ok(Fed::First(Step::Stop(StopCause::EndOfLog)));
        }
        loop {
            match replayer.at_exit(&mut self.cursor, at) {
                ReplayStep::Wait => self.read_group()?,
                // The next records decide how far the guest may run.
                ReplayStep::Proceed if !self.cursor.knows(at.next()) => self.read_group()?,
                step => return Ok(Fed::Log(step)),
            }
        }
    }

    fn compare_disk(
        &mut self,
        _: &mut Replayer,
        at: Ordinal,
        answer: DiskAnswer,
    ) -> Result<Step, InputError> {
        let what = format!("the log does not have what disk request {} read", answer.id);
        Err(InputError::Divergence { at: at.0, what })
    }

    fn diverged(&mut self, at: Ordinal, how: Divergence) -> Result<Step, InputError> {
        let what = match how {
            Divergence::Missed(record) => format!("the guest went past the recorded '{record}'"),
            Divergence::Check(what) => what,
        };
        Err(InputError::Divergence { at: at.0, what })
    }

    fn has_slice(&mut self, at: Ordinal) -> bool {
        self.cursor.has_slice(at)
    }
}

impl Replay<FileFeed> {
    /// How the recorded guest ended; `at` is the first exit this guest did not get past.
    ///
    /// # Errors
    /// When the log cannot be read, or the recorded guest went on.
    pub fn recorded_end(&mut self, at: Ordinal) -> Result<Option<End>, InputError> {
        if self.replayer.end().is_none() && self.feed.stops_at(at) {
            return Ok(None);
        }
        loop {
            match self.replayer.recorder_went_on(&mut self.feed.cursor, at) {
                None => self.feed.read_group()?,
                Some(false) => return Ok(self.replayer.end()),
                Some(true) => {
                    let what = "the guest ended before this exit, the recorded one went on".into();
                    return Err(InputError::Divergence { at: at.0, what });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;
    use ftvmm_replication::{
        EndReason, Event, GroupEncoder, LogWriter, MemoryCheckMode, SnapshotMark,
    };

    use super::*;
    use crate::testing::header;

    /// A recording of groups, each with its horizon.
    fn replay(groups: Vec<(u64, Vec<(u64, Event)>)>, skip: u64) -> Replay<FileFeed> {
        let mut encoder = GroupEncoder::new();
        let mut writer = LogWriter::new(Vec::new(), &header()).unwrap();
        for (horizon, records) in groups {
            for (at, event) in records {
                encoder.push(&Record { at: Ordinal(at), event });
            }
            writer.write_group(&encoder.finish(Ordinal(horizon))).unwrap();
        }
        let log: Box<dyn Read> = Box::new(std::io::Cursor::new(writer.finish().unwrap()));
        Replay::new(FileFeed::new(LogReader::new(log).unwrap(), None, skip))
    }

    fn time(now_ns: u64) -> Event {
        Event::Input(Input::Time { now_ns })
    }

    fn at(at: u64) -> RunSituation {
        RunSituation { at: Some(Ordinal(at)), last: Ordinal(at), ..RunSituation::default() }
    }

    #[test]
    fn what_a_snapshot_holds_is_not_applied_again() {
        let mark = Event::Snapshot(SnapshotMark { path: "/s".into(), memory_digest: 1 });
        let first = vec![(3, time(10))];
        let second = vec![(5, time(20)), (5, mark), (5, time(30))];
        let mut inputs = replay(vec![(4, first), (5, second)], 3);
        let first = inputs.next(&at(5)).unwrap();
        assert!(matches!(first, Some(Step::Apply(Input::Time { now_ns: 30 }))), "{first:?}");
    }

    #[test]
    fn a_guest_that_leaves_the_path_of_a_recording_ends_the_replay() {
        let check = Check { chain: 5, ..Check::default() };
        let records = vec![(2, Event::Check(Box::new(check.clone()))), (3, time(10))];
        let mut inputs = replay(vec![(4, records)], 0);
        let step = inputs.next(&at(2)).unwrap();
        assert!(matches!(step, Some(Step::Measure { memory: MemoryCheckMode::None })), "{step:?}");
        let other = Check { chain: 6, ..Check::default() };
        let error = inputs.measured(Ordinal(2), &other).unwrap_err().to_string();
        assert!(error.starts_with("divergence at exit 2: exits have digest"), "{error}");
        let error = inputs.next(&at(4)).unwrap_err().to_string();
        assert!(error.contains("exit 4: the guest went past the recorded"), "{error}");
    }

    #[test]
    fn a_recording_is_read_on_until_it_says_how_the_guest_ended() {
        let reason = EndReason::PowerOff;
        let end = End { state_digest: [1; 32], chain: 2, outputs: 3, reason };
        let mut inputs = replay(vec![(4, vec![]), (8, vec![]), (8, vec![(9, Event::End(end))])], 0);
        assert!(matches!(inputs.next(&at(4)), Ok(Some(Step::Proceed))));
        let went_on = inputs.recorded_end(Ordinal(8)).unwrap_err().to_string();
        assert!(went_on.contains("exit 8: the guest ended before this exit"), "{went_on}");
        assert_eq!(inputs.recorded_end(Ordinal(9)).unwrap(), Some(end));
        let mut unfinished = replay(vec![(4, vec![])], 0);
        assert!(matches!(unfinished.next(&at(5)), Ok(None)), "used up");
        assert_eq!(unfinished.recorded_end(Ordinal(5)).unwrap(), None);
    }

    #[test]
    fn the_guest_does_not_run_past_a_slice() {
        let slice = ftvmm_replication::Slice { pages: vec![], cpu: Some(vec![1]) };
        let mut inputs = replay(vec![(1, vec![]), (1, vec![(2, Event::Slice(slice))])], 0);
        assert!(matches!(inputs.next(&at(1)), Ok(Some(Step::Proceed))));
        assert_eq!(inputs.run_mode(Ordinal(1)), RunMode::Not);
        let between = RunSituation { last: Ordinal(1), ..RunSituation::default() };
        assert!(matches!(inputs.next(&between), Ok(Some(Step::Load(_)))));
        assert_eq!(inputs.run_mode(Ordinal(2)), RunMode::Free);
    }
}
