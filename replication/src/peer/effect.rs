//! What a host of a pair wants done.

use crate::disk_label::DiskMark;
use crate::incident::IncidentReport;
use crate::policy::{ReleasePolicy, StopReason};
use crate::record::{Ordinal, Term};
use crate::session::DisconnectReason;
use crate::session::decision::Row;
use crate::witness::{Nonce, Place};

/// To be performed in the order in which they come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send these bytes to the other host.
    Send(Vec<u8>),
    /// A group of the log was among what is to be sent: report that it was with
    /// [`super::PeerCore::log_sent`], so that its cost is known.
    LogSent,
    /// Close the connection, after what was to be sent before.
    HangUp,
    /// End the connection so that the other host sees that it broke, and does not take this one for
    /// dead: with a reset (RST), not with FIN. Then make another one, or take it
    /// ([`super::PeerCore::wants_connection`]).
    BreakOff,
    /// Put this frame on the network.
    Transmit(Vec<u8>),
    /// Tell the network where the guest is now.
    Announce,
    /// Ask the witness for this term until it answers, and report
    /// [`crate::SessionEvent::TermClaimed`]. The guest runs in it.
    ClaimTerm(Term),
    /// The same; no guest runs in it yet.
    HoldTerm(Term),
    /// Send the guest's state to the backup: parts by [`super::PeerCore::send_part`] while the
    /// guest runs, then [`crate::SessionEvent::StateEnd`].
    SendState {
        /// Which one: a newer one ends those before it.
        number: u64,
    },
    /// Call [`super::PeerCore::look_at_log`] in so many nanoseconds.
    LookAtLogIn {
        /// From now.
        ns: u64,
    },
    /// What arrives on this host is for the guest.
    OpenInputs,
    /// What arrives on this host is not for the guest. Frames that wait go to the other host
    /// ([`super::PeerCore::strays`]). When the guest was to be switched off here, this host is to
    /// end: report [`crate::SessionEvent::HostStop`].
    CloseInputs,
    /// Give these frames to the guest, as if they had come here.
    GiveFrames(Vec<Vec<u8>>),
    /// Have the running guest return from KVM.
    InterruptGuest,
    /// Make the vCPU thread check for orders, wherever it waits.
    RequestAttention,
    /// The run is over: the guest must not run on, wherever it is.
    StopGuest,
    /// The guest may be told of every flush of its disk up to this one that is done here.
    CompleteFlushes {
        /// The last.
        through: u64,
    },
    /// The guest may be told what became of this request to its disk.
    CompleteDisk {
        /// The request.
        id: u64,
    },
    /// From now on this host's disk is this: to be noted beside it before the guest's next write.
    MarkDisk(DiskMark),
    /// Write a new number into the witness and report
    /// [`super::PeerCore::proof_written`].
    Prove {
        /// Of the connection.
        number: u64,
    },
    /// Look for the other host's number in the witness and report
    /// [`super::PeerCore::proof_looked_for`].
    LookFor {
        /// Of the connection.
        number: u64,
        /// What to look for.
        nonce: Nonce,
    },
    /// Keep this report of a divergence.
    KeepIncident(Box<IncidentReport>),
    /// Tell the operator.
    Tell(Notice),
}

/// What the operator reads in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The connection is gone.
    Disconnected {
        /// Why.
        reason: DisconnectReason,
    },
    /// A connection that broke stands again, and nothing was lost.
    Resumed {
        /// So many messages are sent again.
        messages: usize,
    },
    /// The guest starts in lockstep, or alone.
    Begins {
        /// In this term.
        term: Term,
        /// When its frames leave.
        release: ReleasePolicy,
    },
    /// This host takes over.
    TakesOver {
        /// In this term.
        term: Term,
    },
    /// This host goes on without a backup.
    GoesAlone {
        /// In this term.
        term: Term,
    },
    /// A backup follows from this exit on.
    Protected {
        /// The exit.
        at: Ordinal,
    },
    /// The other host is active now.
    Follows {
        /// In this term.
        term: Term,
    },
    /// A row of the decision table was applied.
    Decided {
        /// The row.
        row: &'static Row,
        /// What led to it.
        detail: String,
    },
    /// A proof of a common witness has failed, or succeeded again. When it fails, the pair does not
    /// begin, or a backup that follows does not claim.
    Witness {
        /// The last proof succeeded.
        is_common: bool,
        /// Where this host's is.
        ours: Place,
        /// Where the other host's is.
        theirs: Place,
    },
    /// The session is over.
    Over {
        /// Why.
        reason: StopReason,
    },
}
