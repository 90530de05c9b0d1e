//! Where threads meet, run by a checker (shuttle) in thousands of orders. A wake-up that is lost is
//! a deadlock there.
//!
//! The files under test are the product's own, compiled once more with the checker's primitives in
//! place of std's. They name what differs by `super::`.

#![allow(clippy::duplicate_mod, reason = "the same code with other primitives is the point")]
#![allow(dead_code, reason = "not every method has a part in a test")]

#[path = "../input/input_queue.rs"]
mod input_queue;
mod kick_target;
#[path = "../../../kvm/src/kicker.rs"]
mod kicker;
#[path = "../transfer/rendezvous.rs"]
mod rendezvous;
mod sync;
mod tests;

use crate::input::Pulse;
