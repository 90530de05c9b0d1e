//! A log sink that is a file.

use std::io::Write;

use ftvmm_devices::Input;
use ftvmm_replication::{End, Event, GroupEncoder, LogWriter, Ordinal, Record};

use super::InputError;
use super::recorded::LogSink;

/// A group is closed when it holds this much, ...
const GROUP_BYTES: u64 = 64 * 1024;
/// ... or when its guest time spans this much, in nanoseconds, so that a torn file loses little, ...
const GROUP_NS: u64 = 1_000_000_000;
/// ... or when the guest went through this many exits without looking at a clock.
const GROUP_EXITS: u64 = 4096;

/// A group that holds this much does not wait for the guest to leave its exit.
pub const SLICE_GROUP_BYTES: u64 = 1 << 20;

/// Writes a recording.
pub struct FileLog<W: Write> {
    writer: LogWriter<W>,
    group: GroupEncoder,
    group_since: Ordinal,
    /// Guest time at which the group began, and the last one seen.
    group_since_ns: u64,
    now_ns: u64,
    left: Ordinal,
}

impl<W: Write> FileLog<W> {
    /// A log that goes to `writer`, whose header is written, of a guest that has left `left`.
    pub fn new(writer: LogWriter<W>, left: Ordinal) -> Self {
        let group_since = left;
        let group = GroupEncoder::new();
        Self { writer, group, group_since, group_since_ns: 0, now_ns: 0, left }
    }

    /// Writes how the guest ended, if it ended where a replay can end too, and closes the file; returns its
    /// length in bytes. `at` is the first exit the guest did not get past.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(mut self, at: Ordinal, end: Option<End>) -> Result<u64, InputError> {
        if let Some(end) = end {
            self.append(&Record { at, event: Event::End(end) })?;
        }
        self.close_group()?;
        let bytes = self.writer.written_bytes();
        self.writer.finish().map_err(|source| InputError::LogWrite { source })?;
        Ok(bytes)
    }

    fn close_group(&mut self) -> Result<(), InputError> {
        self.group_since = self.left;
        self.group_since_ns = self.now_ns;
        let group = self.group.finish(self.left);
        self.writer.write_group(&group).map_err(|source| InputError::LogWrite { source })
    }
}

impl<W: Write> LogSink for FileLog<W> {
    fn append(&mut self, record: &Record) -> Result<(), InputError> {
        self.group.push(record);
        if let Event::Input(Input::Time { now_ns }) = record.event {
            self.now_ns = now_ns;
        }
        // A big slice fills several groups while the guest stands still.
        if self.group.body_bytes() >= SLICE_GROUP_BYTES {
            self.close_group()?;
        }
        Ok(())
    }

    fn left(&mut self, at: Ordinal) -> Result<(), InputError> {
        self.left = at;
        let full = self.group.body_bytes() >= GROUP_BYTES;
        let old = self.now_ns - self.group_since_ns >= GROUP_NS;
        if full || old || at.0 - self.group_since.0 >= GROUP_EXITS {
            self.close_group()?;
        }
        Ok(())
    }

    fn rest(&mut self) -> Result<(), InputError> {
        Ok(())
    }
}
