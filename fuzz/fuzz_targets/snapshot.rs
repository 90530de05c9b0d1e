//! Fuzzes [`ftvmm_fuzz::snapshot`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(snapshot);
