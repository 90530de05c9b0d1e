//! Fuzzes [`ftvmm_fuzz::wire`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(wire);
