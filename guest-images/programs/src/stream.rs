//! An endless stream of bytes that both ends can compute: what `/bytes/N` serves.
//!
//! Word `i` (little-endian, 8 bytes) of the stream with seed `s` is output `i` of SplitMix64
//! started at `s` (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA
//! 2014, §4). Its state is a plain counter, so any offset costs the same: a range request needs no
//! run-up and no memory.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

use crate::AppletError;
use crate::options::Options;

/// The seed of `/bytes/N` when the request names none.
pub const DEFAULT_SEED: u64 = 0xF7;

const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
const WORD_BYTES: u64 = 8;
const CHUNK_BYTES: usize = 64 << 10;

/// SplitMix64's finaliser, a bijection on 64 bits.
pub fn mix(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}

/// Fills `buffer` with the bytes of stream `seed` that begin at `offset_bytes`.
pub fn fill(seed: u64, offset_bytes: u64, buffer: &mut [u8]) {
    let mut index = offset_bytes / WORD_BYTES;
    let mut skip = (offset_bytes % WORD_BYTES) as usize;
    let mut rest = buffer;
    while !rest.is_empty() {
        index = index.wrapping_add(1);
        let word = mix(seed.wrapping_add(index.wrapping_mul(GOLDEN_GAMMA))).to_le_bytes();
        let bytes = &word[skip..];
        let count = bytes.len().min(rest.len());
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&bytes[..count]);
        rest = later;
        skip = 0;
    }
}

/// The SHA-256 of the first `length_bytes` of stream `seed`.
pub fn stream_sha256(seed: u64, length_bytes: u64) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut offset_bytes = 0;
    while offset_bytes < length_bytes {
        let count = (length_bytes - offset_bytes).min(CHUNK_BYTES as u64) as usize;
        fill(seed, offset_bytes, &mut buffer[..count]);
        hash.update(&buffer[..count]);
        offset_bytes += count as u64;
    }
    hash.finalize().into()
}

/// The SHA-256 of everything that `source` yields.
///
/// # Errors
/// Those of `source`.
pub fn reader_sha256(mut source: impl Read) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match source.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// Lower-case hexadecimal, as `sha256sum` prints it.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let seed = options.position(1, "a seed")?.unwrap_or(DEFAULT_SEED);
    let digest = match options.position(0, "a length in bytes")? {
        Some(length_bytes) => stream_sha256(seed, length_bytes),
        None => reader_sha256(io::stdin().lock()).map_err(AppletError::io("standard input"))?,
    };
    println!("{}", hex(&digest));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_words_are_those_of_splitmix64() {
        // First outputs for seed 1234567, as published with the reference implementations
        // (https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64).
        let mut bytes = [0; 16];
        fill(1_234_567, 0, &mut bytes);
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(word(0), 6_457_827_717_110_365_317);
        assert_eq!(word(8), 3_203_168_211_198_807_973);
    }

    #[test]
    fn the_digest_of_the_stream_is_that_of_its_bytes() {
        let length = CHUNK_BYTES + 13;
        let mut bytes = vec![0; length];
        fill(DEFAULT_SEED, 0, &mut bytes);
        let digest = stream_sha256(DEFAULT_SEED, length as u64);
        assert_eq!(digest, reader_sha256(&bytes[..]).unwrap());
        assert_ne!(digest, stream_sha256(DEFAULT_SEED, length as u64 - 1));
        assert_ne!(digest, stream_sha256(DEFAULT_SEED + 1, length as u64));
    }

    #[test]
    fn the_digest_is_a_standard_one() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(hex(&stream_sha256(1, 0)), empty);
    }

    proptest! {
        #[test]
        fn any_part_is_the_same_as_in_the_whole(start in 0usize..500, length in 0usize..200) {
            let mut whole = vec![0; 700];
            fill(9, 0, &mut whole);
            let mut part = vec![0; length];
            fill(9, start as u64, &mut part);
            prop_assert_eq!(&whole[start..start + length], &part[..]);
        }
    }
}
