//! Fuzzes [`ftvmm_fuzz::decode_group`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(decode_group);
