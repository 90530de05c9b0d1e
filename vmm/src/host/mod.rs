//! The host's side of the guest's world: clock, entropy, tap, console, signals, and the threads
//! that wait for them.

pub mod clock;
mod console;
pub mod entropy;
mod events;
mod life;
mod link;
pub mod memory;
mod signals;
mod spool;
mod stderr;
mod stop_limit;
mod tap;
mod tap_reader;
mod witness_file;
mod write_behind;

pub use console::{Console, RawTerminal, Typed, read_console, restore_terminal};
pub use events::{
    EventLoop, HostEventsError, Subscriber, Ticker, repeating, resting_timer, set_timer, watch,
};
pub use signals::BlockedSignals;
pub use stderr::{StandardError, finish_stderr, say, spool_stderr, stderr_dropped_bytes};
pub use stop_limit::{STOP_LONGEST, StopLimit};

pub use tap::{Tap, TapError, VNET_HEADER_BYTES, tap_mtu};
pub use tap_reader::TapReader;
pub use witness_file::FileWitness;
pub use write_behind::WriteBehind;
