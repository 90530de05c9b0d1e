//! Fuzzes [`ftvmm_fuzz::template`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(template);
