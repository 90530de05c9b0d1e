//! The guest's disk requests and their completions: the two types between the virtio-blk device and
//! the host.
//!
//! The device copies what is to be written out of the guest's memory when it is notified, and puts
//! what was read into it when the answer is applied. In between the host may take as long as it
//! likes.

use serde::{Deserialize, Serialize};

/// Unit of disk addresses, whatever the disk's block size (virtio 1.2 §5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// A request of the guest for the host to carry out. Requests are carried out in the order of their
/// numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRequest {
    /// Its number; the first request since power-on is 1.
    pub id: u64,
    /// What to do. All sectors are on the disk.
    pub op: DiskOp,
}

/// What to do with a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskOp {
    /// Read from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// A multiple of [`SECTOR_BYTES`].
        length_bytes: u32,
    },
    /// Write from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// A multiple of [`SECTOR_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Make everything that was written before survive a loss of power.
    Flush,
    /// Fill with zeroes: a discard too, so that two hosts' disks stay equal.
    Zero {
        /// The sectors, in order.
        ranges: Vec<ZeroRange>,
    },
}

/// Sectors to be filled with zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZeroRange {
    /// First sector.
    pub sector: u64,
    /// How many.
    pub sector_count: u32,
    /// The host may give their space to others.
    pub unmap: bool,
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskOutcome {
    /// It is done.
    Done {
        /// What was read; empty for other requests.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// The host's disk failed.
    Failed,
}

impl DiskOp {
    /// Its first sector, as far as it has one.
    pub fn sector(&self) -> Option<u64> {
        match self {
            DiskOp::Read { sector, .. } | DiskOp::Write { sector, .. } => Some(*sector),
            DiskOp::Flush => None,
            DiskOp::Zero { ranges } => ranges.first().map(|range| range.sector),
        }
    }
}

/// Without the data: it may be megabytes.
impl std::fmt::Debug for DiskOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DiskOutcome::Done { data } => write!(f, "Done {{ {} bytes }}", data.len()),
            DiskOutcome::Failed => f.write_str("Failed"),
        }
    }
}
