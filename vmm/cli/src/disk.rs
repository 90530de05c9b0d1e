//! The file behind the guest's disk.

use std::sync::Arc;

use ftvmm_replication::Fingerprint;

use super::args::{DiskArg, RoleArg, RunArgs};
use super::{CommandError, host};
use crate::guest::DiskFacts;
use ftvmm_host::disk::{CompletionPolicy, Disk, DiskFile};
use ftvmm_runtime::snapshot::Snapshot;

/// The guest's disk, and what its machine depends on of it. That of a guest that goes on from a
/// snapshot is new.
///
/// # Errors
/// When the file cannot be had, or is not what the snapshot needs.
pub fn open_disk(
    args: &RunArgs,
    snapshot: Option<&Snapshot>,
    policy: CompletionPolicy,
) -> Result<Option<(Arc<Disk>, DiskFacts)>, CommandError> {
    if let Some(snapshot) = snapshot {
        return restored_disk(args, snapshot, policy);
    }
    let Some(DiskArg(path)) = &args.disk else { return Ok(None) };
    let file = DiskFile::open(path)?;
    let is_compared = args.record.is_some() || args.role != RoleArg::Solo;
    let sha256 = match is_compared {
        true => {
            tracing::info!(path = %path.display(), "taking the digest of the disk");
            Some(file.sha256()?)
        }
        false => None,
    };
    let facts = DiskFacts { size_bytes: file.size_bytes(), sha256 };
    Ok(Some((Disk::start(file, policy).map_err(host("thread for the disk"))?, facts)))
}

/// A new disk for a guest that goes on from a snapshot, which has its content.
fn restored_disk(
    args: &RunArgs,
    snapshot: &Snapshot,
    policy: CompletionPolicy,
) -> Result<Option<(Arc<Disk>, DiskFacts)>, CommandError> {
    let Fingerprint { disk_bytes, disk_sha256, .. } = snapshot.header().fingerprint;
    match (disk_bytes, &args.disk) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(CommandError::Configuration(
            "the snapshot's guest has no disk; leave --disk out".into(),
        )),
        (Some(size_bytes), None) => Err(CommandError::Configuration(format!(
            "the snapshot's guest has a disk of {size_bytes} bytes; say into which new file with \
             --disk path=FILE"
        ))),
        (Some(size_bytes), Some(DiskArg(path))) => {
            let file = DiskFile::create(path, size_bytes)?;
            let facts = DiskFacts { size_bytes, sha256: disk_sha256 };
            let disk = Disk::start(file, policy).map_err(host("thread for the disk"))?;
            Ok(Some((disk, facts)))
        }
    }
}
