//! The lab and what the end-to-end tests share.
//!
//! [`lab`] gives a test one or two hosts with a working KVM, a network to real clients and a
//! hard stop. [`Program`] brings what that needs from Debian. The product is
//! a program that is carried into a host and run there: [`guest_run`]. [`clients`] talk to its
//! guest.

pub mod chaos;
pub mod clients;
pub mod clock;
pub mod cost;
pub mod download;
pub mod group;
pub mod guest_run;
pub mod lab;
pub mod measure;
pub mod pair;
pub mod ping;
pub mod replayed;
pub mod site;
pub mod stranger;
pub mod stress;

pub use ftvmm_host_programs::{Program, built, packages, progress};
