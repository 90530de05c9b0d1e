//! The two enums between the guest and the world.

use serde::{Deserialize, Serialize};

use crate::disk::{DiskOutcome, DiskRequest};

/// Everything nondeterministic that can reach the guest. A recording is a list of these, each with
/// the exit ordinal at which it was applied; a device changes only by guest accesses and by these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// Guest time advances to `now_ns` nanoseconds since power-on. Never smaller than the last one.
    Time {
        /// Nanoseconds since power-on.
        now_ns: u64,
    },
    /// A frame arrived for the guest's network card: the 12-byte `virtio_net_hdr_v1` (virtio 1.2
    /// §5.1.6) followed by the Ethernet frame.
    NetRx {
        /// Header and frame, in bytes.
        #[serde(with = "serde_bytes")]
        frame: Vec<u8>,
    },
    /// Bytes typed at the guest's serial console.
    ConsoleRx {
        /// The bytes in order.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Random bytes for the guest's entropy source, asked for by its driver
    /// ([`crate::Board::entropy_wanted_bytes`]).
    Entropy {
        /// The bytes in order.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// A request of the guest to its disk has ended. One it knows nothing of, because its driver
    /// reset the device, is dropped.
    DiskDone {
        /// The request.
        id: u64,
        /// How it ended.
        outcome: DiskOutcome,
    },
    /// The power button is pressed (ACPI specification 6.5, §4.8.3.1).
    PowerButton,
    /// A non-maskable interrupt reaches the processor. The devices take no part in it.
    Nmi,
    /// A break on the serial console's line.
    ConsoleBreak,
    /// The network card is to ask its driver to announce the guest (virtio 1.2 §5.1.6.4).
    NetAnnounce,
    /// This guest was copied: from here on it is another one, at another time of day.
    NewIdentity {
        /// A number no other copy has, for the guest's VM generation counter.
        generation_id: [u8; 16],
        /// What the clock shows now, in Unix seconds; the guest's own setting of it stays on top.
        unix_s: u64,
    },
}

/// What the guest sends into the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// A frame the guest transmitted: the 12-byte `virtio_net_hdr_v1` followed by the Ethernet
    /// frame.
    Frame(Vec<u8>),
    /// Bytes the guest printed on its serial console.
    Console(Vec<u8>),
    /// A request to the guest's disk, to be answered by an [`Input::DiskDone`] with its number.
    Disk(DiskRequest),
}
