//! What `ftvmm log stat` and `ftvmm log diff` say about log files.

use core::fmt;
use std::io::Read;

use ftvmm_devices::Input;
use serde::Serialize;

use crate::fingerprint::Difference;
use crate::group::Group;
use crate::log::{LogError, LogReader, Tail};
use crate::record::{End, Event, Ordinal, Record};

/// A log in numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LogStat {
    /// Exits the recorder is known to have left.
    pub exits: u64,
    /// Groups.
    pub groups: u64,
    /// Length of the readable part of the file.
    pub log_bytes: u64,
    /// Guest time at the last time record, in nanoseconds since power-on.
    pub duration_ns: u64,
    /// Time inputs.
    pub time_inputs: u64,
    /// Frames received.
    pub net_rx_inputs: u64,
    /// Bytes of those frames, virtio headers included.
    pub net_rx_bytes: u64,
    /// Console inputs.
    pub console_rx_inputs: u64,
    /// Bytes of those.
    pub console_rx_bytes: u64,
    /// Entropy inputs.
    pub entropy_inputs: u64,
    /// Random bytes of those.
    pub entropy_bytes: u64,
    /// Digests to compare.
    pub checks: u64,
    /// Slices.
    pub slices: u64,
    /// Bytes of their pages, before compression.
    pub slice_bytes: u64,
    /// Why the guest ended, if the log says so.
    pub end_reason: Option<String>,
    /// State digest at the end, in hexadecimal, if the log says so.
    pub state_digest: Option<String>,
    /// Where the log is torn, if it is.
    pub torn_at_bytes: Option<u64>,
}

/// Reads a log to its end and counts.
///
/// # Errors
/// Those of [`LogReader::next_group`]. A torn log is no error.
pub fn stat<R: Read>(reader: &mut LogReader<R>) -> Result<LogStat, LogError> {
    let mut stat = LogStat {
        exits: 0,
        groups: 0,
        log_bytes: 0,
        duration_ns: 0,
        time_inputs: 0,
        net_rx_inputs: 0,
        net_rx_bytes: 0,
        console_rx_inputs: 0,
        console_rx_bytes: 0,
        entropy_inputs: 0,
        entropy_bytes: 0,
        checks: 0,
        slices: 0,
        slice_bytes: 0,
        end_reason: None,
        state_digest: None,
        torn_at_bytes: None,
    };
    while let Some(group) = reader.next_group()? {
        stat.groups += 1;
        stat.exits = group.horizon.0;
        group.records.iter().for_each(|record| stat.count(&record.event));
    }
    stat.log_bytes = reader.offset_bytes();
    if let Some(Tail::Torn { offset_bytes, .. }) = reader.tail() {
        stat.torn_at_bytes = Some(*offset_bytes);
    }
    Ok(stat)
}

impl LogStat {
    fn count(&mut self, event: &Event) {
        match event {
            Event::Input(Input::Time { now_ns }) => {
                self.time_inputs += 1;
                self.duration_ns = *now_ns;
            }
            Event::Input(Input::NetRx { frame }) => {
                self.net_rx_inputs += 1;
                self.net_rx_bytes += frame.len() as u64;
            }
            Event::Input(Input::ConsoleRx { bytes }) => {
                self.console_rx_inputs += 1;
                self.console_rx_bytes += bytes.len() as u64;
            }
            Event::Input(Input::Entropy { bytes }) => {
                self.entropy_inputs += 1;
                self.entropy_bytes += bytes.len() as u64;
            }
            Event::Check(_) => self.checks += 1,
            Event::Slice(slice) => {
                self.slices += u64::from(slice.is_last());
                self.slice_bytes += slice.pages.len() as u64;
            }
            Event::End(End { state_digest, reason }) => {
                self.end_reason = Some(reason.to_string());
                self.state_digest = Some(crate::record::Hex(state_digest).to_string());
            }
        }
    }

    /// Inputs of every kind.
    #[must_use]
    pub fn inputs(&self) -> u64 {
        self.time_inputs + self.net_rx_inputs + self.console_rx_inputs + self.entropy_inputs
    }
}

impl fmt::Display for LogStat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.duration_ns as f64 / 1e9;
        writeln!(f, "exits       {}", self.exits)?;
        writeln!(f, "inputs      {}", self.inputs())?;
        writeln!(f, "  time      {}", self.time_inputs)?;
        writeln!(f, "  net-rx    {} ({} bytes)", self.net_rx_inputs, self.net_rx_bytes)?;
        writeln!(f, "  console   {} ({} bytes)", self.console_rx_inputs, self.console_rx_bytes)?;
        writeln!(f, "  entropy   {} ({} bytes)", self.entropy_inputs, self.entropy_bytes)?;
        writeln!(f, "checks      {}", self.checks)?;
        writeln!(f, "slices      {} ({} bytes)", self.slices, self.slice_bytes)?;
        writeln!(f, "groups      {}", self.groups)?;
        writeln!(f, "log         {} bytes", self.log_bytes)?;
        writeln!(f, "guest time  {seconds:.3} s")?;
        if self.duration_ns > 0 {
            writeln!(f, "log rate    {:.1} kbit/s", self.log_bytes as f64 * 0.008 / seconds)?;
        }
        match (&self.end_reason, self.torn_at_bytes) {
            (Some(reason), _) => writeln!(f, "end         {reason}")?,
            (None, Some(at)) => writeln!(f, "end         torn at byte {at}")?,
            (None, None) => writeln!(f, "end         not recorded")?,
        }
        if let Some(state_digest) = &self.state_digest {
            writeln!(f, "state       {state_digest}")?;
        }
        Ok(())
    }
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
    /// A record differs, or one log ends here.
    Record {
        /// Position of the record, counted from zero.
        index: u64,
        /// The record in the first log.
        a: Option<Record>,
        /// The record in the second log.
        b: Option<Record>,
    },
    /// All records agree, but the logs reach different exits.
    Horizon {
        /// Last horizon of the first log.
        a: Ordinal,
        /// Last horizon of the second.
        b: Ordinal,
    },
}

impl fmt::Display for LogDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |side: &Option<Record>| {
            side.as_ref().map_or_else(|| "end of log".to_owned(), Record::to_string)
        };
        match self {
            Self::Fingerprint(Difference { fact, ours, theirs }) => {
                write!(f, "{fact} differs\n- {ours}\n+ {theirs}")
            }
            Self::RtcEpoch { a_s, b_s } => write!(f, "RTC epoch differs\n- {a_s} s\n+ {b_s} s"),
            Self::Record { index, a, b } => {
                write!(f, "record {index} differs\n- {}\n+ {}", text(a), text(b))
            }
            Self::Horizon { a, b } => write!(f, "last exit differs\n- {a}\n+ {b}"),
        }
    }
}

/// Records of a log one by one, across group boundaries.
struct Records<'r, R> {
    reader: &'r mut LogReader<R>,
    group: std::vec::IntoIter<Record>,
    horizon: Ordinal,
}

impl<'r, R: Read> Records<'r, R> {
    fn new(reader: &'r mut LogReader<R>) -> Self {
        Self { reader, group: Vec::new().into_iter(), horizon: Ordinal(0) }
    }

    fn next(&mut self) -> Result<Option<Record>, LogError> {
        loop {
            if let Some(record) = self.group.next() {
                return Ok(Some(record));
            }
            let Some(Group { horizon, records }) = self.reader.next_group()? else {
                return Ok(None);
            };
            self.horizon = horizon;
            self.group = records.into_iter();
        }
    }
}

/// Where two logs first say different things; `None` when they say the same. How records are
/// grouped does not matter.
///
/// # Errors
/// Those of [`LogReader::next_group`], of either log.
pub fn first_difference<A: Read, B: Read>(
    a: &mut LogReader<A>,
    b: &mut LogReader<B>,
) -> Result<Option<LogDifference>, LogError> {
    if let Some(difference) = a.header().fingerprint.first_difference(&b.header().fingerprint) {
        return Ok(Some(LogDifference::Fingerprint(difference)));
    }
    let (a_s, b_s) = (a.header().rtc_epoch_s, b.header().rtc_epoch_s);
    if a_s != b_s {
        return Ok(Some(LogDifference::RtcEpoch { a_s, b_s }));
    }
    let (mut a, mut b) = (Records::new(a), Records::new(b));
    for index in 0.. {
        let (a, b) = match (a.next()?, b.next()?) {
            (None, None) => break,
            records => records,
        };
        if a != b {
            return Ok(Some(LogDifference::Record { index, a, b }));
        }
    }
    let (a, b) = (a.horizon, b.horizon);
    Ok((a != b).then_some(LogDifference::Horizon { a, b }))
}

#[cfg(test)]
#[path = "log_stat_tests.rs"]
mod tests;
