//! Groups: the unit in which records are written to a file, sent to a backup and acknowledged.
//!
//! Why: a checksum and a length for every record would cost more than the record. A group carries
//! one of each, the *horizon* and any number of records, and can be decoded without the groups
//! before it. An idle guest costs about three bytes a record.
//!
//! | field | type | meaning and rule |
//! | --- | --- | --- |
//! | length | varint | bytes after the checksum; at most [`GROUP_BYTES_MAX`] |
//! | crc32c | u32 le | over the bytes of `length` and everything after the checksum |
//! | head | varint | record count × 4 + codec (1 raw, 2 lz4; 0 and 3 invalid) |
//! | horizon | varint | the recorder has left this exit; no later group has a record up to it |
//! | reach | varint | only with records: horizon + 1 − ordinal of the first record |
//! | body length | varint | only with lz4: of the decompressed body, at most [`GROUP_BYTES_MAX`] |
//! | body | bytes | the records, see [`crate::record`] and `docs/log-format.md` |
//!
//! A record opens with a byte: tag in the low four bits, ordinal delta to the record before it in
//! the high four; a delta of 15 or more is written as 15 and the rest follows as a varint.
//! Invariants: ordinals never fall; a record lies at most one exit past the horizon (a halted guest
//! takes several inputs at an exit before it leaves it); time never falls.

use ftvmm_devices::{DiskOutcome, Input};
use serde::Serialize;

pub use crate::codec_error::{CodecError, GROUP_BYTES_MAX, RECORDS_MAX};
use crate::disk::DiskAnswer;
use crate::encoding;
use crate::record::{COUNTER_MAX, End, Event, Ordinal, Record};
use crate::record_reader::{DELTA_INLINE_MAX, RecordReader, number, number_error};
use crate::tag::{Kind, Tag};
use crate::varint::{self, VarintError};

/// A group that holds this much does not wait for the guest to leave its exit.
pub const SLICE_GROUP_BYTES: u64 = 1 << 20;
/// A group that holds so many records does not wait for the guest to leave its exit either.
const RECORDS_FULL: u64 = RECORDS_MAX / 4;
/// An lz4 block is at most so many times as long when it is decompressed: a byte of it adds at most
/// 255 bytes to a match.
pub(crate) const LZ4_RATIO_MAX: usize = 255;
/// Bodies shorter than this are never compressed: the gain could not pay for the attempt.
const LZ4_BODY_BYTES_MIN: usize = 512;
/// Room for so many records is made before they are read. More is made as they come.
const RECORDS_RESERVED_MAX: u64 = 4096;

/// How a body is stored. Part of the log format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Codec {
    Raw = 1,
    Lz4 = 2,
}

/// A decoded group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// All inputs at or before this exit are in the log up to and including this group; the
    /// recorder has left the exit.
    pub horizon: Ordinal,
    /// Records in order. Some may lie at `horizon + 1`.
    pub records: Vec<Record>,
}

/// Builds groups. Keep one and reuse it: its buffer stays allocated, so that appending a time
/// record allocates nothing.
#[derive(Debug)]
pub struct GroupEncoder {
    body: Vec<u8>,
    record_count: u64,
    first_at: Ordinal,
    last_at: Ordinal,
    last_time_ns: u64,
    horizon_last: Ordinal,
}

impl Default for GroupEncoder {
    fn default() -> Self {
        Self::new()
    }
}

impl GroupEncoder {
    /// An encoder with an empty group.
    #[must_use]
    pub fn new() -> Self {
        Self {
            body: Vec::with_capacity(4096),
            record_count: 0,
            first_at: Ordinal(0),
            last_at: Ordinal(0),
            last_time_ns: 0,
            horizon_last: Ordinal(0),
        }
    }

    /// Records in the unfinished group.
    #[must_use]
    pub fn record_count(&self) -> u64 {
        self.record_count
    }

    /// Encoded size of the unfinished group's records before compression. The recorder finishes a
    /// group when this is large enough for its taste.
    #[must_use]
    pub fn body_bytes(&self) -> u64 {
        self.body.len() as u64
    }

    /// Whether the group is to be finished although the guest has not left its exit.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.body_bytes() >= SLICE_GROUP_BYTES || self.record_count >= RECORDS_FULL
    }

    /// Appends a record.
    ///
    /// # Panics
    /// When ordinals or time run backwards, or the group outgrows [`GROUP_BYTES_MAX`]: a recorder
    /// that does this has lost its place and must not go on.
    pub fn push(&mut self, record: &Record) {
        assert!(record.at >= self.last_at, "record at {} after {}", record.at, self.last_at);
        if self.record_count == 0 {
            self.first_at = record.at;
            self.last_at = record.at;
        }
        let delta = record.at.0 - self.last_at.0;
        match &record.event {
            Event::Input(Input::Time { now_ns }) => self.push_time(delta, *now_ns),
            Event::Input(Input::NetRx { frame }) => self.push_bytes(Tag::NetRx, delta, frame),
            Event::Input(Input::ConsoleRx { bytes }) => {
                self.push_bytes(Tag::ConsoleRx, delta, bytes);
            }
            Event::Input(Input::Entropy { bytes }) => self.push_bytes(Tag::Entropy, delta, bytes),
            Event::Input(Input::DiskDone { id, outcome }) => match outcome {
                DiskOutcome::Done { data } => {
                    self.push_numbered(Tag::DiskDone, delta, *id);
                    varint::put(&mut self.body, data.len() as u64);
                    self.body.extend_from_slice(data);
                }
                DiskOutcome::Failed => self.push_numbered(Tag::DiskFailed, delta, *id),
            },
            Event::Input(Input::PowerButton) => self.push_kind(Kind::PowerButton, delta),
            Event::Input(Input::Nmi) => self.push_kind(Kind::Nmi, delta),
            Event::Input(Input::ConsoleBreak) => self.push_kind(Kind::ConsoleBreak, delta),
            Event::Input(Input::NetAnnounce) => self.push_kind(Kind::NetAnnounce, delta),
            Event::Input(Input::NewIdentity { generation_id, unix_s }) => {
                self.push_kind(Kind::NewIdentity, delta);
                self.body.extend_from_slice(generation_id);
                varint::put(&mut self.body, *unix_s);
            }
            Event::DiskAnswer(DiskAnswer { id, data_xxh3 }) => match data_xxh3 {
                Some(data_xxh3) => {
                    self.push_numbered(Tag::DiskAnswer, delta, *id);
                    self.body.extend_from_slice(&data_xxh3.to_le_bytes());
                }
                None => self.push_numbered(Tag::DiskFailedAnswer, delta, *id),
            },
            Event::Check(check) => self.push_encoded(Tag::Check, delta, check.as_ref()),
            Event::Slice(slice) => self.push_encoded(Tag::Slice, delta, slice),
            Event::Snapshot(mark) => self.push_encoded(Tag::Snapshot, delta, mark),
            Event::End(End { state_digest, chain, outputs, reason }) => {
                self.push_head(Tag::End, delta);
                self.body.push(*reason as u8);
                self.body.extend_from_slice(state_digest);
                self.body.extend_from_slice(&chain.to_le_bytes());
                self.body.extend_from_slice(&outputs.to_le_bytes());
            }
        }
        self.last_at = record.at;
        self.record_count += 1;
        let has_room = self.body.len() < GROUP_BYTES_MAX as usize - 64;
        assert!(has_room && self.record_count < RECORDS_MAX, "group was not finished in time");
    }

    fn push_head(&mut self, tag: Tag, delta: u64) {
        if delta <= DELTA_INLINE_MAX {
            self.body.push(tag as u8 | (delta as u8) << 4);
        } else {
            self.body.push(tag as u8 | 0xf0);
            varint::put(&mut self.body, delta - DELTA_INLINE_MAX - 1);
        }
    }

    fn push_kind(&mut self, kind: Kind, delta: u64) {
        self.push_head(Tag::Extended, delta);
        self.body.push(kind as u8);
    }

    fn push_time(&mut self, delta: u64, now_ns: u64) {
        assert!(now_ns >= self.last_time_ns, "time {now_ns} after {}", self.last_time_ns);
        let step_ns = now_ns - self.last_time_ns;
        self.last_time_ns = now_ns;
        if step_ns.is_multiple_of(1000) {
            self.push_head(Tag::TimeUs, delta);
            varint::put(&mut self.body, step_ns / 1000);
        } else {
            self.push_head(Tag::TimeNs, delta);
            varint::put(&mut self.body, step_ns);
        }
    }

    fn push_numbered(&mut self, tag: Tag, delta: u64, number: u64) {
        self.push_head(tag, delta);
        varint::put(&mut self.body, number);
    }

    fn push_bytes(&mut self, tag: Tag, delta: u64, bytes: &[u8]) {
        self.push_head(tag, delta);
        varint::put(&mut self.body, bytes.len() as u64);
        self.body.extend_from_slice(bytes);
    }

    fn push_encoded<T: Serialize>(&mut self, tag: Tag, delta: u64, value: &T) {
        self.push_bytes(tag, delta, &encoding::encode(value));
    }

    /// Closes the group and starts the next one. Without records the result is a horizon-only
    /// group of at most 16 bytes.
    ///
    /// # Panics
    /// When the horizon falls, or a record lies more than one exit past it.
    pub fn finish(&mut self, horizon: Ordinal) -> Vec<u8> {
        assert!(horizon >= self.horizon_last, "horizon {horizon} after {}", self.horizon_last);
        assert!(horizon.0 <= COUNTER_MAX, "horizon is exhausted");
        assert!(self.record_count == 0 || self.last_at <= horizon.next(), "horizon is too early");
        let compressed = (self.body.len() >= LZ4_BODY_BYTES_MIN)
            .then(|| lz4_flex::block::compress(&self.body))
            .filter(|compressed| compressed.len() < self.body.len() - self.body.len() / 8);
        let codec = if compressed.is_some() { Codec::Lz4 } else { Codec::Raw };
        let mut fields = Vec::with_capacity(64);
        varint::put(&mut fields, self.record_count << 2 | codec as u64);
        varint::put(&mut fields, horizon.0);
        if self.record_count > 0 {
            varint::put(&mut fields, horizon.0 + 1 - self.first_at.0);
        }
        if compressed.is_some() {
            varint::put(&mut fields, self.body.len() as u64);
        }
        let stored = compressed.as_deref().unwrap_or(&self.body);
        let mut group = Vec::with_capacity(16 + fields.len() + stored.len());
        varint::put(&mut group, (fields.len() + stored.len()) as u64);
        let crc = [&fields[..], stored]
            .iter()
            .fold(crc32c::crc32c(&group), |crc, part| crc32c::crc32c_append(crc, part));
        group.extend_from_slice(&crc.to_le_bytes());
        group.extend_from_slice(&fields);
        group.extend_from_slice(stored);

        self.body.clear();
        self.record_count = 0;
        self.last_time_ns = 0;
        self.horizon_last = horizon;
        group
    }
}

/// Length in bytes of the group that `bytes` begins with; `None` while the length field itself is
/// incomplete.
pub(crate) fn group_length(bytes: &[u8]) -> Result<Option<usize>, CodecError> {
    let mut rest = bytes;
    let length_bytes = match varint::take(&mut rest) {
        Ok(length_bytes) => length_bytes,
        Err(VarintError::Short) => return Ok(None),
        Err(error) => return Err(number_error(error, "length")),
    };
    if length_bytes == 0 || length_bytes > u64::from(GROUP_BYTES_MAX) {
        return Err(CodecError::Length { length_bytes });
    }
    Ok(Some(bytes.len() - rest.len() + 4 + length_bytes as usize))
}

/// What can be told of a group without decoding its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupHead {
    /// See [`Group::horizon`].
    pub horizon: Ordinal,
    /// Number of records.
    pub record_count: u64,
}

struct Opened<'a> {
    head: GroupHead,
    codec: Codec,
    rest: &'a [u8],
}

fn open(bytes: &[u8]) -> Result<Opened<'_>, CodecError> {
    let got_bytes = bytes.len() as u64;
    let length = group_length(bytes)?
        .ok_or(CodecError::Truncated { expected_bytes: got_bytes + 1, got_bytes })?;
    if bytes.len() < length {
        return Err(CodecError::Truncated { expected_bytes: length as u64, got_bytes });
    }
    if bytes.len() > length {
        return Err(CodecError::Trailing { extra_bytes: got_bytes - length as u64 });
    }
    let mut rest = bytes;
    let payload_bytes = number(&mut rest, "length")? as usize;
    let length_field = &bytes[..bytes.len() - rest.len()];
    let (stored_crc, mut rest) = rest.split_at(rest.len() - payload_bytes);
    let expected = stored_crc.iter().rev().fold(0, |crc, byte| crc << 8 | u32::from(*byte));
    let got = crc32c::crc32c_append(crc32c::crc32c(length_field), rest);
    if expected != got {
        return Err(CodecError::Checksum { expected, got });
    }
    let head = number(&mut rest, "head")?;
    let codec = match head & 3 {
        1 => Codec::Raw,
        2 => Codec::Lz4,
        codec => return Err(CodecError::Codec { codec: codec as u8 }),
    };
    let horizon = Ordinal::from_outside(number(&mut rest, "horizon")?)
        .ok_or(CodecError::Number { field: "horizon" })?;
    let record_count = head >> 2;
    if record_count > RECORDS_MAX {
        return Err(CodecError::RecordCount { record_count });
    }
    Ok(Opened { head: GroupHead { horizon, record_count }, codec, rest })
}

/// Checks length and checksum of exactly one group and reads its horizon, without decoding records.
///
/// # Errors
/// [`CodecError`], naming what does not hold.
pub fn peek_group(bytes: &[u8]) -> Result<GroupHead, CodecError> {
    open(bytes).map(|opened| opened.head)
}

/// Decodes exactly one group.
///
/// # Errors
/// [`CodecError`], naming what does not hold. No change of a single bit goes unnoticed.
pub fn decode_group(bytes: &[u8]) -> Result<Group, CodecError> {
    let Opened { head: GroupHead { horizon, record_count }, codec, mut rest } = open(bytes)?;
    let mut records = Vec::new();
    if record_count == 0 {
        if !rest.is_empty() || codec != Codec::Raw {
            return Err(CodecError::RecordBounds { index: 0 });
        }
        return Ok(Group { horizon, records });
    }
    let reach = number(&mut rest, "reach")?;
    let out_of_reach = |index| CodecError::OutOfReach { index, horizon };
    let first_at = (horizon.0 + 1).checked_sub(reach).ok_or(out_of_reach(0))?;

    let decompressed;
    if codec == Codec::Lz4 {
        let expected_bytes = number(&mut rest, "body length")?;
        if expected_bytes > u64::from(GROUP_BYTES_MAX) {
            return Err(CodecError::Length { length_bytes: expected_bytes });
        }
        // Room is made for what can be there.
        decompressed = (expected_bytes <= (rest.len() * LZ4_RATIO_MAX) as u64)
            .then(|| lz4_flex::block::decompress(rest, expected_bytes as usize).ok())
            .flatten()
            .filter(|body| body.len() as u64 == expected_bytes)
            .ok_or(CodecError::Decompress { expected_bytes })?;
        rest = &decompressed;
    }

    records.reserve(record_count.min(RECORDS_RESERVED_MAX) as usize);
    let mut reader = RecordReader::new(rest, first_at);
    for index in 0..record_count {
        let record = reader.next(index)?.ok_or(out_of_reach(index))?;
        if record.at.0 > horizon.0 + 1 {
            return Err(out_of_reach(index));
        }
        records.push(record);
    }
    match reader.is_done() {
        true => Ok(Group { horizon, records }),
        false => Err(CodecError::RecordBounds { index: record_count }),
    }
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
