//! What a disk is to be marked as, and when its label says so.
//!
//! A mark comes from a thread that may not wait. The disk's worker writes it, before the next
//! request it carries out, or at once when there is none. While a whole state is written over the
//! disk the label says so, and the mark waits until the state is whole.

use std::sync::atomic::{AtomicBool, Ordering};

use ftvmm_replication::{DiskMark, DiskState};

use super::{Disk, DiskError, LabelFile};
use crate::sync::{Mutex, lock};

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Marks {
    /// Taken before `wanted`, and held while the file is written.
    label: Mutex<Option<LabelFile>>,
    wanted: Mutex<Wanted>,
    /// The worker is to look at the mark.
    due: AtomicBool,
}

#[derive(Debug, Default)]
struct Wanted {
    /// `None` before the first.
    mark: Option<DiskMark>,
    /// A whole state is being written over the disk.
    copying: bool,
}

impl Marks {
    pub fn is_due(&self) -> bool {
        self.due.load(Ordering::Acquire)
    }

    /// Writes what is due. A label that cannot be written says less than is true, never more: the
    /// disk is refused at the next start, and the guest goes on.
    pub fn catch_up(&self) {
        if self.due.swap(false, Ordering::AcqRel)
            && let Err(error) = self.change(|_| ())
        {
            tracing::warn!(%error, "the disk will be refused at the next start");
        }
    }

    fn change(&self, change: impl FnOnce(&mut Wanted)) -> Result<(), DiskError> {
        let mut label = lock(&self.label);
        let mark = {
            let mut wanted = lock(&self.wanted);
            change(&mut wanted);
            match wanted.copying {
                true => {
                    let mark = wanted.mark.unwrap_or_default();
                    Some(DiskMark { state: DiskState::Incomplete, ..mark })
                }
                false => wanted.mark,
            }
        };
        match (label.as_mut(), mark) {
            (Some(label), Some(mark)) => label.write(mark),
            _ => Ok(()),
        }
    }
}

impl Disk {
    /// Marks the disk, before the next request is carried out. Does not wait.
    pub fn mark(&self, mark: DiskMark) {
        // Under the worker's lock, so that it does not fall asleep in between.
        let state = lock(&self.state);
        lock(&self.marks.wanted).mark = Some(mark);
        self.marks.due.store(true, Ordering::Release);
        drop(state);
        self.submitted.notify_one();
    }

    /// From now on `label` says what the disk is.
    ///
    /// # Errors
    /// When what the disk was marked as before cannot be written.
    pub fn keep_label(&self, label: LabelFile) -> Result<(), DiskError> {
        *lock(&self.marks.label) = Some(label);
        self.marks.change(|_| ())
    }

    /// Marks the disk now.
    ///
    /// # Errors
    /// When the label cannot be written.
    pub fn mark_now(&self, mark: DiskMark) -> Result<(), DiskError> {
        self.marks.change(|wanted| wanted.mark = Some(mark))
    }

    /// The guest has ended and makes no more requests: those it made are carried out and synced,
    /// and the disk is marked. What fails is said; the disk is then what it was during the run.
    pub fn close(&self, mark: DiskMark) {
        drop(self.drain());
        if let Err(error) = self.sync() {
            return tracing::warn!(%error, "the disk cannot be synced at the end");
        }
        if let Err(error) = self.mark_now(mark) {
            tracing::warn!(%error, "the end of the guest is not noted");
        }
    }

    /// A whole state is about to be written over the disk. Returns when its label says so.
    ///
    /// # Errors
    /// When the label cannot be written. The disk must not be written then.
    pub fn begin_copy(&self) -> Result<(), DiskError> {
        self.marks.change(|wanted| wanted.copying = true)
    }

    /// The state is whole, and synced: the disk is what it was last marked as.
    ///
    /// # Errors
    /// When the label cannot be written. The disk counts as incomplete then.
    pub fn end_copy(&self) -> Result<(), DiskError> {
        self.marks.change(|wanted| wanted.copying = false)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ftvmm_devices::{DiskOp, DiskRequest};
    use ftvmm_replication::Term;

    use super::super::{CompletionPolicy, DiskFile};
    use super::*;

    fn mark(state: DiskState, term: u64) -> DiskMark {
        DiskMark { state, term: Term(term) }
    }

    fn labelled(folder: &std::path::Path) -> Arc<Disk> {
        let image = folder.join("d");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let (label, _) = LabelFile::open(&image, None, None).unwrap();
        let file = DiskFile::open(&image).unwrap();
        let disk = Disk::start(file, CompletionPolicy::Immediate).unwrap();
        disk.keep_label(label).unwrap();
        disk
    }

    fn noted(folder: &std::path::Path) -> Option<DiskMark> {
        LabelFile::open(&folder.join("d"), None, None).unwrap().1.map(|label| label.mark)
    }

    #[test]
    fn a_mark_is_noted_before_the_next_request_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let disk = labelled(folder.path());
        let place = folder.path().to_owned();
        let (sender, noted_at) = std::sync::mpsc::channel();
        disk.on_completion(move |_| sender.send(noted(&place)).unwrap());
        for term in 1..20 {
            disk.mark(mark(DiskState::Active, term));
            disk.submit(DiskRequest { id: term, op: DiskOp::Flush });
            assert_eq!(noted_at.recv().unwrap(), Some(mark(DiskState::Active, term)));
        }
    }

    #[test]
    fn a_disk_is_incomplete_from_the_first_block_to_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let disk = labelled(folder.path());
        disk.mark_now(mark(DiskState::Active, 2)).unwrap();
        assert_eq!(noted(folder.path()), Some(mark(DiskState::Active, 2)));
        disk.begin_copy().unwrap();
        assert_eq!(noted(folder.path()), Some(mark(DiskState::Incomplete, 2)));
        disk.mark_now(mark(DiskState::Following, 3)).unwrap();
        assert_eq!(noted(folder.path()), Some(mark(DiskState::Incomplete, 3)));
        disk.end_copy().unwrap();
        assert_eq!(noted(folder.path()), Some(mark(DiskState::Following, 3)));
    }

    #[test]
    fn a_label_that_comes_late_says_what_the_disk_was_marked_as_and_nothing_before() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("d");
        std::fs::File::create(&image).unwrap().set_len(512).unwrap();
        let label = || LabelFile::open(&image, None, None).unwrap().0;
        let disk = Disk::start(DiskFile::open(&image).unwrap(), CompletionPolicy::Gated).unwrap();
        disk.keep_label(label()).unwrap();
        assert_eq!(noted(folder.path()), None);
        disk.mark_now(mark(DiskState::Following, 5)).unwrap();
        std::fs::remove_file(folder.path().join("d.ftvmm")).unwrap();
        disk.keep_label(label()).unwrap();
        assert_eq!(noted(folder.path()), Some(mark(DiskState::Following, 5)));
    }

    #[test]
    fn without_a_label_nothing_is_noted_and_a_copy_without_one_that_can_be_written_is_not_begun() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("d");
        std::fs::File::create(&image).unwrap().set_len(512).unwrap();
        let file = DiskFile::open(&image).unwrap();
        let disk = Disk::start(file, CompletionPolicy::Immediate).unwrap();
        disk.begin_copy().unwrap();
        assert!(!folder.path().join("d.ftvmm").exists());
        drop(disk);
        let nowhere = folder.path().join("none");
        std::fs::create_dir(&nowhere).unwrap();
        let (label, _) = LabelFile::open(&image, Some(&nowhere.join("label")), None).unwrap();
        std::fs::remove_dir(&nowhere).unwrap();
        let marks = Marks { label: Mutex::new(Some(label)), ..Marks::default() };
        marks.change(|wanted| wanted.copying = true).unwrap_err();
    }
}
