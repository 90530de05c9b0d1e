//! Fuzzes [`ftvmm_fuzz::kernel`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(kernel);
