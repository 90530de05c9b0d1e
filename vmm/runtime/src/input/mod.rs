//! Where inputs come from: the live host, the live host with a log beside it, or a log.

mod file_log;
mod guest_timer;
mod input_queue;
mod live;
mod log_sink;
mod pulse;
mod recorded;
mod replay;
mod sampling;
mod slice_pacing;
mod tick_hold;

pub use file_log::{FileLog, FinishedLog, OnRecordError};
pub use guest_timer::GuestTimer;
pub use input_queue::{InputQueue, Urgency};
pub use live::LiveInputs;
pub use log_sink::LogSink;
pub use pulse::{IdleGuard, Pulse, PulseWatch, VcpuHealth};
pub use recorded::{CheckPlan, Recorder, Recording};
pub use replay::{Divergence, Fed, Feed, FileFeed, Replay};
pub use slice_pacing::InputDelays;

pub use crate::input_error::InputError;
use ftvmm_host::sync;
