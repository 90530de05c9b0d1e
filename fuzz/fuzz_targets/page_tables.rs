//! Fuzzes [`ftvmm_fuzz::page_tables`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(page_tables);
