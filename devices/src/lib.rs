//! Device models as deterministic state machines. Nothing here knows KVM, a file descriptor, a clock or a thread.
//!
//! What enters from outside the guest enters as an [`Input`], through one function, [`Board::apply`]; what leaves is an
//! [`Output`].

mod board;
mod civil_time;
mod event;
mod pic;
mod pit;
mod pit_counter;
mod reset;
mod rtc;
mod serial;
mod state;

pub use board::{Board, BoardConfig, FLOATING_BUS};
pub use event::{Input, Output};
pub use pit::{OWED_TICKS_MAX, PIT_HZ};
pub use reset::PowerEvent;
pub use serial::BACKLOG_BYTES_MAX;
pub use state::InvalidState;
