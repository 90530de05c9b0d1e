//! Log records, replay cursor, output gate and the role state machine.
//!
//! Everything here decides and nothing here does: no sockets, files, threads or clocks. Bytes,
//! times and events come in as arguments; what to do comes out as values. The `vmm` crate performs
//! it, and the tests perform it in memory with a seeded schedule.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`record`], [`group`], [`log`] | log records, their encoding, the log file |
//! | [`log_stat`] | statistics and differences of log files |
//! | [`fingerprint`] | the facts two machines must share |
//! | [`cursor`] | what the log wants at an exit |
//! | [`digest`] | what is compared of an output |
#![forbid(unsafe_code)]

pub mod cursor;
pub mod digest;
pub mod fingerprint;
pub mod group;
pub mod log;
pub mod log_stat;
pub mod record;
mod varint;

pub use cursor::{CursorError, CursorStep, ReplayCursor};
pub use digest::OutputDigest;
pub use fingerprint::{Difference, Fingerprint, PROTOCOL_VERSION};
pub use group::{CodecError, Group, GroupEncoder, GroupHead, decode_group, peek_group};
pub use log::{LogError, LogHeader, LogReader, LogWriter, Tail};
pub use record::{Check, End, EndReason, Event, Ordinal, OutputOrdinal, Record, Term};
