//! The replay cursor: tells the run loop what the log wants at the exit it stands at.
//!
//! Why: the replayer must not leave an exit before it knows everything the recorder did there. The
//! horizon of the groups pushed so far says how far that is known.
//! Invariants: horizons never fall between groups, and no group holds a record at or before the
//! horizon of the group before it.

use std::collections::VecDeque;

use ftvmm_devices::Input;
use thiserror::Error;

use crate::group::Group;
use crate::record::{Check, End, Event, Ordinal, Record};

/// What the run loop must do next at its exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CursorStep {
    /// Give this input to the devices, then ask again.
    Apply(Input),
    /// Compare with the own chain digest; unequal is a divergence. Then ask again.
    Check(Check),
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
        self.records.extend(group.records);
        Ok(())
    }

    /// Says that no more groups will come: the log ended, tore, or its sender is gone.
    pub fn seal(&mut self) {
        self.sealed = true;
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
            Some(record) if record.at == at => self.take_front(),
            _ if self.horizon.is_some_and(|horizon| horizon >= at) => CursorStep::Proceed,
            _ if self.sealed => CursorStep::Exhausted,
            _ => CursorStep::Wait,
        }
    }

    fn take_front(&mut self) -> CursorStep {
        match self.records.pop_front().map(|record| record.event) {
            Some(Event::Input(input)) => CursorStep::Apply(input),
            Some(Event::Check(check)) => CursorStep::Check(check),
            Some(Event::End(end)) => CursorStep::End(end),
            None => CursorStep::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::EndReason;

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
        let end = End { state_digest: [1; 32], reason: EndReason::PowerOff };
        let check = Check { chain: 5 };
        let mut cursor = ReplayCursor::new();
        let records = vec![
            Record { at: Ordinal(4), event: Event::Check(check) },
            Record { at: Ordinal(5), event: Event::End(end) },
        ];
        cursor.push_group(group(5, records)).unwrap();
        assert_eq!(cursor.next(Ordinal(4)), CursorStep::Check(check));
        assert_eq!(cursor.next(Ordinal(5)), CursorStep::End(end));
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
