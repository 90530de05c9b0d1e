//! The log file: a header that says what a replay relies on, then groups to the end.
//!
//! The header is [`crate::file_header`]; groups are [`crate::group`].
//!
//! A file may end anywhere, because a host may die at any time. What lies before the tear is
//! complete and usable. A tear has nothing readable after it; a group that cannot be read although
//! a later one can is damage, and reported as an error.
//! Why the rule: a flipped bit in a length may point past the end of the file and look like a tear.

use std::io::{self, Read, Write};

use thiserror::Error;

pub use crate::file_header::FileHeader as LogHeader;
use crate::file_header::{HeaderError, Kind};
use crate::group::{CodecError, GROUP_BYTES_MAX, Group, decode_group, group_length, peek_group};
use crate::record::Ordinal;

/// First bytes of every log file.
pub const LOG_MAGIC: [u8; 8] = *b"FTVMMLOG";
/// Version of the file format written here, and the only one read.
pub const LOG_VERSION: u32 = 5;
const KIND: Kind = Kind { name: "log", magic: LOG_MAGIC, version: LOG_VERSION };
const READ_BYTES: usize = 64 << 10;
/// Bytes searched after an unreadable group of unknown length, to tell a tear from damage.
const SCAN_BYTES: usize = 1 << 20;
/// Largest one found so: to check a group at every place costs its length each time.
const SCANNED_GROUP_BYTES_MAX: usize = 64 << 10;

/// Why a log could not be written or read.
#[derive(Debug, Error)]
pub enum LogError {
    /// The writer failed.
    #[error("cannot write the log: {0}")]
    Write(io::Error),
    /// The reader failed.
    #[error("cannot read the log: {0}")]
    Read(io::Error),
    /// The header is none, or cannot be written.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A group in the middle of the file is damaged.
    #[error("log group at offset {offset_bytes} is damaged: {cause}")]
    GroupDamaged {
        /// Where the group begins in the file.
        offset_bytes: u64,
        /// What does not hold.
        cause: CodecError,
    },
}

/// Writes a log file.
#[derive(Debug)]
pub struct LogWriter<W> {
    writer: W,
    written_bytes: u64,
}

impl<W: Write> LogWriter<W> {
    /// Begins a log with its header.
    ///
    /// # Errors
    /// [`LogError::Write`] and [`LogError::Header`].
    pub fn new(mut writer: W, header: &LogHeader) -> Result<Self, LogError> {
        let file = KIND.encode(header)?;
        writer.write_all(&file).map_err(LogError::Write)?;
        Ok(Self { writer, written_bytes: file.len() as u64 })
    }

    /// Appends a finished group (the bytes of [`crate::GroupEncoder::finish`]).
    ///
    /// # Errors
    /// [`LogError::Write`]. The recorder must stop: a log with a hole replays nothing.
    pub fn write_group(&mut self, group: &[u8]) -> Result<(), LogError> {
        debug_assert!(peek_group(group).is_ok(), "only finished groups are written");
        self.writer.write_all(group).map_err(LogError::Write)?;
        self.written_bytes += group.len() as u64;
        Ok(())
    }

    /// Length of the file so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Hands what was written on to the host.
    ///
    /// # Errors
    /// [`LogError::Write`].
    pub fn flush(&mut self) -> Result<(), LogError> {
        self.writer.flush().map_err(LogError::Write)
    }

    /// Flushes and gives the writer back, for the caller to sync or close.
    ///
    /// # Errors
    /// [`LogError::Write`].
    pub fn finish(mut self) -> Result<W, LogError> {
        self.flush()?;
        Ok(self.writer)
    }
}

/// How the groups of a file ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tail {
    /// The file ends where a group ends.
    Clean,
    /// The file ends inside a group: its writer died. Everything before was yielded.
    Torn {
        /// Where the incomplete group begins in the file.
        offset_bytes: u64,
        /// What is wrong with it.
        reason: CodecError,
    },
}

/// Reads a log file group by group.
#[derive(Debug)]
pub struct LogReader<R> {
    reader: R,
    header: LogHeader,
    /// Read but not yet decoded; begins at `offset_bytes` of the file.
    buffer: Vec<u8>,
    consumed: usize,
    offset_bytes: u64,
    horizon: Ordinal,
    tail: Option<Tail>,
}

impl<R: Read> LogReader<R> {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`LogError::Header`].
    pub fn new(mut reader: R) -> Result<Self, LogError> {
        let (header, offset_bytes) = KIND.read(&mut reader)?;
        Ok(Self {
            reader,
            header,
            buffer: Vec::new(),
            consumed: 0,
            offset_bytes,
            horizon: Ordinal(0),
            tail: None,
        })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &LogHeader {
        &self.header
    }

    /// How the file ended, once [`Self::next_group`] has returned `None`.
    #[must_use]
    pub fn tail(&self) -> Option<&Tail> {
        self.tail.as_ref()
    }

    /// Bytes of the file read and decoded so far.
    #[must_use]
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// The next group; `None` at the end, whose kind [`Self::tail`] tells.
    ///
    /// # Errors
    /// [`LogError::Read`] and [`LogError::GroupDamaged`].
    pub fn next_group(&mut self) -> Result<Option<Group>, LogError> {
        if self.tail.is_some() {
            return Ok(None);
        }
        let decoded = self.fill_group().map_err(LogError::Read)?;
        match decoded {
            Ok(None) => {
                self.tail = Some(Tail::Clean);
                Ok(None)
            }
            Ok(Some((group, length))) => {
                self.consumed += length;
                self.offset_bytes += length as u64;
                self.horizon = group.horizon;
                Ok(Some(group))
            }
            Err(reason) => {
                let offset_bytes = self.offset_bytes;
                if self.readable_group_follows().map_err(LogError::Read)? {
                    return Err(LogError::GroupDamaged { offset_bytes, cause: reason });
                }
                self.tail = Some(Tail::Torn { offset_bytes, reason });
                Ok(None)
            }
        }
    }

    fn pending(&self) -> &[u8] {
        &self.buffer[self.consumed..]
    }

    /// Reads until the next group is complete and decodes it; `None` where the file ends.
    fn fill_group(&mut self) -> io::Result<Result<Option<(Group, usize)>, CodecError>> {
        loop {
            let length = match group_length(self.pending()) {
                Ok(length) => length,
                Err(error) => return Ok(Err(error)),
            };
            if let Some(length) = length.filter(|length| *length <= self.pending().len()) {
                let decoded = decode_group(&self.pending()[..length]);
                return Ok(decoded.map(|group| Some((group, length))));
            }
            if self.read_more()? == 0 {
                let pending = self.pending();
                return Ok(match pending {
                    [] => Ok(None),
                    cut => decode_group(cut).map(|_| None),
                });
            }
        }
    }

    fn read_more(&mut self) -> io::Result<u64> {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        (&mut self.reader).take(READ_BYTES as u64).read_to_end(&mut self.buffer).map(|n| n as u64)
    }

    /// Whether a group that continues this log begins after the unreadable one: where that one
    /// says it ends, or, should its length be what is damaged, anywhere.
    fn readable_group_follows(&mut self) -> io::Result<bool> {
        if let Ok(Some(length)) = group_length(self.pending()) {
            loop {
                if self.continues_at(length, GROUP_BYTES_MAX as usize) {
                    return Ok(true);
                }
                let enough = self.pending().len() > length + GROUP_BYTES_MAX as usize;
                if enough || self.read_more()? == 0 {
                    if self.pending().len() == length {
                        return Ok(false);
                    }
                    break;
                }
            }
        }
        while self.pending().len() < SCAN_BYTES && self.read_more()? > 0 {}
        let scanned = self.pending().len().min(SCAN_BYTES);
        Ok((1..scanned).any(|start| self.continues_at(start, SCANNED_GROUP_BYTES_MAX)))
    }

    fn continues_at(&self, start: usize, length_max: usize) -> bool {
        let candidate = self.pending().get(start..).unwrap_or_default();
        let length = group_length(candidate).ok().flatten();
        length
            .filter(|length| *length <= length_max)
            .and_then(|length| candidate.get(..length))
            .and_then(|group| peek_group(group).ok())
            .is_some_and(|head| head.horizon >= self.horizon)
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
