//! Why bytes from the channel are no message.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bounded;
use crate::group::GROUP_BYTES_MAX;

/// Largest body: a full log group and the fields around it.
pub const BODY_BYTES_MAX: u32 = GROUP_BYTES_MAX + 64;

/// Why a stream cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum WireError {
    /// The peer is something else, such as a web browser.
    #[error("peer does not speak ftvmm: it began with \"{}\"", first_bytes.escape_ascii())]
    NotFtvmm {
        /// Its first bytes, at most eight.
        #[serde(deserialize_with = "bounded::list::<_, _, 8>")]
        first_bytes: Vec<u8>,
    },
    /// The peer is an ftvmm of another version.
    #[error("wire version differs: ours is {ours}, theirs is {theirs}")]
    VersionMismatch {
        /// [`crate::wire::WIRE_VERSION`].
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
    /// A frame claims to be longer than any frame.
    #[error("frame of {length_bytes} bytes is longer than {}", BODY_BYTES_MAX)]
    TooLong {
        /// The length it claims.
        length_bytes: u32,
    },
    /// The checksum does not hold.
    #[error("frame checksum is {got:08x}, expected {expected:08x}")]
    Checksum {
        /// The value stored.
        expected: u32,
        /// The value of the bytes present.
        got: u32,
    },
    /// Unknown tag, or a body that is not that message.
    #[error("malformed message with tag {tag}")]
    Malformed {
        /// The tag.
        tag: u8,
    },
}
