//! The replay cursor: tells the run loop what the log wants at the exit it stands at.
//!
//! Why: the replayer must not leave an exit before it knows everything the recorder did there. The
//! horizon of the groups pushed so far says how far that is known.
//! Invariants: horizons never fall between groups, and no group holds a record at or before the
//! horizon of the group before it.

use std::collections::VecDeque;

use ftvmm_devices::Input;
use thiserror::Error;

use crate::check::Check;
use crate::disk::DiskAnswer;
use crate::group::Group;
use crate::record::{End, Event, Ordinal, Record};
use crate::slice::Slice;

/// What the run loop must do next at its exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CursorStep {
    /// Give this input to the devices, then ask again.
    Apply(Input),
    /// Give the devices what the own disk says to this request, after comparing the two. Then ask
    /// again.
    ApplyDisk(DiskAnswer),
    /// Compare with the own execution; unequal is a divergence. Then ask again.
    Check(Box<Check>),
    /// The recorder stopped here without an exit: take over the state of these parts. Then ask
    /// again.
    Load(Vec<Slice>),
    /// The log says no more about this exit: run the guest to the next one.
    Proceed,
    /// Not known yet: more groups have to be pushed first.
    Wait,
    /// The guest ended here on the recorder. A guest that has not ended here too has diverged.
    End(End),
    /// The log was sealed and says nothing about this exit. A backup goes live here; a replay of a
    /// torn or unfinished log ends here.
    Exhausted,
    /// A divergence: the recorder had an event at an exit the replayer went past.
    Missed {
        /// The record that was passed.
        record: Record,
        /// The exit the replayer stands at.
        at: Ordinal,
    },
}

/// A group does not continue the ones before it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CursorError {
    /// The horizon fell.
    #[error("group with horizon {got} follows one with horizon {last}")]
    HorizonFell {
        /// The highest so far.
        last: Ordinal,
        /// The group's.
        got: Ordinal,
    },
    /// A record lies where the log had promised to be complete.
    #[error("group has a record at {at}, but the log was complete through {horizon}")]
    LateRecord {
        /// Ordinal of the record.
        at: Ordinal,
        /// The promise.
        horizon: Ordinal,
    },
    /// The cursor was sealed.
    #[error("a group came after the log was sealed")]
    Sealed,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub struct ReplayCursor {
    records: VecDeque<Record>,
    horizon: Option<Ordinal>,
    sealed: bool,
}

impl ReplayCursor {
    /// A cursor that knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A cursor for a guest that has left `through`, of which the log says nothing more.
    #[must_use]
    pub fn starting_at(through: Ordinal) -> Self {
        Self { horizon: Some(through), ..Self::default() }
    }

    /// Adds the next group.
    ///
    /// # Errors
    /// [`CursorError`] when it does not continue the log; nothing is added then.
    pub fn push_group(&mut self, group: Group) -> Result<(), CursorError> {
        if self.sealed {
            return Err(CursorError::Sealed);
        }
        if let Some(horizon) = self.horizon {
            if group.horizon < horizon {
                return Err(CursorError::HorizonFell { last: horizon, got: group.horizon });
            }
            let first = group.records.first().map(|record| record.at);
            if let Some(at) = first.filter(|at| *at <= horizon) {
                return Err(CursorError::LateRecord { at, horizon });
            }
        }
        self.horizon = Some(group.horizon);
        // It is nothing to do for who follows.
        let is_to_do = |record: &Record| !matches!(record.event, Event::Snapshot(_));
        self.records.extend(group.records.into_iter().filter(is_to_do));
        Ok(())
    }

    /// Says that no more groups will come: the log ended, tore, or its sender is gone.
    /// A slice whose last part never came is forgotten.
    pub fn seal(&mut self) {
        self.sealed = true;
        while let Some(Event::Slice(part)) = self.records.back().map(|record| &record.event)
            && !part.is_last()
        {
            self.records.pop_back();
        }
    }

    /// Whether the log says what follows exit `at.0 - 1`: a slice, or that the recorder made an
    /// exit of its own there.
    #[must_use]
    pub fn knows(&self, at: Ordinal) -> bool {
        self.sealed || self.horizon.is_some_and(|horizon| horizon >= at) || self.has_slice(at)
    }

    /// Whether `at` is the point of a slice, all parts of which are there.
    #[must_use]
    pub fn has_slice(&self, at: Ordinal) -> bool {
        self.slice_parts(at).is_some()
    }

    /// Whether the log is sealed and nothing of it is left at or after `at`.
    #[must_use]
    pub fn is_used_up(&self, at: Ordinal) -> bool {
        self.sealed && self.records.is_empty() && self.horizon.is_none_or(|horizon| horizon < at)
    }

    /// How many parts the slice at the front has.
    fn slice_parts(&self, at: Ordinal) -> Option<usize> {
        let mut parts = self.records.iter().enumerate();
        loop {
            match parts.next()? {
                (index, Record { at: here, event: Event::Slice(part) }) if *here == at => {
                    if part.is_last() {
                        return Some(index + 1);
                    }
                }
                _ => return None,
            }
        }
    }

    /// How far the log is complete; `None` before the first group.
    #[must_use]
    pub fn horizon(&self) -> Option<Ordinal> {
        self.horizon
    }

    /// What to do at exit `at`. Ordinals asked for must not fall.
    pub fn next(&mut self, at: Ordinal) -> CursorStep {
        match self.records.front() {
            Some(record) if record.at < at => CursorStep::Missed { record: record.clone(), at },
            Some(record) if record.at == at => self.take_front(at),
            _ if self.horizon.is_some_and(|horizon| horizon >= at) => CursorStep::Proceed,
            _ if self.sealed => CursorStep::Exhausted,
            _ => CursorStep::Wait,
        }
    }

    fn take_front(&mut self, at: Ordinal) -> CursorStep {
        if let Some(Record { event: Event::Slice(_), .. }) = self.records.front() {
            let Some(parts) = self.slice_parts(at) else { return CursorStep::Wait };
            let parts = self.records.drain(..parts).filter_map(|record| match record.event {
                Event::Slice(part) => Some(part),
                _ => None,
            });
            return CursorStep::Load(parts.collect());
        }
        match self.records.pop_front().map(|record| record.event) {
            Some(Event::Input(input)) => CursorStep::Apply(input),
            Some(Event::DiskAnswer(answer)) => CursorStep::ApplyDisk(answer),
            Some(Event::Check(check)) => CursorStep::Check(check),
            Some(Event::End(end)) => CursorStep::End(end),
            Some(Event::Slice(_) | Event::Snapshot(_)) | None => CursorStep::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{EndReason, SnapshotMark};

    fn time(at: u64, now_ns: u64) -> Record {
        Record { at: Ordinal(at), event: Event::Input(Input::Time { now_ns }) }
    }

    fn group(horizon: u64, records: Vec<Record>) -> Group {
        Group { horizon: Ordinal(horizon), records }
    }

    fn apply(now_ns: u64) -> CursorStep {
        CursorStep::Apply(Input::Time { now_ns })
    }

    #[test]
    fn waits_for_the_horizon_and_applies_in_order() {
        let mut cursor = ReplayCursor::new();
        assert_eq!(cursor.next(Ordinal(1)), CursorStep::Wait);
        cursor.push_group(group(2, vec![time(2, 10), time(2, 20), time(3, 30)])).unwrap();
        assert_eq!(cursor.next(Ordinal(1)), CursorStep::Proceed);
        assert_eq!(cursor.next(Ordinal(2)), apply(10));
        assert_eq!(cursor.next(Ordinal(2)), apply(20));
        assert_eq!(cursor.next(Ordinal(2)), CursorStep::Proceed);
        // The recorder still stood at exit 3 when it closed the group: more may come for it.
        assert_eq!(cursor.next(Ordinal(3)), apply(30));
        assert_eq!(cursor.next(Ordinal(3)), CursorStep::Wait);
        cursor.push_group(group(3, vec![time(3, 40)])).unwrap();
        assert_eq!(cursor.next(Ordinal(3)), apply(40));
        assert_eq!(cursor.next(Ordinal(3)), CursorStep::Proceed);
    }

    #[test]
    fn checks_and_the_end_are_handed_out() {
        let reason = EndReason::PowerOff;
        let end = End { state_digest: [1; 32], chain: 2, outputs: 3, reason };
        let check = Box::new(Check { chain: 5, ..Check::default() });
        let mut cursor = ReplayCursor::new();
        let records = vec![
            Record { at: Ordinal(4), event: Event::Check(check.clone()) },
            Record { at: Ordinal(5), event: Event::End(end) },
        ];
        cursor.push_group(group(5, records)).unwrap();
        assert_eq!(cursor.next(Ordinal(4)), CursorStep::Check(check));
        assert_eq!(cursor.next(Ordinal(5)), CursorStep::End(end));
    }

    #[test]
    fn a_snapshot_is_nothing_to_do() {
        let mark = SnapshotMark { path: "/s".into(), memory_digest: 1 };
        let snapshot = |at| Record { at: Ordinal(at), event: Event::Snapshot(mark.clone()) };
        let mut cursor = ReplayCursor::new();
        cursor
            .push_group(group(2, vec![time(2, 10), snapshot(2), time(2, 20), snapshot(3)]))
            .unwrap();
        assert_eq!(cursor.next(Ordinal(2)), apply(10));
        assert_eq!(cursor.next(Ordinal(2)), apply(20));
        cursor.seal();
        assert!(cursor.is_used_up(Ordinal(3)));
    }

    fn part(at: u64, pages: u8, cpu: Option<Vec<u8>>) -> Record {
        let slice = Slice { pages: vec![pages], cpu };
        Record { at: Ordinal(at), event: Event::Slice(slice) }
    }

    #[test]
    fn a_slice_is_handed_out_when_it_is_whole() {
        let mut cursor = ReplayCursor::new();
        cursor.push_group(group(4, vec![part(5, 1, None)])).unwrap();
        assert!(!cursor.knows(Ordinal(5)) && !cursor.has_slice(Ordinal(5)));
        assert_eq!(cursor.next(Ordinal(4)), CursorStep::Proceed);
        assert_eq!(cursor.next(Ordinal(5)), CursorStep::Wait);
        cursor.push_group(group(4, vec![part(5, 2, Some(vec![9])), time(5, 10)])).unwrap();
        assert!(cursor.knows(Ordinal(5)) && cursor.has_slice(Ordinal(5)));
        let parts =
            vec![Slice { pages: vec![1], cpu: None }, Slice { pages: vec![2], cpu: Some(vec![9]) }];
        assert_eq!(cursor.next(Ordinal(5)), CursorStep::Load(parts));
        assert_eq!(cursor.next(Ordinal(5)), apply(10));
    }

    #[test]
    fn half_a_slice_is_forgotten_when_no_more_comes() {
        let mut cursor = ReplayCursor::new();
        cursor.push_group(group(4, vec![part(5, 1, None), part(5, 2, None)])).unwrap();
        assert!(!cursor.is_used_up(Ordinal(5)));
        cursor.seal();
        assert!(cursor.is_used_up(Ordinal(5)) && !cursor.is_used_up(Ordinal(4)));
        assert_eq!(cursor.next(Ordinal(5)), CursorStep::Exhausted);
    }

    #[test]
    fn a_record_gone_past_is_a_divergence() {
        let mut cursor = ReplayCursor::new();
        cursor.push_group(group(9, vec![time(4, 10)])).unwrap();
        let missed = CursorStep::Missed { record: time(4, 10), at: Ordinal(5) };
        assert_eq!(cursor.next(Ordinal(5)), missed);
        assert_eq!(
            cursor.next(Ordinal(6)),
            CursorStep::Missed { record: time(4, 10), at: Ordinal(6) }
        );
    }

    #[test]
    fn a_sealed_log_is_used_up_before_it_is_exhausted() {
        let mut cursor = ReplayCursor::new();
        cursor.push_group(group(2, vec![time(3, 10)])).unwrap();
        cursor.seal();
        assert_eq!(cursor.next(Ordinal(2)), CursorStep::Proceed);
        assert_eq!(cursor.next(Ordinal(3)), apply(10));
        assert_eq!(cursor.next(Ordinal(3)), CursorStep::Exhausted);
        assert_eq!(cursor.push_group(group(4, vec![])), Err(CursorError::Sealed));
    }

    #[test]
    fn a_group_must_continue_the_log() {
        let mut cursor = ReplayCursor::new();
        cursor.push_group(group(5, vec![])).unwrap();
        let fell = CursorError::HorizonFell { last: Ordinal(5), got: Ordinal(4) };
        assert_eq!(cursor.push_group(group(4, vec![])), Err(fell));
        let late = CursorError::LateRecord { at: Ordinal(5), horizon: Ordinal(5) };
        assert_eq!(cursor.push_group(group(6, vec![time(5, 0)])), Err(late));
        assert_eq!(cursor.horizon(), Some(Ordinal(5)));
    }
}
