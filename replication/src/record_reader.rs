//! The records of a group, decoded. Their encoding is in [`crate::group`].

use ftvmm_devices::{DiskOutcome, Input};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec_error::CodecError;
use crate::disk::DiskAnswer;
use crate::encoding;
use crate::record::{COUNTER_MAX, End, EndReason, Event, Ordinal, Record};
use crate::tag::{Kind, Tag};
use crate::varint::{self, VarintError};

/// Largest ordinal delta that fits the record's first byte.
pub(crate) const DELTA_INLINE_MAX: u64 = 14;

/// A number that cannot be read, of this field.
pub(crate) fn number_error(error: VarintError, field: &'static str) -> CodecError {
    match error {
        VarintError::Short | VarintError::Overflow => CodecError::Number { field },
        VarintError::Overlong => CodecError::Overlong { field },
    }
}

/// Takes a number off the front of `input`.
pub(crate) fn number(input: &mut &[u8], field: &'static str) -> Result<u64, CodecError> {
    varint::take(input).map_err(|error| number_error(error, field))
}

/// Reads the records of a group's body, in order.
pub(crate) struct RecordReader<'a> {
    rest: &'a [u8],
    at: u64,
    time_ns: u64,
}

impl<'a> RecordReader<'a> {
    /// A reader of `body`, whose first record is of exit `first_at`.
    pub(crate) fn new(body: &'a [u8], first_at: u64) -> Self {
        Self { rest: body, at: first_at, time_ns: 0 }
    }

    /// Whether nothing is left.
    pub(crate) fn is_done(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next record; `None` when a counter goes further than one can.
    pub(crate) fn next(&mut self, index: u64) -> Result<Option<Record>, CodecError> {
        let first = self.bytes(1, index)?[0];
        let mut delta = u64::from(first >> 4);
        if delta > DELTA_INLINE_MAX {
            let more = number(&mut self.rest, "ordinal delta")?;
            let Some(sum) = delta.checked_add(more) else {
                return Ok(None);
            };
            delta = sum;
        }
        let Some(at) = self.at.checked_add(delta) else {
            return Ok(None);
        };
        self.at = at;
        let tag = first & 0x0f;
        let unknown = CodecError::RecordTag { tag };
        let event = match Tag::ALL.into_iter().find(|known| *known as u8 == tag).ok_or(unknown)? {
            tag @ (Tag::TimeNs | Tag::TimeUs) => {
                let unit_ns = if tag == Tag::TimeUs { 1000 } else { 1 };
                let step_ns = number(&mut self.rest, "time delta")?.checked_mul(unit_ns);
                let now_ns = step_ns.and_then(|step_ns| self.time_ns.checked_add(step_ns));
                // Devices calculate with it.
                let Some(now_ns) = now_ns.filter(|now_ns| *now_ns <= COUNTER_MAX) else {
                    return Ok(None);
                };
                self.time_ns = now_ns;
                Event::Input(Input::Time { now_ns })
            }
            Tag::NetRx => Event::Input(Input::NetRx { frame: self.sized_bytes(index)? }),
            Tag::ConsoleRx => Event::Input(Input::ConsoleRx { bytes: self.sized_bytes(index)? }),
            Tag::Entropy => Event::Input(Input::Entropy { bytes: self.sized_bytes(index)? }),
            Tag::Check => Event::Check(Box::new(self.encoded(index)?)),
            Tag::Slice => Event::Slice(self.encoded(index)?),
            Tag::DiskDone => {
                let id = number(&mut self.rest, "disk request")?;
                let outcome = DiskOutcome::Done { data: self.sized_bytes(index)? };
                Event::Input(Input::DiskDone { id, outcome })
            }
            Tag::DiskFailed => {
                let id = number(&mut self.rest, "disk request")?;
                Event::Input(Input::DiskDone { id, outcome: DiskOutcome::Failed })
            }
            Tag::DiskAnswer => {
                let id = number(&mut self.rest, "disk request")?;
                let data_xxh3 = Some(u64::from_le_bytes(self.array(index)?));
                Event::DiskAnswer(DiskAnswer { id, data_xxh3 })
            }
            Tag::DiskFailedAnswer => {
                let id = number(&mut self.rest, "disk request")?;
                Event::DiskAnswer(DiskAnswer { id, data_xxh3: None })
            }
            Tag::Snapshot => Event::Snapshot(self.encoded(index)?),
            Tag::Extended => Event::Input(self.extended(index)?),
            Tag::End => {
                let [number] = self.array(index)?;
                let reason = EndReason::from_number(number)
                    .ok_or(CodecError::EndReasonNumber { reason: number })?;
                let state_digest = self.array(index)?;
                let chain = u64::from_le_bytes(self.array(index)?);
                let outputs = u64::from_le_bytes(self.array(index)?);
                Event::End(End { state_digest, chain, outputs, reason })
            }
        };
        Ok(Some(Record { at: Ordinal(at), event }))
    }

    fn extended(&mut self, index: u64) -> Result<Input, CodecError> {
        let [number_read] = self.array(index)?;
        let kind =
            Kind::from_number(number_read).ok_or(CodecError::RecordKind { kind: number_read })?;
        Ok(match kind {
            Kind::PowerButton => Input::PowerButton,
            Kind::Nmi => Input::Nmi,
            Kind::ConsoleBreak => Input::ConsoleBreak,
            Kind::NetAnnounce => Input::NetAnnounce,
            Kind::NewIdentity => Input::NewIdentity {
                generation_id: self.array(index)?,
                unix_s: number(&mut self.rest, "time of day")?,
            },
        })
    }

    fn bytes(&mut self, length_bytes: u64, index: u64) -> Result<&[u8], CodecError> {
        if length_bytes > self.rest.len() as u64 {
            return Err(CodecError::RecordBounds { index });
        }
        let (taken, rest) = self.rest.split_at(length_bytes as usize);
        self.rest = rest;
        Ok(taken)
    }

    fn sized_bytes(&mut self, index: u64) -> Result<Vec<u8>, CodecError> {
        let length_bytes = number(&mut self.rest, "payload length")?;
        self.bytes(length_bytes, index).map(<[u8]>::to_vec)
    }

    fn encoded<T: Serialize + DeserializeOwned>(&mut self, index: u64) -> Result<T, CodecError> {
        let length_bytes = number(&mut self.rest, "payload length")?;
        let bytes = self.bytes(length_bytes, index)?;
        encoding::decode(bytes).map_err(|_| CodecError::RecordBody { index })
    }

    fn array<const N: usize>(&mut self, index: u64) -> Result<[u8; N], CodecError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N as u64, index)?);
        Ok(array)
    }
}
