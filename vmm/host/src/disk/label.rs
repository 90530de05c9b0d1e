//! The label of a disk: a small file beside its image that says what the content is.
//!
//! It is replaced whole: written under another name, synced, renamed, and its folder synced, so
//! that a loss of power leaves the old one or the new one.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ftvmm_replication::disk_label::LABEL_BYTES_MAX;
use ftvmm_replication::witness::{GuestId, moment};
use ftvmm_replication::{DiskLabel, DiskMark};

use super::DiskError;
use crate::clock::host_unix_seconds;
use crate::user_file;

/// Behind the image's name.
const SUFFIX: &str = ".ftvmm";
/// Behind the label's, while it is written. The image's lock lets one process write it.
const UNFINISHED: &str = ".partial";

/// The label of a disk that this process uses.
#[derive(Debug)]
pub struct LabelFile {
    path: PathBuf,
    guest: Option<GuestId>,
    written: Option<DiskMark>,
}

impl LabelFile {
    /// The label of the image `disk`: the file `own`, or the one beside the image. Returns what it
    /// says, `None` for a disk that has none.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub fn open(
        disk: &Path,
        own: Option<&Path>,
        guest: Option<GuestId>,
    ) -> Result<(Self, Option<DiskLabel>), DiskError> {
        let path = own.map_or_else(|| label_beside(disk), Path::to_owned);
        let file = Self { path, guest, written: None };
        if fs::symlink_metadata(&file.path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return Ok((file, None));
        }
        let most_bytes = LABEL_BYTES_MAX as u64;
        let said = user_file::read("disk label", &file.path, most_bytes, "it is a few lines")
            .map_err(|cause| DiskError::Label { cause: Box::new(cause) })?;
        let label = std::str::from_utf8(&said).ok().and_then(DiskLabel::from_text);
        match label {
            Some(label) => Ok((file, Some(label))),
            None => Err(DiskError::LabelDamaged { path: disk.into(), label: file.path }),
        }
    }

    /// Notes what the disk is from now on. Returns when that survives a loss of power.
    ///
    /// # Errors
    /// What the host says. The label is the old one then.
    pub fn write(&mut self, mark: DiskMark) -> Result<(), DiskError> {
        if self.written == Some(mark) {
            return Ok(());
        }
        let label = DiskLabel { guest: self.guest, mark, since: moment(host_unix_seconds()) };
        self.replace(label.to_text().as_bytes()).map_err(|cause| DiskError::LabelUnwritable {
            label: self.path.clone(),
            state: mark.state,
            cause,
        })?;
        self.written = Some(mark);
        Ok(())
    }

    fn replace(&self, content: &[u8]) -> io::Result<()> {
        let unfinished = suffixed(&self.path, UNFINISHED);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(user_file::SECRET);
        let mut file =
            options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&unfinished)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&unfinished, &self.path)?;
        user_file::sync_folder_of(&self.path)
    }
}

/// Where the label of `disk` lies, through links, so that a disk has one whatever it is called.
pub fn label_beside(disk: &Path) -> PathBuf {
    suffixed(&fs::canonicalize(disk).unwrap_or_else(|_| disk.into()), SUFFIX)
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use ftvmm_replication::{DiskState, Term};

    use super::*;

    fn mark(state: DiskState) -> DiskMark {
        DiskMark { state, term: Term(3) }
    }

    #[test]
    fn a_disk_has_one_label_whatever_it_is_called() {
        let folder = tempfile::tempdir().unwrap();
        let [image, link] = ["d", "l"].map(|name| folder.path().join(name));
        fs::write(&image, "x").unwrap();
        std::os::unix::fs::symlink(&image, &link).unwrap();
        let guest = Some(GuestId::from_random([4; 16]));
        let (mut file, label) = LabelFile::open(&link, None, guest).unwrap();
        assert_eq!(label, None);
        file.write(mark(DiskState::Active)).unwrap();
        file.write(mark(DiskState::Incomplete)).unwrap();
        assert!(folder.path().join("d.ftvmm").is_file());
        let found = LabelFile::open(&image, None, None).unwrap().1.unwrap();
        assert_eq!((found.guest, found.mark), (guest, mark(DiskState::Incomplete)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "nothing is left behind");
    }

    #[test]
    fn a_damaged_label_and_one_that_cannot_be_written_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("d");
        fs::write(&image, "x").unwrap();
        let own = folder.path().join("own");
        for damaged in [&b""[..], b"ftvmm-disk 1\n", b"\xff\xfe", &[b'x'; 5000]] {
            fs::write(&own, damaged).unwrap();
            let error = LabelFile::open(&image, Some(&own), None).unwrap_err().to_string();
            assert!(error.contains("own"), "{error}");
        }
        let nowhere = folder.path().join("none/label");
        let (mut file, label) = LabelFile::open(&image, Some(&nowhere), None).unwrap();
        assert_eq!(label, None);
        let error = file.write(mark(DiskState::Active)).unwrap_err().to_string();
        assert!(error.contains("none/label") && error.contains("active"), "{error}");
        assert!(error.contains("label=FILE"), "{error}");
    }
}
