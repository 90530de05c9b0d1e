//! The host's side of the guest's world: clock, tap, console, signals, and the one thread that waits for them.

pub mod clock;
mod console;
mod events;
mod outputs;
mod tap;

pub use console::{RawTerminal, read_console};
pub use events::{EventLoop, HostEventsError, Signals, Subscriber, TapReader, Ticker, watch};
pub use outputs::{HostOutputs, print_console};

pub use tap::{Tap, TapError};
