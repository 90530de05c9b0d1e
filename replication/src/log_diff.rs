//! What `ftvmm log diff` finds: the first exit at which two recordings of the same inputs part.
//!
//! Why not record by record: two recordings of one execution may state checks at different exits.
//! So inputs, slices and the end are compared in order, and checks where both logs have one.
//! Invariants relied on: records that are not checks come in the same order in both, and where
//! both have a check of memory, its list of pages begins at the same copy. Both hold because a
//! replay that is recorded passes on what it reads and takes no copies of its own.

use core::fmt;
use std::io::Read;

use thiserror::Error;

use crate::check::{Check, CpuCheck};
use crate::fingerprint::Difference;
use crate::group::Group;
use crate::log::{LogError, LogHeader, LogReader};
use crate::record::{Event, Ordinal, Record};

/// How two logs compare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogComparison {
    /// Checks at exits where both logs have one, up to the difference.
    pub checks_compared: u64,
    /// Checks at exits where only one log has one, up to the difference.
    pub checks_alone: u64,
    /// The first place where they part; `None` when they say the same.
    pub difference: Option<LogDifference>,
}

/// The first place where two logs part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogDifference {
    /// They were recorded from different machines.
    Fingerprint(Difference),
    /// Their guests were told different dates at power-on.
    RtcEpoch {
        /// Seconds since 1970, in the first log.
        a_s: u64,
        /// The same in the second.
        b_s: u64,
    },
    /// They begin at different points of the guest's life.
    Start {
        /// The exit of the first log's snapshot; 0 for power-on.
        a: Ordinal,
        /// The same of the second.
        b: Ordinal,
    },
    /// The guests were given different things, ended differently, or one log ends here.
    Record {
        /// The exit of the earlier of the two.
        at: Ordinal,
        /// The record in the first log.
        a: Option<Record>,
        /// The record in the second log.
        b: Option<Record>,
    },
    /// The guests were given the same and are not the same.
    State(Box<StateDifference>),
    /// All records agree, but the logs reach different exits.
    Horizon {
        /// Last horizon of the first log.
        a: Ordinal,
        /// Last horizon of the second.
        b: Ordinal,
    },
}

/// The first check that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDifference {
    /// Its exit.
    pub at: Ordinal,
    /// The last exit before it at which what differs here was compared and was equal; 0 for none.
    pub agreed: Ordinal,
    /// The processor there, where a check says it.
    pub before: Option<CpuCheck>,
    /// The check in the first log.
    pub a: Check,
    /// The check in the second.
    pub b: Check,
}

impl LogDifference {
    fn record(a: Option<Record>, b: Option<Record>) -> Self {
        let at = [&a, &b].into_iter().flatten().map(|record| record.at).min().unwrap_or_default();
        Self::Record { at, a, b }
    }
}

/// One line; what differs in detail is in the fields.
impl fmt::Display for LogDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fingerprint(Difference { fact, ours, theirs }) => {
                write!(f, "{fact} differs: {ours} and {theirs}")
            }
            Self::RtcEpoch { a_s, b_s } => write!(f, "RTC epoch differs: {a_s} s and {b_s} s"),
            Self::Start { a, b } => write!(f, "the recordings begin at exit {a} and at exit {b}"),
            Self::Record { at, a: Some(_), b: Some(_) } => write!(f, "records differ at exit {at}"),
            Self::Record { at, a, .. } => {
                let which = if a.is_none() { "first" } else { "second" };
                write!(f, "the {which} recording ends before exit {at}")
            }
            Self::State(state) if state.is_exact() => {
                write!(f, "state differs at exit {}", state.at)
            }
            Self::State(state) => {
                write!(
                    f,
                    "state differs after exit {}, at or before exit {}",
                    state.agreed, state.at
                )
            }
            Self::Horizon { a, b } => write!(f, "last exit differs: {a} and {b}"),
        }
    }
}

impl StateDifference {
    /// True when the exit before had been compared too: the guests parted between these two.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.agreed.next() == self.at
    }
}

/// One of the two logs cannot be read on.
#[derive(Debug, Error)]
#[error("{cause}")]
pub struct CompareError {
    /// It is the second.
    pub in_second: bool,
    /// The cause.
    pub cause: LogError,
}

/// Records of a log one by one, across group boundaries.
struct Records<'r, R> {
    is_second: bool,
    reader: &'r mut LogReader<R>,
    group: std::iter::Peekable<std::vec::IntoIter<Record>>,
    horizon: Ordinal,
}

impl<'r, R: Read> Records<'r, R> {
    fn new(reader: &'r mut LogReader<R>, is_second: bool) -> Self {
        let group = Vec::new().into_iter().peekable();
        Self { is_second, reader, group, horizon: Ordinal(0) }
    }

    fn peek(&mut self) -> Result<Option<&Record>, CompareError> {
        while self.group.peek().is_none() {
            let in_second = self.is_second;
            let group = self.reader.next_group();
            let group = group.map_err(|cause| CompareError { in_second, cause })?;
            let Some(Group { horizon, mut records }) = group else {
                return Ok(None);
            };
            records.retain(|record| !matches!(record.event, Event::Snapshot(_)));
            self.horizon = horizon;
            self.group = records.into_iter().peekable();
        }
        Ok(self.group.peek())
    }

    /// The exit of the next record, if that is a check.
    fn check_at(&mut self) -> Result<Option<Ordinal>, CompareError> {
        let is_check = |record: &&Record| matches!(record.event, Event::Check(_));
        Ok(self.peek()?.filter(is_check).map(|record| record.at))
    }

    fn next(&mut self) -> Result<Option<Record>, CompareError> {
        self.peek()?;
        Ok(self.group.next())
    }

    fn next_check(&mut self) -> Result<Check, CompareError> {
        Ok(match self.next()?.map(|record| record.event) {
            Some(Event::Check(check)) => *check,
            _ => Check::default(),
        })
    }
}

/// The last exits at which both executions were compared and equal.
#[derive(Clone, Default)]
struct Agreed {
    /// In exits and processor.
    cpu: Point,
    /// In memory.
    memory: Point,
}

#[derive(Clone, Default)]
struct Point {
    at: Ordinal,
    cpu: Option<CpuCheck>,
}

impl Agreed {
    /// Compares two checks of the same exit.
    fn compare(&mut self, at: Ordinal, a: Check, b: Check) -> Option<LogDifference> {
        let in_cpu = (a.chain, &a.cpu) != (b.chain, &b.cpu);
        let in_memory = a.memory_differs(&b);
        if in_cpu || in_memory {
            let Point { at: agreed, cpu: before } =
                if in_cpu { self.cpu.clone() } else { self.memory.clone() };
            let found = StateDifference { at, agreed, before, a, b };
            return Some(LogDifference::State(Box::new(found)));
        }
        self.cpu = Point { at, cpu: Some(a.cpu) };
        if a.memory.is_some() && b.memory.is_some() {
            self.memory = self.cpu.clone();
        }
        None
    }

    /// A whole slice that is the same in both logs: it is the state.
    fn slice(&mut self, at: Ordinal) {
        self.cpu = Point { at, cpu: None };
        self.memory = self.cpu.clone();
    }
}

/// Compares two logs up to the first difference. How records are grouped does not matter.
///
/// # Errors
/// Those of [`LogReader::next_group`], of either log.
pub fn compare<A: Read, B: Read>(
    a: &mut LogReader<A>,
    b: &mut LogReader<B>,
) -> Result<LogComparison, CompareError> {
    let mut found = LogComparison::default();
    let (a_s, b_s) = (a.header().rtc_epoch_s, b.header().rtc_epoch_s);
    let begins = |header: &LogHeader| header.start.as_ref().map(|start| start.at);
    let (a_at, b_at) = (begins(a.header()), begins(b.header()));
    found.difference = match a.header().fingerprint.first_difference(&b.header().fingerprint) {
        Some(difference) => Some(LogDifference::Fingerprint(difference)),
        None if a_s != b_s => Some(LogDifference::RtcEpoch { a_s, b_s }),
        None if a_at != b_at => {
            Some(LogDifference::Start { a: a_at.unwrap_or_default(), b: b_at.unwrap_or_default() })
        }
        None => {
            compare_records(&mut Records::new(a, false), &mut Records::new(b, true), &mut found)?
        }
    };
    Ok(found)
}

fn compare_records<A: Read, B: Read>(
    a: &mut Records<'_, A>,
    b: &mut Records<'_, B>,
    found: &mut LogComparison,
) -> Result<Option<LogDifference>, CompareError> {
    let mut agreed = Agreed::default();
    loop {
        match (a.check_at()?, b.check_at()?) {
            (Some(at), Some(other)) if at == other => {
                found.checks_compared += 1;
                let difference = agreed.compare(at, a.next_check()?, b.next_check()?);
                if difference.is_some() {
                    return Ok(difference);
                }
            }
            // The other log has none here: it is past this exit, or differs before it.
            (Some(at), other) if other.is_none_or(|other| at < other) => {
                found.checks_alone += 1;
                a.next()?;
            }
            (_, Some(_)) => {
                found.checks_alone += 1;
                b.next()?;
            }
            (_, None) => match (a.next()?, b.next()?) {
                (None, None) => break,
                (Some(own), Some(theirs)) if own == theirs => {
                    if matches!(&own.event, Event::Slice(part) if part.is_last()) {
                        agreed.slice(own.at);
                    }
                }
                (own, theirs) => return Ok(Some(LogDifference::record(own, theirs))),
            },
        }
    }
    let (a, b) = (a.horizon, b.horizon);
    Ok((a != b).then_some(LogDifference::Horizon { a, b }))
}

#[cfg(test)]
#[path = "log_diff_tests.rs"]
mod tests;
