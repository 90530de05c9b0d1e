//! The host's side of the guest's world: clock, entropy, tap, console, signals, and the one thread that waits for them.

pub mod clock;
mod console;
pub mod entropy;
mod events;
mod net_watch;
mod outputs;
mod tap;
mod witness_file;

pub use console::{RawTerminal, read_console};
pub use events::{
    BlockedSignals, EventLoop, HostEventsError, Subscriber, TapReader, Ticker, resting_timer,
    set_timer, watch,
};
pub use net_watch::{NetWatch, NetworkReport};
pub use outputs::{HostOutputs, print_console};

pub use tap::{Tap, TapError, VNET_HEADER_BYTES, tap_mtu};
pub use witness_file::FileWitness;
