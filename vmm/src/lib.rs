//! ftvmm: a deterministic record-replay VMM on stock KVM. This crate is the part that touches the
//! host: the KVM adapter, the boot loader, the machine and its run loop, host I/O and the command
//! line. It decides nothing about the replication protocol.

// They panic when nobody reads.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod boot;
pub mod build;
pub mod cli;
pub mod control;
pub mod cpu_template;
pub mod disk;
pub mod disk_completion;
pub mod doctor;
mod efer;
pub mod exit_chain;
pub mod fault;
pub mod guest;
pub mod host;
pub mod input;
pub mod input_error;
#[cfg(test)]
mod interleavings;
pub mod kvm;
pub mod machine;
pub mod machine_state;
pub mod micro_guest;
pub mod msr;
pub mod net_watch;
pub mod outputs;
mod page_tracker;
pub mod peer;
pub mod report;
pub mod run_loop;
pub mod snapshot;
pub mod sources;
pub mod step;
mod sync;
pub mod transfer;
pub mod tsc;
pub mod user_file;
pub mod virtual_machine;
