//! Fuzzes [`ftvmm_fuzz::http`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(http);
