//! Following a log: the next step of a replay, for a log from a file or from a peer.
//!
//! A [`Replayer`] keeps what a follower must remember between two steps: the check it was asked
//! for, how far it has reported, and how the recorded guest ended. The log itself is a
//! [`ReplayCursor`], which its owner fills: from a file that is read on, or from a channel that is
//! waited for.

use ftvmm_devices::Input;

use crate::check::{Check, MemoryCheckMode};
use crate::cursor::{CursorStep, ReplayCursor};
use crate::disk::DiskAnswer;
use crate::record::{End, Ordinal, Record};
use crate::slice::Slice;

/// Exits after which a follower that never waits for the log says how far it is.
const REPORT_EVERY_EXITS: u64 = 256;

/// What a guest that follows a log does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplayStep {
    /// Apply this input, then ask again.
    Apply(Input),
    /// The recorder's disk answered; the data is on a disk of the follower's. Compare the two and
    /// apply the answer, then ask again.
    CompareDisk(DiskAnswer),
    /// Measure the execution and hand the result to [`Replayer::difference`], then ask again.
    Measure {
        /// What to do about memory.
        memory: MemoryCheckMode,
    },
    /// Put the guest into the state of this slice, then ask again.
    Load(Vec<Slice>),
    /// The log has no more for this point.
    Proceed,
    /// Not known yet: more of the log must come first.
    Wait,
    /// The recorded guest ended here.
    Ended,
    /// The log is sealed and used up: the follower has no more to follow.
    UsedUp,
    /// A divergence: the guest went past this record.
    Missed(Record),
}

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Replayer {
    expected: Option<Box<Check>>,
    reported: Ordinal,
    end: Option<End>,
}

impl Replayer {
    /// A follower of a guest that has not made an exit.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The guest stands after exit `left`, of which the recorder knows.
    pub fn start_after(&mut self, left: Ordinal) {
        self.reported = left;
        self.expected = None;
    }

    /// What to do at exit `at`.
    pub fn at_exit(&mut self, cursor: &mut ReplayCursor, at: Ordinal) -> ReplayStep {
        match cursor.next(at) {
            CursorStep::Apply(input) => ReplayStep::Apply(input),
            CursorStep::ApplyDisk(answer) => ReplayStep::CompareDisk(answer),
            CursorStep::Check(check) => {
                let memory = check.memory_look();
                self.expected = Some(check);
                ReplayStep::Measure { memory }
            }
            CursorStep::Load(parts) => ReplayStep::Load(parts),
            CursorStep::Proceed => ReplayStep::Proceed,
            CursorStep::Wait => ReplayStep::Wait,
            CursorStep::End(end) => {
                self.end = Some(end);
                ReplayStep::Ended
            }
            CursorStep::Exhausted => ReplayStep::UsedUp,
            CursorStep::Missed { record, .. } => ReplayStep::Missed(record),
        }
    }

    /// What to do between exit `last` and the next: only a slice can be there.
    pub fn between_exits(&mut self, cursor: &mut ReplayCursor, last: Ordinal) -> ReplayStep {
        if cursor.has_slice(last.next()) {
            return self.at_exit(cursor, last.next());
        }
        // A guest that computes may not make an exit for long.
        match cursor.is_used_up(last.next()) {
            true => ReplayStep::UsedUp,
            false => ReplayStep::Proceed,
        }
    }

    /// In what the execution differs from the check that was to be measured, if it does.
    pub fn difference(&mut self, check: &Check) -> Option<String> {
        self.expected.take().and_then(|expected| check.difference(&expected))
    }

    /// Whether to tell the recorder that exit `left` is done: now and then, and when the follower
    /// has to wait (`waits`).
    pub fn report_is_due(&mut self, left: Ordinal, waits: bool) -> bool {
        let least = if waits { 1 } else { REPORT_EVERY_EXITS };
        let is_due = left.0 >= self.reported.0 + least;
        if is_due {
            self.reported = left;
        }
        is_due
    }

    /// The guest has ended, and `at` is the first exit it did not get past: whether the recorded
    /// one went on. `None` when that is not known yet: more of the log must come first.
    pub fn recorder_went_on(&mut self, cursor: &mut ReplayCursor, at: Ordinal) -> Option<bool> {
        if self.end.is_some() {
            return Some(false);
        }
        match self.at_exit(cursor, at) {
            ReplayStep::Wait => None,
            ReplayStep::Ended | ReplayStep::UsedUp => Some(false),
            _ => Some(true),
        }
    }

    /// How the recorded guest ended, once the follower has come to that.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::Group;
    use crate::record::{EndReason, Event};

    const END: End = End { state_digest: [1; 32], chain: 2, outputs: 3, reason: EndReason::Reset };

    fn cursor(horizon: u64, records: Vec<(u64, Event)>) -> ReplayCursor {
        let mut cursor = ReplayCursor::new();
        let record = |(at, event)| Record { at: Ordinal(at), event };
        let records = records.into_iter().map(record).collect();
        cursor.push_group(Group { horizon: Ordinal(horizon), records }).unwrap();
        cursor
    }

    fn time(now_ns: u64) -> Event {
        Event::Input(Input::Time { now_ns })
    }

    fn slice() -> Event {
        Event::Slice(Slice { pages: vec![1], cpu: Some(vec![2]) })
    }

    #[test]
    fn a_check_is_compared_once_with_what_was_measured() {
        let expected = Check { chain: 5, ..Check::default() };
        let check = Event::Check(Box::new(expected.clone()));
        let mut cursor = cursor(4, vec![(4, check)]);
        let mut replayer = Replayer::new();
        let measure = ReplayStep::Measure { memory: MemoryCheckMode::None };
        assert_eq!(replayer.at_exit(&mut cursor, Ordinal(4)), measure);
        let other = Check { chain: 6, ..Check::default() };
        assert!(replayer.difference(&other).unwrap().contains("digest"));
        assert_eq!(replayer.difference(&other), None, "nothing is expected any more");
        assert_eq!(replayer.at_exit(&mut cursor, Ordinal(4)), ReplayStep::Proceed);
    }

    #[test]
    fn only_a_slice_is_between_two_exits() {
        let mut replayer = Replayer::new();
        let mut log = cursor(4, vec![(5, time(1))]);
        assert_eq!(replayer.between_exits(&mut log, Ordinal(4)), ReplayStep::Proceed);
        let mut log = cursor(4, vec![(5, slice())]);
        let step = replayer.between_exits(&mut log, Ordinal(4));
        assert!(matches!(step, ReplayStep::Load(parts) if parts.len() == 1));
        log.seal();
        assert_eq!(replayer.between_exits(&mut log, Ordinal(4)), ReplayStep::UsedUp);
    }

    #[test]
    fn a_follower_reports_when_it_waits_and_now_and_then() {
        let mut replayer = Replayer::new();
        assert!(!replayer.report_is_due(Ordinal(0), true));
        assert!(!replayer.report_is_due(Ordinal(REPORT_EVERY_EXITS - 1), false));
        assert!(replayer.report_is_due(Ordinal(REPORT_EVERY_EXITS), false));
        assert!(replayer.report_is_due(Ordinal(REPORT_EVERY_EXITS + 1), true));
        assert!(!replayer.report_is_due(Ordinal(REPORT_EVERY_EXITS + 1), true), "said already");
        replayer.start_after(Ordinal(9));
        assert!(replayer.report_is_due(Ordinal(10), true));
    }

    #[test]
    fn whether_the_recorded_guest_ended_too_is_known_when_the_log_says_so() {
        let mut replayer = Replayer::new();
        let mut log = cursor(6, vec![]);
        assert_eq!(replayer.recorder_went_on(&mut log, Ordinal(6)), Some(true));
        assert_eq!(replayer.recorder_went_on(&mut log, Ordinal(7)), None);
        log.seal();
        assert_eq!(replayer.recorder_went_on(&mut log, Ordinal(7)), Some(false));
        assert_eq!(replayer.end(), None);
        let mut log = cursor(6, vec![(7, Event::End(END))]);
        assert_eq!(replayer.recorder_went_on(&mut log, Ordinal(7)), Some(false));
        assert_eq!(replayer.end(), Some(END));
        assert_eq!(replayer.recorder_went_on(&mut log, Ordinal(7)), Some(false), "asked again");
    }

    #[test]
    fn a_record_gone_past_is_named() {
        let mut log = cursor(9, vec![(4, time(1))]);
        let step = Replayer::new().at_exit(&mut log, Ordinal(5));
        assert_eq!(step, ReplayStep::Missed(Record { at: Ordinal(4), event: time(1) }));
    }
}
