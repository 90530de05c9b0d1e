//! Every fuzz target on random bytes: a fuzzer's first minute, in every run of the tests.

use ftvmm_fuzz::TARGETS;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_anything_panic(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        TARGETS.iter().for_each(|(_, run)| run(&bytes));
    }

    /// Small numbers make more of what is valid: tags, lengths, indices.
    #[test]
    fn no_small_numbers_make_anything_panic(bytes in prop::collection::vec(0..20u8, 0..700)) {
        TARGETS.iter().for_each(|(_, run)| run(&bytes));
    }
}
