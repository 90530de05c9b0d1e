//! Fuzzes [`ftvmm_fuzz::witness`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(witness);
