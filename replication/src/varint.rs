//! Unsigned LEB128: seven bits a byte, least significant first, the top bit says "more follows".
//!
//! The number encoding of DWARF, protobuf and postcard. Small numbers, the rule in a log of
//! deltas, take one byte. A number has one encoding: one with more bytes than it needs is refused.

/// Longest encoding of a `u64`.
pub(crate) const VARINT_BYTES_MAX: usize = 10;

/// Appends `value` to `out`.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    let mut buffer = [0u8; VARINT_BYTES_MAX];
    let mut length = 0;
    while value >= 0x80 {
        buffer[length] = (value & 0x7f) as u8 | 0x80;
        value >>= 7;
        length += 1;
    }
    buffer[length] = value as u8;
    out.extend_from_slice(&buffer[..=length]);
}

/// Why no number could be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VarintError {
    /// The bytes end inside the number.
    Short,
    /// The number does not fit 64 bits.
    Overflow,
    /// The last byte adds nothing, so the number has a shorter encoding.
    Overlong,
}

/// Takes a number off the front of `input`.
pub(crate) fn take(input: &mut &[u8]) -> Result<u64, VarintError> {
    let mut value = 0u64;
    for index in 0..VARINT_BYTES_MAX {
        let byte = *input.get(index).ok_or(VarintError::Short)?;
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * index as u32;
        if (bits << shift) >> shift != bits {
            return Err(VarintError::Overflow);
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            if byte == 0 && index > 0 {
                return Err(VarintError::Overlong);
            }
            *input = &input[index + 1..];
            return Ok(value);
        }
    }
    Err(VarintError::Overflow)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_encodings() {
        for (value, bytes) in [
            (0, &[0x00][..]),
            (127, &[0x7f]),
            (128, &[0x80, 0x01]),
            (300, &[0xac, 0x02]),
            (u64::MAX, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
        ] {
            let mut out = Vec::new();
            put(&mut out, value);
            assert_eq!(out, bytes);
            let mut input = bytes;
            assert_eq!(take(&mut input), Ok(value));
            assert!(input.is_empty());
        }
    }

    #[test]
    fn short_and_oversized_numbers_are_refused() {
        assert_eq!(take(&mut &[0x80][..]), Err(VarintError::Short));
        assert_eq!(take(&mut &[][..]), Err(VarintError::Short));
        assert_eq!(take(&mut &[0xff; 10][..]), Err(VarintError::Overflow));
        assert_eq!(take(&mut &[0x80; 11][..]), Err(VarintError::Overflow));
    }

    #[test]
    fn a_number_with_a_shorter_encoding_is_refused() {
        for bytes in [&[0x80, 0x00][..], &[0x81, 0x00], &[0xff, 0x80, 0x00]] {
            assert_eq!(take(&mut &*bytes), Err(VarintError::Overlong), "{bytes:x?}");
        }
        let mut longest = [0x80; VARINT_BYTES_MAX];
        longest[VARINT_BYTES_MAX - 1] = 0;
        assert_eq!(take(&mut &longest[..]), Err(VarintError::Overlong));
    }

    proptest! {
        #[test]
        fn accepted_bytes_are_the_encoding(
            bytes in prop::collection::vec(prop_oneof![0..3u8, 0x7e..0x82u8, any::<u8>()], 0..12),
        ) {
            let mut rest = &bytes[..];
            if let Ok(value) = take(&mut rest) {
                let mut again = Vec::new();
                put(&mut again, value);
                prop_assert_eq!(&again[..], &bytes[..bytes.len() - rest.len()]);
            }
        }

        #[test]
        fn every_number_is_read_again(value in any::<u64>(), shift in 0..64u32) {
            let (value, mut bytes) = (value >> shift, Vec::new());
            put(&mut bytes, value);
            prop_assert_eq!(take(&mut &bytes[..]), Ok(value));
        }
    }
}
