//! The control socket of a running ftvmm (`--control PATH`): HTTP and JSON on a Unix socket, as
//! users know it from Firecracker's API socket.
//!
//! ```text
//! curl, ftvmm status ─► socket ─► http ─► routes ─► Operator, made by who runs the guest
//! ```
//!
//! Nothing here touches the guest: an [`Operator`] passes on what is asked, and the run does it
//! when it gets there. Every connection has a thread of its own, so that a request that takes long
//! keeps no other from being answered. `docs/openapi.yaml` describes the interface;
//! `tests/openapi.rs` holds the server to it.

mod client;
mod clients;
pub mod http;
mod operator;
mod patience;
mod routes;
mod server;
mod socket;
mod solo;
#[cfg(test)]
mod tests;

pub use client::{ClientError, Reply, request};
pub use operator::{
    AttachProgress, AttachSummary, ControlRole, ControlWitness, Operator, Refused, SnapshotSummary,
    Status,
};
pub use routes::{ROUTES, Route};
pub use server::{ControlError, ControlServer};
pub use solo::{SoloOperator, link};
