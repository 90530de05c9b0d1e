//! The host's side of the guest's world: clock, entropy, tap, console, disk, signals, the channel
//! to the other host and the witness, and the threads that wait for them. It knows no KVM and
//! nothing of the guest's execution.

// These macros panic when standard output or standard error is closed.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod channel;
pub mod clock;
mod console;
pub mod contain;
pub mod disk;
pub mod entropy;
mod events;
pub mod folder;
mod link;
pub mod memory;
pub mod profile;
mod progress_timeout;
mod seldom;
mod signals;
mod spool;
mod stderr;
mod stop_limit;
pub mod sync;
mod tap;
mod tap_reader;
pub mod user_file;
mod witness_file;
mod write_behind;

pub use console::{Console, RawTerminal, Typed, read_console, restore_terminal};
pub use events::{
    EventLoop, HostEventsError, Subscriber, Ticker, repeating, resting_timer, set_timer, watch,
};
pub use seldom::Seldom;
pub use signals::BlockedSignals;
pub use stderr::{StandardError, finish_stderr, say, spool_stderr, stderr_dropped_bytes};
pub use stop_limit::{STOP_LONGEST, StopLimit};

pub use tap::{Tap, TapError, VNET_HEADER_BYTES, tap_mtu};
pub use tap_reader::TapReader;
pub use witness_file::FileWitness;
pub use write_behind::WriteBehind;
