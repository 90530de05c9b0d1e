//! What runs a guest: the run loop, where its inputs come from, where its outputs go, the pair's
//! other half and the control socket. It reaches the host through `ftvmm-host` and the processor
//! through `ftvmm-machine`, and decides nothing about the replication protocol.

// These macros panic when standard output or standard error is closed.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod build;
pub mod control;
pub mod input;
pub mod input_error;
#[cfg(test)]
mod interleavings;
pub mod outputs;
pub mod peer;
pub mod run_loop;
pub mod snapshot;
pub mod sources;
pub mod step;
pub mod testing;
pub mod transfer;
