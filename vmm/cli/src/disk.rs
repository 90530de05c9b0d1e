//! The file behind the guest's disk.

use std::sync::Arc;

use ftvmm_host::disk::{CompletionPolicy, Disk, DiskFile};
use ftvmm_replication::Fingerprint;
use ftvmm_runtime::snapshot::Snapshot;

use super::args::{DiskArg, RoleArg, RunArgs};
use super::{CommandError, host};
use crate::guest::DiskFacts;

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

#[cfg(test)]
mod tests {
    use ftvmm_replication::FileHeader;
    use ftvmm_runtime::testing::{header, snapshot_of};
    use sha2::{Digest, Sha256};

    use super::super::args::tests::run_args;
    use super::*;

    #[test]
    fn only_a_guest_with_a_log_has_its_disk_digested() {
        let facts = |more: &str| {
            let image = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(image.path(), [5; 1024]).unwrap();
            let line = format!("--kernel k --disk path={} {more}", image.path().display());
            open_disk(&run_args(&line), None, CompletionPolicy::Immediate).unwrap().unwrap().1
        };
        assert_eq!(facts(""), DiskFacts { size_bytes: 1024, sha256: None });
        let digest = Some(Sha256::digest([5; 1024]).into());
        assert_eq!(facts("--record r"), DiskFacts { size_bytes: 1024, sha256: digest });
        assert!(
            open_disk(&run_args("--kernel k"), None, CompletionPolicy::Immediate)
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_restored_disk_is_a_new_file_of_the_size_the_snapshot_says() {
        let folder = tempfile::tempdir().unwrap();
        let mut fingerprint = header().fingerprint;
        (fingerprint.disk_bytes, fingerprint.disk_sha256) = (Some(2048), Some([3; 32]));
        let path = snapshot_of(folder.path(), &FileHeader { fingerprint, ..header() });
        let snapshot = Snapshot::open(&path).unwrap();
        let open =
            |line: &str| open_disk(&run_args(line), Some(&snapshot), CompletionPolicy::Immediate);
        let error = open("--restore s").err().unwrap().to_string();
        assert!(error.contains("a disk of 2048 bytes; say into which new file"), "{error}");
        let disk = folder.path().join("disk");
        let line = format!("--restore s --disk path={}", disk.display());
        let facts = open(&line).unwrap().unwrap().1;
        assert_eq!(facts, DiskFacts { size_bytes: 2048, sha256: Some([3; 32]) });
        assert_eq!(std::fs::metadata(&disk).unwrap().len(), 2048);
        let error = open(&line).err().unwrap().to_string();
        assert!(error.contains("is there already"), "{error}");
    }
}
