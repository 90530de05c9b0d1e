//! Device models as deterministic state machines. Nothing here knows KVM, a file descriptor, a clock or a thread.
//!
//! What enters from outside the guest enters as an [`Input`], through one function; what leaves is an [`Output`].

mod event;

pub use event::{Input, Output};
