//! Log records: what happened to the guest, and at which exit.
//!
//! Why: a recording is complete when it holds every nondeterministic input together with the exit
//! ordinal it was applied at; everything else the guest and the devices compute again.
//! Invariants: the numbers in the enums here are part of the log format (docs/log-format.md). A
//! number is never given a second meaning; zero is never given one at all, so that a zeroed page
//! of a torn file decodes as nothing.

use core::fmt;
use std::borrow::Cow;

use ftvmm_devices::{DiskOutcome, Input};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use xxhash_rust::xxh3::xxh3_64;

pub use crate::bounded::COUNTER_MAX;
use crate::check::Check;
use crate::disk::DiskAnswer;
use crate::slice::Slice;

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize,
        )]
        pub struct $name(pub u64);

        impl $name {
            /// The counter with a number that comes from outside; `None` for one above
            /// [`COUNTER_MAX`].
            #[must_use]
            pub fn from_outside(number: u64) -> Option<Self> {
                (number <= COUNTER_MAX).then_some(Self(number))
            }

            /// The one after this.
            ///
            /// # Panics
            /// At the end of the 64-bit range, which no run reaches: see [`COUNTER_MAX`].
            #[must_use]
            pub fn next(self) -> Self {
                assert!(self.0 < u64::MAX, "counter is exhausted");
                Self(self.0 + 1)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let number = u64::deserialize(deserializer)?;
                Self::from_outside(number).ok_or_else(|| D::Error::custom("no counter is so high"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// Number of a synchronous exit of the guest (decision 0001). The first exit is 1; 0 is
    /// power-on, before the first instruction.
    Ordinal
}

impl Ordinal {
    /// The exit before this one, which a guest that stands at this one has left. Nothing is before
    /// power-on.
    #[must_use]
    pub fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

counter! {
    /// Number of a frame the guest transmitted. The first is 1; 0 stands for "none yet".
    OutputOrdinal
}
counter! {
    /// Number of a period in which at most one host may be active. The first is 1.
    Term
}

/// One line of the log: `event` happened while the guest was stopped at exit `at`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The exit at which the guest was stopped.
    pub at: Ordinal,
    /// What happened there.
    pub event: Event,
}

impl Record {
    /// The record as a host gets it that has the data on its own disk.
    #[must_use]
    pub fn without_disk_data(&self) -> Cow<'_, Self> {
        match &self.event {
            Event::Input(Input::DiskDone { id, outcome }) => {
                let event = Event::DiskAnswer(DiskAnswer::of(*id, outcome));
                Cow::Owned(Self { at: self.at, event })
            }
            _ => Cow::Borrowed(self),
        }
    }
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A nondeterministic input was given to the devices.
    Input(Input),
    /// A request to the disk ended; who reads this has the data on a disk of its own.
    DiskAnswer(DiskAnswer),
    /// A check: the recorder's state, which the replayer compares.
    Check(Box<Check>),
    /// The guest was stopped where no exit was; this is its state there, or a part of it.
    Slice(Slice),
    /// A snapshot was taken here: after the records before this one, before the ones after it. The
    /// guest does not notice.
    Snapshot(SnapshotMark),
    /// The guest ended. Nothing follows.
    End(End),
}

/// Which snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMark {
    /// Where the file was to be written, a moment later. A hint: exit and digest decide.
    pub path: String,
    /// Digest of memory in it.
    pub memory_digest: u64,
}

/// How the guest ended and what it left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Digest of all there is to compare at the end: registers, all memory, device state, and the
    /// two below.
    pub state_digest: [u8; 32],
    /// Running digest of the exit stream up to here, as in [`Check::chain`].
    pub chain: u64,
    /// Running digest of everything the guest sent: frames, console, requests to the disk.
    pub outputs: u64,
    /// Why it ended.
    pub reason: EndReason,
}

/// Why the guest ended. The number is the one in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EndReason {
    /// The guest asked for power-off.
    PowerOff = 1,
    /// The guest asked for a reset.
    Reset = 2,
    /// The processor shut down (triple fault).
    Shutdown = 3,
    /// The host ended the recording: a limit or the operator.
    HostRequest = 4,
    /// The guest's kernel panicked.
    Panic = 5,
}

impl End {
    /// What is not the same here as in the end that was `recorded`, in words.
    #[must_use]
    pub fn difference(&self, recorded: &Self) -> Option<String> {
        if self.reason != recorded.reason {
            return Some(format!("the end is {}, recorded is {}", self.reason, recorded.reason));
        }
        for (what, own, theirs) in [
            ("exits since the last check", self.chain, recorded.chain),
            ("what the guest sent", self.outputs, recorded.outputs),
        ] {
            if own != theirs {
                return Some(format!("{what} has digest {own:016x}, recorded is {theirs:016x}"));
            }
        }
        let [own, theirs] = [&self.state_digest, &recorded.state_digest].map(|digest| Hex(digest));
        (self != recorded).then(|| format!("the state has digest {own}, recorded is {theirs}"))
    }
}

impl EndReason {
    /// Every reason, for the decoder and for the tests.
    pub const ALL: [Self; 5] =
        [Self::PowerOff, Self::Reset, Self::Shutdown, Self::HostRequest, Self::Panic];

    /// The reason with this number in the log.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == number)
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::Shutdown => "shutdown",
            Self::HostRequest => "host-request",
            Self::Panic => "panic",
        })
    }
}

/// One line per record, as `ftvmm log dump` prints it and incident reports quote it. Payloads are
/// given by length and xxh3-64, except console bytes, which are short and tell most when read.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.at)?;
        match &self.event {
            Event::Input(Input::Time { now_ns }) => {
                write!(f, "time {}.{:09} s", now_ns / 1_000_000_000, now_ns % 1_000_000_000)
            }
            Event::Input(Input::NetRx { frame }) => {
                write!(f, "net-rx {} bytes xxh3 {:016x}", frame.len(), xxh3_64(frame))
            }
            Event::Input(Input::ConsoleRx { bytes }) => {
                write!(f, "console-rx \"{}\"", bytes.escape_ascii())
            }
            // Never the bytes: a reader of the dump must not learn the guest's keys.
            Event::Input(Input::Entropy { bytes }) => {
                write!(f, "entropy {} bytes xxh3 {:016x}", bytes.len(), xxh3_64(bytes))
            }
            Event::Input(Input::DiskDone { id, outcome: DiskOutcome::Done { data } }) => {
                write!(f, "disk-done {id} {} bytes xxh3 {:016x}", data.len(), xxh3_64(data))
            }
            Event::Input(Input::DiskDone { id, outcome: DiskOutcome::Failed }) => {
                write!(f, "disk-done {id} failed")
            }
            Event::Input(Input::PowerButton) => f.write_str("power-button"),
            Event::Input(Input::Nmi) => f.write_str("nmi"),
            Event::Input(Input::ConsoleBreak) => f.write_str("console-break"),
            Event::Input(Input::NetAnnounce) => f.write_str("net-announce"),
            // The guest's random numbers depend on the identifier, so it is as secret as they are.
            Event::Input(Input::NewIdentity { generation_id, unix_s }) => {
                write!(f, "new-identity xxh3 {:016x} unix {unix_s} s", xxh3_64(generation_id))
            }
            Event::DiskAnswer(DiskAnswer { id, data_xxh3: Some(data_xxh3) }) => {
                write!(f, "disk-answer {id} xxh3 {data_xxh3:016x}")
            }
            Event::DiskAnswer(DiskAnswer { id, data_xxh3: None }) => {
                write!(f, "disk-answer {id} failed")
            }
            Event::Check(check) => check.fmt(f),
            Event::Slice(Slice { pages, cpu }) => {
                let last = if cpu.is_some() { ", complete" } else { "" };
                write!(f, "slice {} bytes of pages{last}", pages.len())
            }
            Event::Snapshot(SnapshotMark { path, memory_digest }) => {
                write!(f, "snapshot {path:?} memory {memory_digest:016x}")
            }
            Event::End(End { state_digest, chain, outputs, reason }) => {
                let state = Hex(state_digest);
                write!(f, "end {reason} state {state} exits {chain:016x} outputs {outputs:016x}")
            }
        }
    }
}

/// Bytes printed as lower-case hexadecimal.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_record_prints_on_one_line() {
        let done = |outcome| Event::Input(Input::DiskDone { id: 3, outcome });
        let cases = [
            (Event::Input(Input::Time { now_ns: 1_000_000_042 }), "7 time 1.000000042 s"),
            (
                Event::Input(Input::NetRx { frame: vec![0; 60] }),
                "7 net-rx 60 bytes xxh3 543396b68d640202",
            ),
            (
                Event::Input(Input::ConsoleRx { bytes: b"ls\r\n".to_vec() }),
                "7 console-rx \"ls\\r\\n\"",
            ),
            (
                Event::Input(Input::Entropy { bytes: vec![0; 60] }),
                "7 entropy 60 bytes xxh3 543396b68d640202",
            ),
            (
                done(DiskOutcome::Done { data: vec![0; 60] }),
                "7 disk-done 3 60 bytes xxh3 543396b68d640202",
            ),
            (done(DiskOutcome::Failed), "7 disk-done 3 failed"),
            (Event::Input(Input::PowerButton), "7 power-button"),
            (Event::Input(Input::Nmi), "7 nmi"),
            (Event::Input(Input::ConsoleBreak), "7 console-break"),
            (Event::Input(Input::NetAnnounce), "7 net-announce"),
            (
                Event::Input(Input::NewIdentity { generation_id: [7; 16], unix_s: 1_700_000_000 }),
                "7 new-identity xxh3 fe8a7fec7d80ca73 unix 1700000000 s",
            ),
            (
                Event::DiskAnswer(DiskAnswer { id: 3, data_xxh3: Some(0xabc) }),
                "7 disk-answer 3 xxh3 0000000000000abc",
            ),
            (Event::DiskAnswer(DiskAnswer { id: 3, data_xxh3: None }), "7 disk-answer 3 failed"),
            (
                Event::Check(Box::new(Check { chain: 0xabc, ..Check::default() })),
                "7 check 0000000000000abc cpu 0000000000000000 rip 0x0",
            ),
            (
                Event::Slice(Slice { pages: vec![0; 9], cpu: Some(vec![]) }),
                "7 slice 9 bytes of pages, complete",
            ),
            (
                Event::Snapshot(SnapshotMark { path: "/s\n".into(), memory_digest: 0x1a }),
                "7 snapshot \"/s\\n\" memory 000000000000001a",
            ),
        ];
        for (event, expected) in cases {
            let line = Record { at: Ordinal(7), event }.to_string();
            assert_eq!(line, expected);
        }
        let reason = EndReason::PowerOff;
        let end = End { state_digest: [0xee; 32], chain: 0xabc, outputs: 0xdef, reason };
        let line = Record { at: Ordinal(9), event: Event::End(end) }.to_string();
        let rest = "exits 0000000000000abc outputs 0000000000000def";
        assert_eq!(line, format!("9 end power-off state {} {rest}", "ee".repeat(32)));
    }

    #[test]
    fn every_part_of_an_end_that_differs_is_named() {
        let reason = EndReason::PowerOff;
        let end = End { state_digest: [1; 32], chain: 2, outputs: 3, reason };
        assert_eq!(end.difference(&end), None);
        for (other, wanted) in [
            (End { reason: EndReason::Reset, ..end }, "the end is reset, recorded is power-off"),
            (End { chain: 9, ..end }, "exits since the last check"),
            (End { outputs: 9, ..end }, "what the guest sent has digest 0000000000000009"),
            (End { state_digest: [9; 32], ..end }, "the state has digest 0909"),
        ] {
            let difference = other.difference(&end).unwrap();
            assert!(difference.contains(wanted), "{difference}");
        }
    }

    #[test]
    fn a_number_that_no_counter_reaches_is_refused_from_outside() {
        fn refused<T: Serialize + serde::de::DeserializeOwned>(made: fn(u64) -> T) {
            let decoded =
                |number| crate::encoding::decode::<T>(&crate::encoding::encode(&made(number)));
            assert!(decoded(COUNTER_MAX).is_ok());
            for number in [COUNTER_MAX + 1, u64::MAX - 1, u64::MAX] {
                assert!(decoded(number).is_err(), "{number}");
            }
        }
        refused(Ordinal);
        refused(OutputOrdinal);
        refused(Term);
        let three = [COUNTER_MAX; 3].into_iter().try_fold(0, u64::checked_add);
        assert!(three.is_some(), "the sum of any three is a number");
    }

    #[test]
    fn end_reasons_have_these_numbers_and_zero_has_none() {
        let numbers: Vec<u8> = EndReason::ALL.iter().map(|reason| *reason as u8).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5]);
        assert_eq!(EndReason::from_number(0), None);
        assert_eq!(EndReason::from_number(6), None);
    }
}
