//! The running digest of all exits: what tells two runs apart that went different ways.

use ftvmm_replication::Ordinal;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Covers, of every port, memory-mapped and MSR exit, its ordinal, its address and the data that
/// went either way; of a slice, its ordinal.
/// Two runs that differ in one exit have different digests from then on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitChain(u64);

impl ExitChain {
    /// A chain that goes on after `digest`.
    pub fn resumed(digest: u64) -> Self {
        Self(digest)
    }

    /// Adds an exit that has been answered.
    pub fn link(&mut self, at: Ordinal, address: u64, data: &[u8]) {
        let mut words = [0; 24];
        words[..8].copy_from_slice(&at.0.to_le_bytes());
        words[8..16].copy_from_slice(&address.to_le_bytes());
        words[16..].copy_from_slice(&xxh3_64(data).to_le_bytes());
        self.0 = xxh3_64_with_seed(&words, self.0);
    }

    /// The digest so far.
    pub fn digest(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_exit_counts() {
        let chain = |exits: &[(u64, u64, &[u8])]| {
            let mut chain = ExitChain::default();
            exits.iter().for_each(|&(at, address, data)| chain.link(Ordinal(at), address, data));
            chain.digest()
        };
        let usual = chain(&[(1, 0x20, &[0x20]), (2, 0x3f8, b"a")]);
        assert_eq!(usual, chain(&[(1, 0x20, &[0x20]), (2, 0x3f8, b"a")]));
        for other in [
            chain(&[(1, 0x20, &[0x20]), (3, 0x3f8, b"a")]),
            chain(&[(1, 0x20, &[0x20]), (2, 0x3f9, b"a")]),
            chain(&[(1, 0x20, &[0x20]), (2, 0x3f8, b"b")]),
            chain(&[(1, 0x20, &[0x21]), (2, 0x3f8, b"a")]),
        ] {
            assert_ne!(usual, other);
        }
    }
}
