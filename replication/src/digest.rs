//! Digest of an output: what the two sides compare instead of the frames.

use core::fmt;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3Default;

use crate::record::{Hex, Ordinal};

/// xxh3-128 over where an output was produced, everything executed up to there, and its bytes.
///
/// Not a cryptographic digest: it guards against divergence, not against a forger on the channel.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputDigest(pub [u8; 16]);

impl OutputDigest {
    /// Digest of `frame`, transmitted at exit `at`. `chain` is the run loop's running digest of the
    /// exit stream, so that equal frames from different executions differ too.
    #[must_use]
    pub fn of(at: Ordinal, chain: u64, frame: &[u8]) -> Self {
        let mut hasher = Xxh3Default::new();
        hasher.update(&at.0.to_le_bytes());
        hasher.update(&chain.to_le_bytes());
        hasher.update(frame);
        Self(hasher.digest128().to_be_bytes())
    }
}

impl fmt::Display for OutputDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Debug for OutputDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OutputDigest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts() {
        let base = OutputDigest::of(Ordinal(1), 2, b"frame");
        assert_eq!(base, OutputDigest::of(Ordinal(1), 2, b"frame"));
        assert_ne!(base, OutputDigest::of(Ordinal(2), 2, b"frame"));
        assert_ne!(base, OutputDigest::of(Ordinal(1), 3, b"frame"));
        assert_ne!(base, OutputDigest::of(Ordinal(1), 2, b"frame."));
        assert_eq!(base.to_string().len(), 32);
    }
}
