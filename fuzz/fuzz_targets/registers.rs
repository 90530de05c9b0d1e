//! Fuzzes [`ftvmm_fuzz::registers`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(registers);
