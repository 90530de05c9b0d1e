//! Log records, replay cursor, output gate and the role state machine.
//!
//! Everything here decides and nothing here does: no sockets, files, threads or clocks. Bytes,
//! times and events come in as arguments; what to do comes out as values. `ftvmm-runtime` performs
//! it, and the tests perform it in memory with a seeded schedule.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`record`], [`group`], [`log`] | log records, their encoding, the log file |
//! | [`file_header`], [`snapshot`] | what files begin with, the snapshot file |
//! | [`log_stat`], [`log_diff`] | statistics and differences of log files |
//! | [`fingerprint`] | the facts two machines must share |
//! | [`build_id`] | which program it is |
//! | [`encoding`], `bounded` | plain data as bytes, and how much of it is taken from outside |
//! | [`check`] | what is compared of two executions |
//! | `disk` | what the log says of the guest's disk |
//! | [`mod@slice`] | the state of the guest where no exit names the point |
//! | [`state`] | the whole state of the guest, for attaching and snapshots |
//! | [`cursor`] | what the log wants at an exit |
//! | [`digest`], `gate` | what is compared of an output, and when it may leave |
//! | [`message`], [`wire`] | messages between primary and backup, and their framing |
//! | [`session`] | the role state machine: handshake, failure, take-over, divergence |
//! | [`peer`] | one host of a pair: the session and what its decisions touch |
//! | [`time`] | the types of host time and guest time |
//! | [`transfer`] | when a running guest is stopped for its state |
//! | [`witness`] | who may be active in a term |
#![forbid(unsafe_code)]

mod bounded;
pub mod build_id;
pub mod check;
mod codec_error;
pub mod cursor;
pub mod digest;
mod disk;
pub mod disk_label;
pub mod disk_use;
pub mod encoding;
pub mod file_header;
pub mod fingerprint;
mod gate;
pub mod group;
pub mod incident;
pub mod log;
pub mod log_diff;
pub mod log_stat;
pub mod message;
pub mod peer;
pub mod policy;
pub mod record;
mod record_reader;
pub mod replay;
pub mod session;
pub mod slice;
pub mod snapshot;
pub mod state;
mod tag;
pub mod time;
pub mod transfer;
mod varint;
pub mod wire;
mod wire_error;
pub mod witness;

pub use build_id::{BuildId, BuildIdError};
pub use check::{Check, CpuCheck, MemoryCheck, MemoryCheckMode, PageHash};
pub use cursor::{CursorError, CursorStep, ReplayCursor};
pub use digest::OutputDigest;
pub use disk::{DiskAnswer, DiskComparison};
pub use disk_label::{DiskLabel, DiskMark, DiskState};
pub use disk_use::{DiskPurpose, DiskRefusal, Force, LastRun, may_use};
pub use file_header::{FileHeader, HeaderError, Start};
pub use fingerprint::{Difference, Fingerprint, OnPanic, OnReset, PROTOCOL_VERSION, TscMode};
pub use group::{CodecError, Group, GroupEncoder, GroupHead, decode_group, peek_group};
pub use incident::{DivergenceCause, Evidence, IncidentReport, OutputEvidence};
pub use log::{LogError, LogHeader, LogReader, LogWriter, Tail};
pub use message::{ByeReason, Message};
pub use peer::{Effect, PeerCore};
pub use policy::{
    DivergencePolicy, Limits, LinkPolicy, Refusal, ReleasePolicy, Role, SessionConfig,
    SessionConfigError, StopReason,
};
pub use record::{End, EndReason, Event, Ordinal, OutputOrdinal, Record, SnapshotMark, Term};
pub use replay::{ReplayStep, Replayer};
pub use session::{Action, DisconnectReason, Session, SessionEvent};
pub use slice::{PAGE_BYTES, PageDeltas, Slice, SliceError};
pub use snapshot::{SnapshotError, SnapshotReader, SnapshotWriter};
pub use state::StatePart;
pub use time::{GuestClock, GuestNs, HostNs};
pub use wire::WireError;
pub use witness::{Claim, WitnessError, WitnessStore};
