//! Plain data as bytes: postcard, and only the bytes that it writes.
//!
//! Why not postcard alone: it reads a number with more bytes than the number needs, such as 0x80
//! 0x00 for 0, so that many byte strings would be one value. What is read here has one encoding,
//! and digests and golden bytes of it mean something.

use postcard::ser_flavors::Flavor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// The bytes are not what [`encode`] makes of a value of the type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EncodingError {
    /// They are no value of the type, or end inside one.
    #[error("the bytes are no such value")]
    Malformed,
    /// Bytes follow the value.
    #[error("{extra_bytes} bytes follow the value")]
    Trailing {
        /// How many.
        extra_bytes: u64,
    },
    /// They are a value, but another spelling of it: a number is longer than it need be.
    #[error("the value is encoded with more bytes than it needs")]
    Overlong,
}

/// The bytes of `value`.
#[must_use]
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    encode_behind(value, Vec::new())
}

/// `front`, and the bytes of `value` behind it.
#[must_use]
pub fn encode_behind<T: Serialize + ?Sized>(value: &T, front: Vec<u8>) -> Vec<u8> {
    // A vector grows as needed, so that the one error postcard has left, a full buffer, is absent.
    #[expect(clippy::expect_used, reason = "plain data, which postcard can hold")]
    let bytes = postcard::to_extend(value, front).expect("plain data, which postcard can hold");
    bytes
}

/// The value that `bytes` are the encoding of.
///
/// # Errors
/// [`EncodingError`]: they are that of none, or not the one [`encode`] makes.
pub fn decode<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<T, EncodingError> {
    let (value, rest): (T, _) =
        postcard::take_from_bytes(bytes).map_err(|_| EncodingError::Malformed)?;
    if !rest.is_empty() {
        return Err(EncodingError::Trailing { extra_bytes: rest.len() as u64 });
    }
    match postcard::serialize_with_flavor(&value, Expected(bytes)) {
        Ok([]) => Ok(value),
        _ => Err(EncodingError::Overlong),
    }
}

/// Compares what postcard writes with the bytes that are still to come; nothing is kept.
struct Expected<'a>(&'a [u8]);

impl<'a> Flavor for Expected<'a> {
    type Output = &'a [u8];

    fn try_extend(&mut self, written: &[u8]) -> postcard::Result<()> {
        let rest = self.0.strip_prefix(written);
        self.0 = rest.ok_or(postcard::Error::SerializeBufferFull)?;
        Ok(())
    }

    fn try_push(&mut self, written: u8) -> postcard::Result<()> {
        self.try_extend(&[written])
    }

    fn finalize(self) -> postcard::Result<&'a [u8]> {
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    enum Choice {
        None,
        Number(u64),
        Named { signed: i32, text: String, list: Vec<Option<u16>> },
    }

    #[test]
    fn a_longer_spelling_is_refused_wherever_it_stands() {
        assert_eq!(decode::<u64>(&[0]), Ok(0));
        assert_eq!(decode::<u64>(&[0x80, 0]), Err(EncodingError::Overlong));
        assert_eq!(decode::<Choice>(&[1, 5]), Ok(Choice::Number(5)));
        assert_eq!(decode::<Choice>(&[0x81, 0, 5]), Err(EncodingError::Overlong), "the variant");
        assert_eq!(decode::<Choice>(&[1, 0x85, 0]), Err(EncodingError::Overlong), "the field");
        assert_eq!(decode::<String>(&[0x81, 0, b'a']), Err(EncodingError::Overlong), "a length");
    }

    #[test]
    fn what_is_none_and_what_follows_is_told() {
        assert_eq!(decode::<Choice>(&[7]), Err(EncodingError::Malformed));
        assert_eq!(decode::<Choice>(&[1]), Err(EncodingError::Malformed));
        assert_eq!(decode::<Choice>(&[0, 0]), Err(EncodingError::Trailing { extra_bytes: 1 }));
    }

    proptest! {
        #[test]
        fn accepted_bytes_are_the_encoding(
            bytes in prop::collection::vec(prop_oneof![0..4u8, 0x80..0x84u8, any::<u8>()], 0..24),
        ) {
            if let Ok(value) = decode::<Choice>(&bytes) {
                prop_assert_eq!(encode(&value), &bytes[..]);
            }
            if let Ok(value) = decode::<(u64, i64, u16)>(&bytes) {
                prop_assert_eq!(encode(&value), &bytes[..]);
            }
        }

        #[test]
        fn what_is_encoded_is_decoded(
            signed in any::<i32>(),
            text in ".{0,20}",
            list in prop::collection::vec(any::<Option<u16>>(), 0..9),
        ) {
            let value = Choice::Named { signed, text, list };
            prop_assert_eq!(decode(&encode(&value)), Ok(value));
        }
    }
}
