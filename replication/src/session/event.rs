//! The events that a session takes, and the actions that it returns.

use core::fmt;

use super::decision::Row;
use crate::digest::OutputDigest;
use crate::incident::IncidentReport;
use crate::message::Message;
use crate::policy::{Refusal, ReleasePolicy, StopReason};
use crate::record::{Ordinal, Term};
use crate::state::StatePart;
use crate::wire::WireError;

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DisconnectReason {
    /// The peer closed it.
    Closed,
    /// The transport failed.
    Transport {
        /// The transport's error.
        description: String,
    },
    /// The peer's bytes were not understood; the caller has closed the connection.
    Wire(WireError),
}

impl fmt::Display for DisconnectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("peer closed the connection"),
            Self::Transport { description } => f.write_str(description),
            Self::Wire(error) => error.fmt(f),
        }
    }
}

/// What happened. Connections come one at a time: the caller brings no second one before it has
/// reported [`SessionEvent::Disconnected`] or been told [`Action::HangUp`] for the first, and
/// reports nothing of a connection it was told to hang up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// A connection to a peer stands.
    Connected,
    /// The peer sent a message.
    Received(Message),
    /// The connection is gone.
    Disconnected {
        /// Why.
        reason: DisconnectReason,
    },
    /// Time passed. Due at [`Session::next_deadline_ns`](super::Session::next_deadline_ns) at the
    /// latest.
    Tick,
    /// The recorder finished a log group.
    Group {
        /// As [`crate::GroupEncoder::finish`] made it.
        bytes: Vec<u8>,
    },
    /// The guest transmitted a frame. The same on both sides; outputs are numbered here.
    Output {
        /// Exit at which it did.
        at: Ordinal,
        /// Digest of the output.
        digest: OutputDigest,
        /// The frame.
        frame: Vec<u8>,
    },
    /// The run loop left this exit.
    Executed(Ordinal),
    /// The witness answered [`Action::HoldTerm`] or [`Action::ClaimTerm`].
    TermClaimed {
        /// The term asked for.
        term: Term,
        /// Whether it is ours.
        granted: bool,
    },
    /// The run loop cannot follow the log.
    ReplayFault {
        /// Why: ordinal, field, expected and seen value.
        description: String,
    },
    /// The guest ended.
    GuestEnded {
        /// Digest of registers, memory and device state.
        state_digest: [u8; 32],
    },
    /// The guest asked its disk for a flush. The same on both sides.
    FlushAsked {
        /// The guest's request.
        id: u64,
    },
    /// This host's disk has everything up to this flush of the guest's.
    DiskFlushed {
        /// The guest's request.
        id: u64,
    },
    /// This host's disk failed, and the host is to leave rather than to tell the guest.
    DiskFailed {
        /// The guest's request.
        id: u64,
        /// What failed.
        description: String,
    },
    /// The state this host is given cannot be restored.
    StateUnusable {
        /// What failed.
        description: String,
    },
    /// The vCPU thread has made no progress for longer than the failure limit, although it waits
    /// for nothing: the host does not run it.
    VcpuStuck {
        /// For how long.
        unseen_ns: u64,
    },
    /// This host's way to the guest's clients is whole, or is not. It counts as whole until then.
    ClientLink {
        /// It is.
        up: bool,
    },
    /// The host was asked to stop.
    HostStop,
    /// The guest is to start without waiting for a backup (primary).
    StartAlone,
    /// A part of the state [`Action::SendState`] asked for.
    State(StatePart),
    /// Its last part: the guest stands at this exit, and takes no input before this event.
    StateEnd {
        /// The exit.
        at: Ordinal,
        /// Processor and devices.
        machine: Vec<u8>,
        /// The guest's requests to its disk up to this one are carried out in the state.
        disk_through: u64,
    },
    /// So much of the state is restored (backup).
    StateRestored {
        /// As [`StatePart::len_bytes`] counts.
        restored_bytes: u64,
    },
    /// The run loop has used up the log and takes live inputs (backup, after [`Action::GoLive`]).
    TookOver {
        /// The last exit it has left.
        through: Ordinal,
    },
    /// The guest stands still, as the operator asked for a switch of roles (primary). It goes on
    /// after [`Action::Follow`] or [`Action::GoAlone`].
    Yield {
        /// The last exit it has left; everything up to there and of the next is in the log.
        through: Ordinal,
    },
    /// The operator lets the backup go.
    Detach,
    /// Frames for the guest came here although the other host is active: the network has not
    /// learned yet (backup).
    Strays(Vec<Vec<u8>>),
}

/// What to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this to the peer.
    Send(Message),
    /// Put this frame on the network now. A frame from the gate comes of
    /// [`Session::release`](super::Session::release) only.
    Transmit(Vec<u8>),
    /// Ask the witness for this term and report [`SessionEvent::TermClaimed`]. The guest runs in it
    /// from then on, and the witness is to know. When the witness gives no answer, ask again.
    ClaimTerm(Term),
    /// The same for a term to be offered to a backup: the witness is to know that nothing runs in
    /// it yet. [`Self::ClaimTerm`] of the same term follows before the guest starts.
    HoldTerm(Term),
    /// Start the guest from power-on.
    Begin {
        /// The term in which it starts.
        term: Term,
        /// What its RTC says, in seconds since 1970.
        rtc_epoch_s: u64,
        /// When outputs are released.
        release: ReleasePolicy,
    },
    /// Give this group to the replay cursor (backup).
    DeliverGroup(Vec<u8>),
    /// Seal the replay cursor: consume every record received, then take live inputs. Announce the
    /// guest's MAC address.
    GoLive {
        /// The term in which this host is active.
        term: Term,
    },
    /// The primary goes on without a backup; log groups are no longer asked for.
    GoAlone {
        /// The term in which it does.
        term: Term,
    },
    /// A backup joins: send [`SessionEvent::State`] while the guest runs, then stop it shortly for
    /// [`SessionEvent::StateEnd`]. Log groups are not asked for meanwhile.
    SendState,
    /// The backup has restored so much of the state.
    BackupRestored {
        /// As [`StatePart::len_bytes`] counts.
        restored_bytes: u64,
    },
    /// Log groups are asked for again, from exit `at` on, at which the guest stands.
    Protect {
        /// The exit.
        at: Ordinal,
    },
    /// A whole state is about to come: forget the one there is (backup).
    Join {
        /// When outputs are released.
        release: ReleasePolicy,
    },
    /// Restore this part of the state and report [`SessionEvent::StateRestored`] (backup).
    RestoreState(StatePart),
    /// This host follows the other's log from now on, after the exit it has left.
    Follow {
        /// The new term.
        term: Term,
        /// The last exit this host has left.
        through: Ordinal,
    },
    /// Have the guest stand still for a switch of roles, as for the operator's, and report
    /// [`SessionEvent::Yield`].
    SwitchRoles,
    /// Give these frames to the guest, as if they had come here.
    Receive(Vec<Vec<u8>>),
    /// Keep this report and count a divergence.
    Incident(Box<IncidentReport>),
    /// While `true` the guest must wait at its exit. The recorder must have handed over its
    /// unfinished group before it waits, or the backup waits as well.
    Congested(bool),
    /// The guest may be told of every flush up to this one that is done here.
    CompleteFlushes {
        /// The last.
        through: u64,
    },
    /// The guest may be told that this request to its disk failed.
    CompleteDisk {
        /// The request.
        id: u64,
    },
    /// Close the connection, after what was to be sent before.
    HangUp,
    /// The primary takes no backup now, for a reason that may pass: connect again later (backup,
    /// before the guest starts).
    TurnedAway(Refusal),
    /// A decision was taken; for logs.
    Decided {
        /// The row of the table.
        row: &'static Row,
        /// What led to it.
        detail: String,
    },
    /// The session is over, after what was to be sent and transmitted before. No later event has
    /// an effect.
    Stop(StopReason),
}
