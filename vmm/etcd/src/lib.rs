//! The etcd witness: a [`WitnessStore`](ftvmm_replication::witness::WitnessStore) in a cluster of
//! etcd servers, for hosts that share no storage.
//!
//! A crate of its own, because etcd's protocol brings an executor: tokio runs on the thread that
//! asks the witness, while it asks, and nowhere else. Nobody but `vmm/cli` knows this crate; the
//! runtime sees the trait only. Decision 0037 says what is asked of etcd, and why.

#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod address;
mod fan;
mod member;
mod request;
mod store;

pub use address::{Address, AddressError, MEMBERS_MAX};
pub use member::{Credentials, User, UserError};
pub use store::EtcdWitness;
