//! What `ftvmm log stat` says about log files.

use core::fmt;
use std::io::Read;

use ftvmm_devices::{DiskOutcome, Input};
use serde::Serialize;

use crate::log::{LogError, LogReader, Tail};
use crate::record::{End, Event};

/// A log in numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LogStat {
    /// The program that made the recording.
    pub build: String,
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
    /// Answers of the disk.
    pub disk_inputs: u64,
    /// Bytes read of those; 0 where the log has no data.
    pub disk_bytes: u64,
    /// Presses of the power button, interrupts, breaks and the like: what has a kind of its own.
    pub other_inputs: u64,
    /// Digests to compare.
    pub checks: u64,
    /// Slices.
    pub slices: u64,
    /// Bytes of their pages, before compression.
    pub slice_bytes: u64,
    /// Snapshots taken.
    pub snapshots: u64,
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
        build: reader.header().build.to_string(),
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
        disk_inputs: 0,
        disk_bytes: 0,
        other_inputs: 0,
        checks: 0,
        slices: 0,
        slice_bytes: 0,
        snapshots: 0,
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
            Event::Input(Input::DiskDone { outcome, .. }) => {
                self.disk_inputs += 1;
                if let DiskOutcome::Done { data } = outcome {
                    self.disk_bytes += data.len() as u64;
                }
            }
            Event::DiskAnswer(_) => self.disk_inputs += 1,
            Event::Input(
                Input::PowerButton
                | Input::Nmi
                | Input::ConsoleBreak
                | Input::NetAnnounce
                | Input::NewIdentity { .. },
            ) => self.other_inputs += 1,
            Event::Check(_) => self.checks += 1,
            Event::Slice(slice) => {
                self.slices += u64::from(slice.is_last());
                self.slice_bytes += slice.pages.len() as u64;
            }
            Event::Snapshot(_) => self.snapshots += 1,
            Event::End(End { state_digest, reason, .. }) => {
                self.end_reason = Some(reason.to_string());
                self.state_digest = Some(crate::record::Hex(state_digest).to_string());
            }
        }
    }

    /// Inputs of every kind.
    #[must_use]
    pub fn inputs(&self) -> u64 {
        self.time_inputs
            + self.net_rx_inputs
            + self.console_rx_inputs
            + self.entropy_inputs
            + self.disk_inputs
            + self.other_inputs
    }
}

impl fmt::Display for LogStat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.duration_ns as f64 / 1e9;
        writeln!(f, "build       {}", self.build)?;
        writeln!(f, "exits       {}", self.exits)?;
        writeln!(f, "inputs      {}", self.inputs())?;
        writeln!(f, "  time      {}", self.time_inputs)?;
        writeln!(f, "  net-rx    {} ({} bytes)", self.net_rx_inputs, self.net_rx_bytes)?;
        writeln!(f, "  console   {} ({} bytes)", self.console_rx_inputs, self.console_rx_bytes)?;
        writeln!(f, "  entropy   {} ({} bytes)", self.entropy_inputs, self.entropy_bytes)?;
        writeln!(f, "  disk      {} ({} bytes)", self.disk_inputs, self.disk_bytes)?;
        writeln!(f, "  other     {}", self.other_inputs)?;
        writeln!(f, "checks      {}", self.checks)?;
        writeln!(f, "slices      {} ({} bytes)", self.slices, self.slice_bytes)?;
        writeln!(f, "snapshots   {}", self.snapshots)?;
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

#[cfg(test)]
#[path = "log_stat_tests.rs"]
pub(crate) mod tests;
