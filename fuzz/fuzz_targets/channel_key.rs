//! Fuzzes [`ftvmm_fuzz::channel_key`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(channel_key);
