//! What is taken from outside: numbers, lists and texts with a bound, which is checked before
//! anything of them is used or kept.
//!
//! Why: an item that takes a byte where it is encoded may take a hundred in memory, so the length
//! of a message says little about what it costs (decision 0030). These are for `serde`'s
//! `deserialize_with`; the encoding is that of a plain vector or string.

use core::fmt;
use core::marker::PhantomData;

use ftvmm_devices::FRAME_BYTES_MAX;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Largest number that a counter may have when it comes from outside: from a peer, a file or the
/// witness. A greater one decodes as an error.
///
/// Why: counters go up by one. A counter in memory is such a number and what was counted since, so
/// neither the one after it nor the sum of any three leaves the 64-bit range, however hostile the
/// number was (decision 0030). A guest that makes ten million exits a second gets here after
/// 14,600 years.
pub const COUNTER_MAX: u64 = u64::MAX >> 2;
/// Most frames that one message carries.
pub(crate) const FRAMES_MAX: usize = 64;

struct List<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        if let Some(claimed) = list.size_hint().filter(|claimed| *claimed > MAX) {
            return Err(A::Error::invalid_length(claimed, &self));
        }
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            if items.len() == MAX {
                return Err(A::Error::invalid_length(MAX + 1, &self));
            }
            items.push(item);
        }
        Ok(items)
    }
}

/// A list of at most `MAX` items.
pub(crate) fn list<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(List::<T, MAX>(PhantomData))
}

/// Bytes of what is at most `MAX` bytes long.
struct Short<const MAX: usize>;

impl<const MAX: usize> Visitor<'_> for Short<MAX> {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX} bytes")
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        match bytes.len() <= MAX {
            true => Ok(bytes.to_vec()),
            false => Err(E::invalid_length(bytes.len(), &self)),
        }
    }
}

/// A frame, at most [`FRAME_BYTES_MAX`] bytes long.
pub(crate) fn frame<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    deserializer.deserialize_bytes(Short::<FRAME_BYTES_MAX>)
}

struct Frame(Vec<u8>);

impl<'de> Deserialize<'de> for Frame {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        frame(deserializer).map(Self)
    }
}

/// At most [`FRAMES_MAX`] frames.
pub(crate) fn frames<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
    let frames = list::<_, Frame, FRAMES_MAX>(deserializer)?;
    Ok(frames.into_iter().map(|Frame(frame)| frame).collect())
}

struct ShortText<const MAX: usize>;

impl<const MAX: usize> Visitor<'_> for ShortText<MAX> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a text of at most {MAX} bytes")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        match text.len() <= MAX {
            true => Ok(text.to_owned()),
            false => Err(E::invalid_length(text.len(), &self)),
        }
    }
}

/// A text of at most `MAX` bytes.
pub(crate) fn text<'de, D, const MAX: usize>(deserializer: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    deserializer.deserialize_str(ShortText::<MAX>)
}

struct Text<const MAX: usize>(String);

impl<'de, const MAX: usize> Deserialize<'de> for Text<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::<_, MAX>(deserializer).map(Self)
    }
}

/// A text of at most `MAX` bytes, if there is one.
pub(crate) fn optional_text<'de, D, const MAX: usize>(
    deserializer: D,
) -> Result<Option<String>, D::Error>
where
    D: Deserializer<'de>,
{
    let text = Option::<Text<MAX>>::deserialize(deserializer)?;
    Ok(text.map(|Text(text)| text))
}

/// At most `ITEMS` texts of at most `BYTES` bytes each.
pub(crate) fn texts<'de, D, const ITEMS: usize, const BYTES: usize>(
    deserializer: D,
) -> Result<Vec<String>, D::Error>
where
    D: Deserializer<'de>,
{
    let texts = list::<_, Text<BYTES>, ITEMS>(deserializer)?;
    Ok(texts.into_iter().map(|Text(text)| text).collect())
}

/// The beginning of `text` that has at most `bytes_max` bytes; a cut is marked.
pub(crate) fn clip(mut text: String, bytes_max: usize) -> String {
    const MARK: &str = " …";
    if text.len() > bytes_max {
        let mut end = bytes_max.saturating_sub(MARK.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;
    use crate::encoding::{EncodingError, decode, encode};

    /// One of each, as they are used.
    #[derive(Debug, PartialEq, Serialize, serde::Deserialize)]
    struct Bounded {
        #[serde(deserialize_with = "list::<_, _, 3>")]
        numbers: Vec<u64>,
        #[serde(deserialize_with = "frames")]
        frames: Vec<Vec<u8>>,
        #[serde(deserialize_with = "optional_text::<_, 4>")]
        text: Option<String>,
        #[serde(deserialize_with = "texts::<_, 2, 4>")]
        texts: Vec<String>,
    }

    fn largest() -> Bounded {
        Bounded {
            numbers: vec![1 << 60; 3],
            frames: vec![vec![7; FRAME_BYTES_MAX]; FRAMES_MAX],
            text: Some("four".into()),
            texts: vec!["four".into(); 2],
        }
    }

    #[test]
    fn what_is_within_the_bounds_is_read_and_one_more_is_not() {
        assert_eq!(decode::<Bounded>(&encode(&largest())), Ok(largest()));
        let more: [fn(&mut Bounded); 6] = [
            |value| value.numbers.push(1),
            |value| value.frames.push(vec![]),
            |value| value.frames[5].push(1),
            |value| value.text = Some("fives".into()),
            |value| value.texts.push(String::new()),
            |value| value.texts[1].push('s'),
        ];
        for (case, change) in more.into_iter().enumerate() {
            let mut value = largest();
            change(&mut value);
            let decoded = decode::<Bounded>(&encode(&value));
            assert_eq!(decoded, Err(EncodingError::Malformed), "case {case}");
        }
    }

    #[test]
    fn a_long_text_is_cut_between_two_characters() {
        assert_eq!(clip("four".into(), 4), "four");
        assert_eq!(clip("sixteen letters!".into(), 12), "sixteen  …");
        for bytes_max in 4..40 {
            let clipped = clip("ä€ä€ä€ä€ä€ä€ä€ä€".into(), bytes_max);
            assert!(clipped.len() <= bytes_max, "{clipped} for {bytes_max}");
        }
    }
}
