//! What the log says of an answer of the guest's disk.
//!
//! A recording holds the data a read brought, so that a replay needs no disk. A backup has a disk
//! of its own with the same content and executes the same requests: the channel carries a digest of
//! the data, and the backup takes what its own disk says.

use ftvmm_devices::{DiskOutcome, Input};
use xxhash_rust::xxh3::xxh3_64;

/// How a request to the disk ended on the recorder, without the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskAnswer {
    /// The request.
    pub id: u64,
    /// xxh3-64 of what was read (of nothing, for other requests); `None` when the disk failed.
    pub data_xxh3: Option<u64>,
}

impl DiskAnswer {
    /// The digest of an answer.
    #[must_use]
    pub fn of(id: u64, outcome: &DiskOutcome) -> Self {
        let data_xxh3 = match outcome {
            DiskOutcome::Done { data } => Some(xxh3_64(data)),
            DiskOutcome::Failed => None,
        };
        Self { id, data_xxh3 }
    }
}

/// What a follower does about a request that ended in its log, when its own disk has answered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskComparison {
    /// Give this to the guest.
    Apply(Input),
    /// The own disk failed where the recorder's did not.
    OwnFailed,
    /// The two say different things: xxh3-64 of both.
    Differ {
        /// The own disk's.
        ours: u64,
        /// The recorder's.
        theirs: u64,
    },
}

impl DiskAnswer {
    /// Compares this host's completion with this one, the recorder's. When the recorder's disk
    /// failed, the guest sees the failure on both hosts.
    #[must_use]
    pub fn compare(self, own: DiskOutcome) -> DiskComparison {
        let id = self.id;
        match (Self::of(id, &own).data_xxh3, self.data_xxh3) {
            (_, None) => {
                let outcome = DiskOutcome::Failed;
                DiskComparison::Apply(Input::DiskDone { id, outcome })
            }
            (None, Some(_)) => DiskComparison::OwnFailed,
            (Some(ours), Some(theirs)) if ours == theirs => {
                DiskComparison::Apply(Input::DiskDone { id, outcome: own })
            }
            (Some(ours), Some(theirs)) => DiskComparison::Differ { ours, theirs },
        }
    }
}
