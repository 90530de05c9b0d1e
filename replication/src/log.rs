//! The log file: a header that says what a replay relies on, then groups to the end.
//!
//! | offset | bytes | type | meaning and rule |
//! | --- | --- | --- | --- |
//! | 0 | 8 | bytes | magic `FTVMMLOG` |
//! | 8 | 4 | u32 le | version, [`LOG_VERSION`]; readable whatever follows |
//! | 12 | 4 | u32 le | length of the header record, at most [`HEADER_BYTES_MAX`] |
//! | 16 | 4 | u32 le | crc32c over bytes 0..16 and the header record |
//! | 20 | | postcard | header record: [`LogHeader`] |
//! | | | | groups ([`crate::group`]) until the file ends |
//!
//! A file may end anywhere, because a host may die at any time. What lies before the tear is
//! complete and usable. A tear has nothing readable after it; a group that cannot be read although
//! a later one can is damage, and reported as an error.
//! Why the rule: a flipped bit in a length may point past the end of the file and look like a tear.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fingerprint::Fingerprint;
use crate::group::{CodecError, GROUP_BYTES_MAX, Group, decode_group, group_length, peek_group};
use crate::record::Ordinal;

/// First bytes of every log file.
pub const LOG_MAGIC: [u8; 8] = *b"FTVMMLOG";
/// Version of the file format written here, and the only one read.
pub const LOG_VERSION: u32 = 3;
/// Largest header record: room for any command line the kernel takes.
pub const HEADER_BYTES_MAX: u32 = 64 << 10;
/// Bytes before the header record.
const PREFIX_BYTES: usize = 20;
const READ_BYTES: usize = 64 << 10;
/// How far after an unreadable group of unknown length a readable one is looked for.
const SCAN_BYTES: usize = 1 << 20;
/// Largest one found so: to check a group at every place costs its length each time.
const SCANNED_GROUP_BYTES_MAX: usize = 64 << 10;

const _: () = assert!(PREFIX_BYTES == LOG_MAGIC.len() + 3 * size_of::<u32>());

/// What a replay relies on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHeader {
    /// The machine.
    pub fingerprint: Fingerprint,
    /// What the guest's RTC said at power-on, in seconds since 1970-01-01 00:00 UTC.
    pub rtc_epoch_s: u64,
    /// Where the recorder found the kernel image file. A hint: the fingerprint decides.
    pub kernel_path: String,
    /// Where the recorder found the initramfs file, likewise.
    pub initramfs_path: Option<String>,
}

/// Why a log could not be written or read.
#[derive(Debug, Error)]
pub enum LogError {
    /// The writer failed.
    #[error("cannot write the log")]
    Write(#[source] io::Error),
    /// The reader failed.
    #[error("cannot read the log")]
    Read(#[source] io::Error),
    /// The header cannot be encoded within [`HEADER_BYTES_MAX`].
    #[error("log header takes {header_bytes} bytes, the limit is {}", HEADER_BYTES_MAX)]
    HeaderTooLong {
        /// Its length.
        header_bytes: u64,
    },
    /// The file begins with something else.
    #[error("not an ftvmm log: it begins with \"{}\"", first_bytes.escape_ascii())]
    NotALog {
        /// The first bytes of the file, at most eight.
        first_bytes: Vec<u8>,
    },
    /// The file is of another version.
    #[error("log has version {got}, this program reads version {expected}")]
    Version {
        /// [`LOG_VERSION`].
        expected: u32,
        /// The file's.
        got: u32,
    },
    /// The file ends inside the header, so that nothing can be replayed.
    #[error("log ends inside its header, after {got_bytes} bytes")]
    HeaderTorn {
        /// Length of the file.
        got_bytes: u64,
    },
    /// The header's checksum or encoding does not hold.
    #[error("log header is damaged")]
    HeaderDamaged,
    /// A group in the middle of the file is damaged.
    #[error("log group at offset {offset_bytes} is damaged")]
    GroupDamaged {
        /// Where the group begins in the file.
        offset_bytes: u64,
        /// What does not hold.
        source: CodecError,
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
    /// [`LogError::Write`] and [`LogError::HeaderTooLong`].
    pub fn new(mut writer: W, header: &LogHeader) -> Result<Self, LogError> {
        let record = postcard::to_stdvec(header).map_err(|_| LogError::HeaderDamaged)?;
        let header_bytes = record.len() as u64;
        if header_bytes > u64::from(HEADER_BYTES_MAX) {
            return Err(LogError::HeaderTooLong { header_bytes });
        }
        let mut file = Vec::with_capacity(PREFIX_BYTES + record.len());
        file.extend_from_slice(&LOG_MAGIC);
        file.extend_from_slice(&LOG_VERSION.to_le_bytes());
        file.extend_from_slice(&(record.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&file), &record);
        file.extend_from_slice(&crc.to_le_bytes());
        file.extend_from_slice(&record);
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

    /// Flushes and gives the writer back, for the caller to sync or close.
    ///
    /// # Errors
    /// [`LogError::Write`].
    pub fn finish(mut self) -> Result<W, LogError> {
        self.writer.flush().map_err(LogError::Write)?;
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
    /// Every [`LogError`] except those of groups and of writing.
    pub fn new(mut reader: R) -> Result<Self, LogError> {
        let mut prefix = Vec::new();
        read_up_to(&mut reader, &mut prefix, PREFIX_BYTES)?;
        let magic_bytes = prefix.len().min(LOG_MAGIC.len());
        if prefix[..magic_bytes] != LOG_MAGIC[..magic_bytes] || prefix.is_empty() {
            prefix.truncate(magic_bytes);
            return Err(LogError::NotALog { first_bytes: prefix });
        }
        let field = |at: usize| {
            let bytes = prefix.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_le_bytes)
        };
        let torn = |got_bytes: usize| LogError::HeaderTorn { got_bytes: got_bytes as u64 };
        let got = field(8).ok_or(torn(prefix.len()))?;
        if got != LOG_VERSION {
            return Err(LogError::Version { expected: LOG_VERSION, got });
        }
        let (Some(header_bytes), Some(stored_crc)) = (field(12), field(16)) else {
            return Err(torn(prefix.len()));
        };
        if header_bytes > HEADER_BYTES_MAX {
            return Err(LogError::HeaderDamaged);
        }
        let mut record = Vec::new();
        read_up_to(&mut reader, &mut record, header_bytes as usize)?;
        if record.len() < header_bytes as usize {
            return Err(torn(prefix.len() + record.len()));
        }
        if crc32c::crc32c_append(crc32c::crc32c(&prefix[..16]), &record) != stored_crc {
            return Err(LogError::HeaderDamaged);
        }
        let header = match postcard::take_from_bytes(&record) {
            Ok((header, [])) => header,
            _ => return Err(LogError::HeaderDamaged),
        };
        Ok(Self {
            reader,
            header,
            buffer: Vec::new(),
            consumed: 0,
            offset_bytes: (PREFIX_BYTES + record.len()) as u64,
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
                    return Err(LogError::GroupDamaged { offset_bytes, source: reason });
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

fn read_up_to(reader: &mut impl Read, out: &mut Vec<u8>, limit: usize) -> Result<(), LogError> {
    reader.take(limit as u64).read_to_end(out).map(|_| ()).map_err(LogError::Read)
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
