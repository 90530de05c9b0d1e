//! Fuzzes [`ftvmm_fuzz::disk_label`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(disk_label);
