//! The label of a disk: a small file beside its image that says what the content is.
//!
//! It is replaced whole: written under another name, synced, renamed, and its folder synced, so
//! that a loss of power leaves the old one or the new one. The folder is held open: a label stays
//! beside its image when a folder above them gets another name.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ftvmm_replication::disk_label::LABEL_BYTES_MAX;
use ftvmm_replication::witness::{GuestId, moment};
use ftvmm_replication::{DiskLabel, DiskMark};

use super::DiskError;
use crate::clock::host_unix_seconds;
use crate::folder::Place;
use crate::user_file;

/// Behind the image's name.
const SUFFIX: &str = ".ftvmm";

/// The label of a disk that this process uses.
#[derive(Debug)]
pub struct LabelFile {
    place: Place,
    guest: Option<GuestId>,
    written: Option<DiskMark>,
}

impl LabelFile {
    /// The label of the image `disk`: the file `own`, or the one beside the image. Returns what it
    /// says, `None` for a disk that has none.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or has no folder.
    pub fn open(
        disk: &Path,
        own: Option<&Path>,
        guest: Option<GuestId>,
    ) -> Result<(Self, Option<DiskLabel>), DiskError> {
        let path = own.map_or_else(|| label_beside(disk), Path::to_owned);
        let place = Place::of(&path).map_err(|cause| DiskError::LabelUnwritable {
            label: path,
            state: DiskMark::default().state,
            cause,
        })?;
        let file = Self { place, guest, written: None };
        let place = &file.place;
        if place.facts().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return Ok((file, None));
        }
        let most_bytes = LABEL_BYTES_MAX as u64;
        let (folder, name) = (place.folder(), place.name());
        let said = user_file::read_in("disk label", folder, name, most_bytes, "it is a few lines")
            .map_err(|cause| DiskError::Label { cause: Box::new(cause) })?;
        let label = std::str::from_utf8(&said).ok().and_then(DiskLabel::from_text);
        match label {
            Some(label) => Ok((file, Some(label))),
            None => Err(DiskError::LabelDamaged { path: disk.into(), label: place.path() }),
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
        let content = label.to_text();
        let written = self.place.replace(content.as_bytes());
        written.and_then(|()| self.place.folder().sync()).map_err(|cause| {
            DiskError::LabelUnwritable { label: self.place.path(), state: mark.state, cause }
        })?;
        self.written = Some(mark);
        Ok(())
    }
}

/// Where the label of `disk` lies, through links, so that a disk has one whatever it is called.
pub fn label_beside(disk: &Path) -> PathBuf {
    let mut label = OsString::from(fs::canonicalize(disk).unwrap_or_else(|_| disk.into()));
    label.push(SUFFIX);
    label.into()
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
        let open = || LabelFile::open(&image, Some(&nowhere), None);
        let error = open().unwrap_err().to_string();
        assert!(error.contains("none/label") && error.contains("label=FILE"), "{error}");
        fs::create_dir(folder.path().join("none")).unwrap();
        let (mut file, label) = open().unwrap();
        assert_eq!(label, None);
        fs::remove_dir(folder.path().join("none")).unwrap();
        let error = file.write(mark(DiskState::Active)).unwrap_err().to_string();
        assert!(error.contains("none/label") && error.contains("active"), "{error}");
        assert!(error.contains("label=FILE"), "{error}");
    }

    #[test]
    fn a_label_stays_beside_its_image_when_their_folder_gets_another_name() {
        let around = tempfile::tempdir().unwrap();
        let [before, after] = ["before", "after"].map(|name| around.path().join(name));
        fs::create_dir(&before).unwrap();
        fs::write(before.join("d"), "x").unwrap();
        let (mut file, _) = LabelFile::open(&before.join("d"), None, None).unwrap();
        fs::rename(&before, &after).unwrap();
        file.write(mark(DiskState::Active)).unwrap();
        let found = LabelFile::open(&after.join("d"), None, None).unwrap().1.unwrap();
        assert_eq!(found.mark, mark(DiskState::Active));
    }
}
