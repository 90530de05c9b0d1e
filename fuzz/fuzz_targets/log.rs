//! Fuzzes [`ftvmm_fuzz::log`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(log);
