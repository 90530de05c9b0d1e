//! The messages between primary and backup.
//!
//! Why the tag numbers are written out: they are the wire format (docs/protocol.md). A number is
//! never given a second meaning and zero is never given one. Fields are encoded with postcard in
//! the order in which they stand here; bytes by `serde_bytes`, which writes what a list of numbers
//! would be, in one go.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::bounded;
use crate::build_id::BuildId;
use crate::digest::OutputDigest;
use crate::encoding;
use crate::fingerprint::Fingerprint;
use crate::incident::{DivergenceCause, Evidence};
use crate::policy::{DivergencePolicy, Refusal, ReleasePolicy, Role};
use crate::record::{Ordinal, OutputOrdinal, Term};
use crate::state::StatePart;
use crate::witness::{Nonce, Place};

/// Most frames in one [`Message::Strays`].
pub const STRAYS_MAX: usize = bounded::FRAMES_MAX;

/// Frames that one message carries: at most [`STRAYS_MAX`], none longer than a frame can be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frames(#[serde(deserialize_with = "bounded::frames")] pub Vec<Vec<u8>>);

/// Why a side says goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ByeReason {
    /// The guest ended, on both sides alike.
    Ended,
    /// The host was asked to stop.
    HostRequest,
}

macro_rules! messages {
    ($($(#[$doc:meta])* $tag:literal $name:ident {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    })*) => {
        /// A message between primary and backup.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Message {
            $($(#[$doc])* $name { $($(#[$field_doc])* $field: $type,)* },)*
        }

        impl Message {
            /// Tag and name of every message.
            pub const TAGS: &'static [(u8, &'static str)] = &[$(($tag, stringify!($name)),)*];

            /// The number that stands for this message on the wire.
            #[must_use]
            pub fn tag(&self) -> u8 {
                match self {
                    $(Self::$name { .. } => $tag,)*
                }
            }

            /// Its name in docs/protocol.md and in logs.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name { .. } => stringify!($name),)*
                }
            }

            /// Appends the encoded fields.
            pub(crate) fn encode_body(&self, out: Vec<u8>) -> Vec<u8> {
                match self {
                    $(Self::$name { $($field,)* } => {
                        encoding::encode_behind(&($($field,)*), out)
                    })*
                }
            }

            /// Decodes the fields of the message with this tag; `None` for an unknown tag, or bytes
            /// that [`Self::encode_body`] does not make.
            pub(crate) fn decode_body(tag: u8, body: &[u8]) -> Option<Self> {
                match tag {
                    $($tag => {
                        let ($($field,)*): ($($type,)*) = encoding::decode(body).ok()?;
                        Some(Self::$name { $($field,)* })
                    })*
                    _ => None,
                }
            }
        }
    };
}

messages! {
    /// Who I am and what I run. The first message of both sides.
    1 Hello {
        /// The sender's role.
        role: Role,
        /// The sender's program.
        build: BuildId,
        /// What the sender's machine depends on.
        fingerprint: Fingerprint,
        /// Highest term the sender's witness knew when the sender started.
        highest_term: Term,
        /// The sender's guest runs: a backup is given its state, disk included.
        runs: bool,
    }
    /// The backup may follow in this term.
    2 Welcome {
        /// The primary's term.
        term: Term,
        /// What the guest's RTC says at power-on, in seconds since 1970-01-01 00:00 UTC.
        rtc_epoch_s: u64,
        /// When outputs are released.
        release: ReleasePolicy,
        /// What a divergence leads to.
        on_divergence: DivergencePolicy,
    }
    /// We cannot run together. Both sides stop.
    3 Refuse {
        /// Why, from the sender's point of view.
        refusal: Refusal,
    }
    /// The backup follows; the guest may start.
    4 Ready {
        /// The term of the welcome.
        term: Term,
    }
    /// The next group of the log.
    5 Log {
        /// The primary's term.
        term: Term,
        /// Outputs up to this one have left the primary.
        released_through: OutputOrdinal,
        /// The group as [`crate::GroupEncoder::finish`] made it.
        group: ByteBuf,
    }
    /// The primary is alive.
    6 Heartbeat {
        /// The primary's term.
        term: Term,
        /// Outputs up to this one have left the primary.
        released_through: OutputOrdinal,
    }
    /// The backup is alive and this far.
    7 Ack {
        /// The primary's term.
        term: Term,
        /// Horizon of the last group received.
        received_through: Ordinal,
        /// Last exit the backup has left.
        executed_through: Ordinal,
    }
    /// The backup produced an output.
    8 Digest {
        /// The primary's term.
        term: Term,
        /// The output. Sent for every one, in order.
        output: OutputOrdinal,
        /// Exit at which it was produced.
        at: Ordinal,
        /// Its digest.
        digest: OutputDigest,
    }
    /// The backup cannot follow the log.
    9 Fault {
        /// The primary's term.
        term: Term,
        /// What the backup saw; [`Evidence::fault`] says what went wrong.
        evidence: Evidence,
    }
    /// The two differ: here is what I saw, now tell me what you saw.
    10 Challenge {
        /// The primary's term.
        term: Term,
        /// In what they differ.
        cause: DivergenceCause,
        /// What the primary saw.
        evidence: Evidence,
    }
    /// Answer to [`Message::Challenge`].
    11 Evidence {
        /// The primary's term.
        term: Term,
        /// What the backup saw.
        evidence: Evidence,
    }
    /// The backup is not believed and must stop.
    12 StandDown {
        /// The term in which it followed.
        term: Term,
    }
    /// The backup's guest ended too, with this state.
    13 Finished {
        /// The primary's term.
        term: Term,
        /// Digest of registers, memory and device state.
        state_digest: [u8; 32],
    }
    /// The sender stops in good order.
    14 Bye {
        /// The primary's term.
        term: Term,
        /// Why.
        reason: ByeReason,
    }
    /// The backup may join a guest that runs: its state follows and replaces whatever the backup
    /// has.
    15 Attach {
        /// The primary's term.
        term: Term,
        /// When outputs are released.
        release: ReleasePolicy,
        /// What a divergence leads to.
        on_divergence: DivergencePolicy,
        /// Whom a resync believes.
        believe: Role,
    }
    /// A part of the state. Later parts overwrite earlier ones.
    16 State {
        /// The primary's term.
        term: Term,
        /// The part.
        part: StatePart,
    }
    /// The last part: the guest is at this exit. The log goes on from there.
    17 StateEnd {
        /// The primary's term.
        term: Term,
        /// Outputs up to this one are in the past of the state.
        outputs_through: OutputOrdinal,
        /// The exit at which the guest stands.
        at: Ordinal,
        /// The processor and the devices.
        machine: Vec<u8>,
    }
    /// The backup has restored so much of the state.
    18 StateRestored {
        /// The primary's term.
        term: Term,
        /// Bytes of parts, as [`StatePart::len_bytes`] counts them.
        restored_bytes: u64,
    }
    /// The primary's guest stands still and all its frames have left: the backup is to take over.
    19 Yield {
        /// The primary's term.
        term: Term,
        /// The last exit the primary has left.
        through: Ordinal,
        /// All its outputs, and they have left.
        released_through: OutputOrdinal,
        /// The primary's guest stands where the backup's will: it can follow without a state.
        follows: bool,
    }
    /// The backup has become active; the old primary is now its backup.
    20 Promoted {
        /// The new term.
        term: Term,
    }
    /// The backup's disk has everything up to this flush.
    21 DiskFlushed {
        /// The primary's term.
        term: Term,
        /// The guest's request to flush.
        id: u64,
    }
    /// Frames for the guest that reached the host that was active before.
    22 Strays {
        /// The primary's term.
        term: Term,
        /// The frames, in order.
        frames: Frames,
    }
    /// An output from before the end of the state that has not left yet: it will when the backup
    /// has the state, and the backup sends it should it take over. In order, right before
    /// [`Message::StateEnd`].
    23 Held {
        /// The primary's term.
        term: Term,
        /// Exit at which the frame was transmitted.
        at: Ordinal,
        /// Digest of the output.
        digest: OutputDigest,
        /// The frame.
        frame: Vec<u8>,
    }
    /// Whether the sender's way to the guest's clients is whole. Said when one follows the other,
    /// and whenever it changes.
    24 ClientLink {
        /// It is.
        up: bool,
    }
    /// This is in my witness: find it in yours. Nothing else counts before both have.
    25 Prove {
        /// The number.
        nonce: Nonce,
        /// The sender's witness, for messages.
        place: Place,
    }
    /// Answer to [`Message::Prove`].
    26 Proved {
        /// Its number.
        nonce: Nonce,
        /// It is in the sender's witness.
        found: bool,
    }
    /// The connection that broke is this one, and this is what came of it: send the rest.
    27 Resume {
        /// The sender's first number of it ([`Message::Prove`]).
        own: Nonce,
        /// The receiver's.
        theirs: Nonce,
        /// Messages that the sender has received.
        received: u64,
    }
    /// The sender has received so many messages of this connection, which need not be kept.
    28 Received {
        /// This message and [`Message::Resume`] do not count.
        messages: u64,
    }
    /// The primary wants a lease: it releases nothing without one.
    30 LeaseRequest {
        /// The primary's term.
        term: Term,
        /// The request; no two of a term have the same.
        number: u64,
    }
    /// Answer to [`Message::LeaseRequest`], of a backup that follows: it does not take over before
    /// the lease is over, unless the primary asks for it or has closed the connection.
    31 LeaseGrant {
        /// The primary's term.
        term: Term,
        /// The request.
        number: u64,
        /// From the moment at which the backup read the request, in nanoseconds.
        lease_ns: u64,
    }
}

impl Message {
    /// Numbers that had a meaning once. They are given no other, and decode as an error for ever.
    #[cfg(test)]
    pub(crate) const RETIRED_TAGS: [u8; 0] = [];

    /// The term the message belongs to; `None` for those of the handshake.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        match self {
            Self::Hello { .. }
            | Self::Welcome { .. }
            | Self::Refuse { .. }
            | Self::Attach { .. }
            | Self::ClientLink { .. }
            | Self::Prove { .. }
            | Self::Proved { .. }
            | Self::Resume { .. }
            | Self::Received { .. }
            | Self::Promoted { .. } => None,
            Self::Ready { term }
            | Self::Log { term, .. }
            | Self::Heartbeat { term, .. }
            | Self::Ack { term, .. }
            | Self::Digest { term, .. }
            | Self::Fault { term, .. }
            | Self::Challenge { term, .. }
            | Self::Evidence { term, .. }
            | Self::StandDown { term }
            | Self::Finished { term, .. }
            | Self::Bye { term, .. }
            | Self::State { term, .. }
            | Self::StateEnd { term, .. }
            | Self::StateRestored { term, .. }
            | Self::Yield { term, .. }
            | Self::DiskFlushed { term, .. }
            | Self::Strays { term, .. }
            | Self::Held { term, .. }
            | Self::LeaseRequest { term, .. }
            | Self::LeaseGrant { term, .. } => Some(*term),
        }
    }
}
