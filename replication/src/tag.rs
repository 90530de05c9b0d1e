//! What kind of record a group's record is.

/// The tag in the low four bits of a record's first byte. Part of the log format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Tag {
    /// varint: nanoseconds since the previous time record of the group (since power-on, if none).
    TimeNs = 1,
    /// The same in whole microseconds; the encoder's choice whenever it is exact.
    TimeUs = 2,
    /// varint length, bytes.
    NetRx = 3,
    /// varint length, bytes.
    ConsoleRx = 4,
    /// Reason byte, 32 bytes of state digest, eight of the exits, eight of the outputs.
    End = 6,
    /// varint length, bytes.
    Entropy = 7,
    /// varint length, a [`crate::Check`] encoded with postcard.
    Check = 8,
    /// varint length, a [`crate::Slice`] encoded with postcard.
    Slice = 9,
    /// varint request number; varint length, the data read.
    DiskDone = 10,
    /// varint request number; eight bytes, xxh3-64 of the data read.
    DiskAnswer = 11,
    /// varint request number.
    DiskFailed = 12,
    /// The same, in a log without the disk's data.
    DiskFailedAnswer = 13,
    /// varint length, a [`crate::SnapshotMark`] encoded with postcard.
    Snapshot = 14,
    /// The next byte is a [`Kind`]; what follows depends on it. The last tag there is:
    /// whatever comes to the format is a kind.
    Extended = 15,
}

/// The byte after [`Tag::Extended`]. Part of the log format; zero is none, and
/// 255 is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Nothing.
    PowerButton = 1,
    /// Nothing.
    Nmi = 2,
    /// Nothing.
    ConsoleBreak = 3,
    /// Nothing.
    NetAnnounce = 4,
    /// 16 bytes of generation identifier; varint: Unix time in seconds.
    NewIdentity = 5,
}

impl Kind {
    /// Given to no kind, so that there is a way on should the others run out.
    #[cfg(test)]
    pub(crate) const KEPT: u8 = 255;
    pub(crate) const ALL: [Self; 5] =
        [Self::PowerButton, Self::Nmi, Self::ConsoleBreak, Self::NetAnnounce, Self::NewIdentity];

    /// The kind with this number in the log.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

impl Tag {
    pub(crate) const ALL: [Self; 14] = {
        use Tag::*;
        [
            TimeNs,
            TimeUs,
            NetRx,
            ConsoleRx,
            End,
            Entropy,
            Check,
            Slice,
            DiskDone,
            DiskAnswer,
            DiskFailed,
            DiskFailedAnswer,
            Snapshot,
            Extended,
        ]
    };
    /// Numbers that had a meaning once. They are given no other, and decode as an error for ever.
    #[cfg(test)]
    pub(crate) const RETIRED: [u8; 1] = [5];
}
