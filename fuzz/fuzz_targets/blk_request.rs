//! Fuzzes [`ftvmm_fuzz::blk_request`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(blk_request);
