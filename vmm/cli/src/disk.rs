//! The file behind the guest's disk.

use std::sync::Arc;

use ftvmm_host::disk::{CompletionPolicy, Disk, DiskError, DiskFile, LabelFile};
use ftvmm_replication::witness::GuestId;
use ftvmm_replication::{DiskMark, DiskPurpose, Fingerprint, LastRun, may_use};
use ftvmm_runtime::snapshot::Snapshot;

use super::args::{RoleArg, RunArgs};
use super::disk_arg::DiskArg;
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
    let Some(DiskArg { path, .. }) = &args.disk else { return Ok(None) };
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

/// Refuses a disk that speaks against its use, and has its label kept from now on as that of
/// `guest`.
///
/// # Errors
/// What speaks against it, and when its label cannot be read or written.
pub fn admit(
    args: &RunArgs,
    disk: &Disk,
    purpose: DiskPurpose,
    known: LastRun,
    guest: Option<GuestId>,
) -> Result<(), CommandError> {
    let Some(arg) = &args.disk else { return Ok(()) };
    let Some(place) = arg.label_file() else {
        tracing::warn!(
            path = %arg.path.display(),
            "nothing notes whether this block device may be used; name a file for it with \
             --disk …,label=FILE"
        );
        return Ok(());
    };
    let (mut label, said) = LabelFile::open(&arg.path, Some(&place), guest)?;
    if args.restore.is_some() {
        // A new file, until the snapshot's last part is on it.
        disk.keep_label(label)?;
        return Ok(disk.begin_copy()?);
    }
    may_use(said.as_ref(), purpose, known, &arg.force)
        .map_err(|refusal| DiskError::Refused { path: arg.path.clone(), refusal })?;
    if may_use(said.as_ref(), purpose, known, &[]).is_err() {
        tracing::warn!(path = %arg.path.display(), "the disk is used because force= says so");
    }
    if said.is_none() {
        // Now, so that one that cannot be written is found before the guest runs.
        label.write(DiskMark::default())?;
    }
    Ok(disk.keep_label(label)?)
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
        (Some(size_bytes), Some(DiskArg { path, .. })) => {
            let file = DiskFile::create(path, size_bytes)?;
            let facts = DiskFacts { size_bytes, sha256: disk_sha256 };
            let disk = Disk::start(file, policy).map_err(host("thread for the disk"))?;
            Ok(Some((disk, facts)))
        }
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_replication::{DiskState, FileHeader, Term};
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
    fn a_disk_that_speaks_against_its_use_is_refused_by_name_and_overruled_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("d");
        std::fs::write(&image, [5; 1024]).unwrap();
        let noted = || LabelFile::open(&image, None, None).unwrap().1.unwrap();
        let file = DiskFile::open(&image).unwrap();
        let disk = Disk::start(file, CompletionPolicy::Immediate).unwrap();
        let guest = |number| Some(GuestId::from_random([number; 16]));
        let known = |term| LastRun { guest: guest(1), ran: Term(term), known: Term(term) };
        let admitted = |force: &str, purpose, known| {
            let line = format!("--kernel k --disk path={}{force}", image.display());
            admit(&run_args(&line), &disk, purpose, known, guest(1)).map_err(|error| {
                assert_eq!(error.status(), 2);
                error.to_string()
            })
        };
        let set = |of, state, term| {
            let (mut label, _) = LabelFile::open(&image, None, of).unwrap();
            label.write(DiskMark { state, term: Term(term) }).unwrap();
        };
        admitted("", DiskPurpose::Run, known(3)).unwrap();
        assert_eq!((noted().mark, noted().guest), (DiskMark::default(), guest(1)));

        set(guest(1), DiskState::Incomplete, 3);
        for purpose in [DiskPurpose::Solo, DiskPurpose::Run] {
            let error = admitted("", purpose, known(3)).unwrap_err();
            assert!(error.contains("is incomplete: since 20"), "{error}");
            assert!(error.contains(",force=incomplete"), "{error}");
            admitted(",force=outdated", purpose, known(3)).unwrap_err();
            admitted(",force=incomplete", purpose, known(3)).unwrap();
        }
        admitted("", DiskPurpose::Follow, known(3)).unwrap();
        assert_eq!(noted().mark.state, DiskState::Incomplete, "nothing was copied yet");

        set(guest(1), DiskState::Active, 3);
        admitted("", DiskPurpose::Run, known(3)).unwrap();
        let error = admitted("", DiskPurpose::Run, known(4)).unwrap_err();
        assert!(error.contains("outdated: it was active in term 3"), "{error}");
        assert!(error.contains("until term 4"), "{error}");
        admitted(",force=outdated", DiskPurpose::Run, known(4)).unwrap();
        let error = admitted("", DiskPurpose::Solo, LastRun::default()).unwrap_err();
        assert!(error.contains("may be outdated"), "{error}");

        set(guest(2), DiskState::Clean, 3);
        let error = admitted("", DiskPurpose::Follow, known(3)).unwrap_err();
        assert!(error.contains("another guest") && error.contains(",force=guest"), "{error}");

        let line = format!("--restore s --disk path={}", image.display());
        admit(&run_args(&line), &disk, DiskPurpose::Solo, LastRun::default(), None).unwrap();
        disk.mark_now(DiskMark { state: DiskState::Active, term: Term(0) }).unwrap();
        assert_eq!(noted().mark.state, DiskState::Incomplete, "the snapshot is not on it yet");
        disk.end_copy().unwrap();
        assert_eq!(noted().mark.state, DiskState::Active);
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
