//! What can be wrong with the bytes of a log group.

use thiserror::Error;

use crate::record::Ordinal;

/// Largest length field and largest decompressed body. A recorder finishes a group long before
/// this; the bound is there so that a damaged length cannot ask for all memory.
pub const GROUP_BYTES_MAX: u32 = 16 << 20;
/// Most records in a group. One takes two bytes in the log or fewer, and sixty in memory.
pub const RECORDS_MAX: u64 = 1 << 16;

/// Why bytes are not a group.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CodecError {
    /// The bytes end inside the group.
    #[error("group is cut short: {got_bytes} of {expected_bytes} bytes")]
    Truncated {
        /// Length the group has, as far as it can be told.
        expected_bytes: u64,
        /// Length present.
        got_bytes: u64,
    },
    /// Bytes follow the group.
    #[error("{extra_bytes} bytes follow the group")]
    Trailing {
        /// How many.
        extra_bytes: u64,
    },
    /// The length field, or the length of the decompressed body, is above the limit.
    #[error("group length {length_bytes} is not in 1..={}", GROUP_BYTES_MAX)]
    Length {
        /// The value read.
        length_bytes: u64,
    },
    /// The group claims more records than one has.
    #[error("group claims {record_count} records, the limit is {}", RECORDS_MAX)]
    RecordCount {
        /// The value read.
        record_count: u64,
    },
    /// The checksum does not hold.
    #[error("group checksum is {got:08x}, expected {expected:08x}")]
    Checksum {
        /// The value stored.
        expected: u32,
        /// The value of the bytes present.
        got: u32,
    },
    /// A number does not fit, or the fields end inside one.
    #[error("malformed number in {field}")]
    Number {
        /// The field being read.
        field: &'static str,
    },
    /// A number has a shorter encoding.
    #[error("number in {field} has more bytes than it needs")]
    Overlong {
        /// The field being read.
        field: &'static str,
    },
    /// The codec number is none of ours.
    #[error("unknown group codec {codec}")]
    Codec {
        /// The value read.
        codec: u8,
    },
    /// The compressed body does not decompress to the stated length.
    #[error("group body does not decompress to {expected_bytes} bytes")]
    Decompress {
        /// The length stated in the group.
        expected_bytes: u64,
    },
    /// The tag is none of ours.
    #[error("unknown record tag {tag}")]
    RecordTag {
        /// The value read.
        tag: u8,
    },
    /// The kind of an extended record is none of ours.
    #[error("record kind {kind} of tag 15 is unknown; was it made by a newer ftvmm?")]
    RecordKind {
        /// The value read.
        kind: u8,
    },
    /// The end reason is none of ours.
    #[error("unknown end reason {reason}")]
    EndReasonNumber {
        /// The value read.
        reason: u8,
    },
    /// A record ends outside the body, or the body goes on after the last record.
    #[error("record {index} does not fit the group body")]
    RecordBounds {
        /// Position of the record in the group; the record count when the body is too long.
        index: u64,
    },
    /// A check, a slice or a snapshot's mark is none, or a frame is longer than any.
    #[error("record {index} cannot be decoded")]
    RecordBody {
        /// Position of the record in the group.
        index: u64,
    },
    /// A record lies more than one exit past the horizon, or a counter overflows.
    #[error("record {index} lies outside the reach of horizon {horizon}")]
    OutOfReach {
        /// Position of the record in the group.
        index: u64,
        /// The group's horizon.
        horizon: Ordinal,
    },
}
