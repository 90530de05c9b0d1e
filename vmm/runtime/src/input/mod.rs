//! Where inputs come from: the live host, the live host with a log beside it, or a log.

mod alarm;
mod file_log;
mod live;
mod live_queue;
mod log_sink;
mod patience;
mod pulse;
mod recorded;
mod replay;
mod sampling;
mod tick_hold;

pub use alarm::GuestTimer;
pub use file_log::{FileLog, FinishedLog, OnRecordError};
pub use live::LiveInputs;
pub use live_queue::InputQueue;
pub use log_sink::LogSink;
pub use patience::InputDelays;
pub use pulse::{IdleGuard, Pulse, PulseWatch, VcpuHealth};
pub use recorded::{CheckPlan, Recorder, Recording};
pub use replay::{Divergence, Fed, Feed, FileFeed, Replay};

pub use crate::input_error::InputError;
use ftvmm_host::sync;
