//! Framing: messages as bytes on a stream.
//!
//! Each side opens its direction with [`PREAMBLE`]: the magic `FTVMM\0` and the version as u16 le.
//! Then frames follow:
//!
//! | field | type | meaning and rule |
//! | --- | --- | --- |
//! | length | u32 le | bytes of the body, at most [`BODY_BYTES_MAX`] |
//! | crc32c | u32 le | over length, tag and body |
//! | tag | u8 | which message; zero is invalid |
//! | body | postcard | the message's fields |
//!
//! After an error the stream cannot be trusted and must be closed: the decoder stays at the error.

use crate::message::Message;
pub use crate::wire_error::{BODY_BYTES_MAX, WireError};

/// First bytes of every stream.
pub const MAGIC: [u8; 6] = *b"FTVMM\0";
/// Version of the framing and of the messages: raised with every change of either.
pub const WIRE_VERSION: u16 = 8;
/// What each side sends before its first message, and before it has read anything.
pub const PREAMBLE: [u8; 8] = {
    let [m0, m1, m2, m3, m4, m5] = MAGIC;
    let [v0, v1] = WIRE_VERSION.to_le_bytes();
    [m0, m1, m2, m3, m4, m5, v0, v1]
};
/// Bytes of a frame before its body.
const HEAD_BYTES: usize = 9;
/// Consumed bytes the decoder keeps before it moves the rest to the front.
const COMPACT_BYTES: usize = 64 << 10;

fn frame_crc(length_bytes: u32, tag: u8, body: &[u8]) -> u32 {
    let head = crc32c::crc32c(&length_bytes.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(head, &[tag]), body)
}

/// Appends `message` as a frame.
///
/// # Panics
/// When the message is larger than [`BODY_BYTES_MAX`]; none that a session makes is.
pub fn encode(message: &Message, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; HEAD_BYTES]);
    *out = message.encode_body(core::mem::take(out));
    let (head, body) = out[start..].split_at_mut(HEAD_BYTES);
    assert!(body.len() <= BODY_BYTES_MAX as usize, "{} is too long", message.name());
    let length_bytes = body.len() as u32;
    head[0..4].copy_from_slice(&length_bytes.to_le_bytes());
    head[4..8].copy_from_slice(&frame_crc(length_bytes, message.tag(), body).to_le_bytes());
    head[8] = message.tag();
}

/// Turns bytes as they arrive into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    consumed: usize,
    preamble_seen: bool,
    failed: Option<WireError>,
}

impl Decoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.consumed >= COMPACT_BYTES || self.consumed == self.buffer.len() {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete message; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`WireError`]; the same again on every later call.
    pub fn next_message(&mut self) -> Result<Option<Message>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.decode().inspect_err(|error| self.failed = Some(error.clone()))
    }

    fn decode(&mut self) -> Result<Option<Message>, WireError> {
        if !self.preamble_seen && !self.take_preamble()? {
            return Ok(None);
        }
        let pending = &self.buffer[self.consumed..];
        let Some((&head, rest)) = pending.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let [l0, l1, l2, l3, c0, c1, c2, c3, tag] = head;
        let length_bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        if length_bytes > BODY_BYTES_MAX {
            return Err(WireError::TooLong { length_bytes });
        }
        let Some(body) = rest.get(..length_bytes as usize) else {
            return Ok(None);
        };
        let expected = u32::from_le_bytes([c0, c1, c2, c3]);
        let got = frame_crc(length_bytes, tag, body);
        if expected != got {
            return Err(WireError::Checksum { expected, got });
        }
        let message = Message::decode_body(tag, body).ok_or(WireError::Malformed { tag })?;
        self.consumed += HEAD_BYTES + body.len();
        Ok(Some(message))
    }

    /// Whether the preamble is complete. A foreign preamble is detected at the first byte that
    /// differs, because a foreign peer may wait for an answer and never send eight.
    fn take_preamble(&mut self) -> Result<bool, WireError> {
        let pending = &self.buffer[self.consumed..];
        let compared = pending.len().min(MAGIC.len());
        if pending[..compared] != MAGIC[..compared] {
            let first_bytes = pending[..pending.len().min(PREAMBLE.len())].to_vec();
            return Err(WireError::NotFtvmm { first_bytes });
        }
        let Some(&[.., v0, v1]) = pending.first_chunk::<{ PREAMBLE.len() }>() else {
            return Ok(false);
        };
        let theirs = u16::from_le_bytes([v0, v1]);
        if theirs != WIRE_VERSION {
            return Err(WireError::VersionMismatch { ours: WIRE_VERSION, theirs });
        }
        self.consumed += PREAMBLE.len();
        self.preamble_seen = true;
        Ok(true)
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
