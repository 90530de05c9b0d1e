//! Fuzzes [`ftvmm_fuzz::slice`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(slice);
