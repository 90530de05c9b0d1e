//! Fuzzes [`ftvmm_fuzz::machine_state`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(machine_state);
