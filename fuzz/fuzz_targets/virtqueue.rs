//! Fuzzes [`ftvmm_fuzz::virtqueue`].
#![cfg_attr(feature = "libfuzzer", no_main)]

ftvmm_fuzz::target!(virtqueue);
