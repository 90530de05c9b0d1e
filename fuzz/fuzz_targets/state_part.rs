//! Fuzzes [`ftvmm_fuzz::state_part`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(state_part);
