//! A state transfer into a file: a snapshot of a running guest.
//!
//! It is written beside its name, synced and renamed, so that a file of that name is whole. All of
//! it happens in one folder, which is held open.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, TryLockError};

use ftvmm_host::folder::{Folder, parent};
use ftvmm_host::sync::{Mutex, MutexGuard, lock};
use ftvmm_host::user_file::{self, FileError, Written};
use ftvmm_replication::{Ordinal, SnapshotError, SnapshotMark, SnapshotWriter, StatePart};
use thiserror::Error;

use super::{Destination, FinalState, ProgressCell, Transfer, final_parts, send_state};

/// Why there is no snapshot. The guest is as before, and no file is left.
#[derive(Debug, Error)]
pub enum SaveError {
    /// There is such a file.
    #[error("'{path}' is there already; a snapshot goes into a new file", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It is to lie in another folder than the one that is held.
    #[error(
        "'{path}' is not in the folder for snapshots, '{folder}'; name a file there, or start \
         ftvmm with another --snapshot-dir",
        path = path.display(),
        folder = folder.display()
    )]
    Elsewhere {
        /// The file.
        path: PathBuf,
        /// Where it may be.
        folder: PathBuf,
    },
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] FileError),
    /// The file cannot be made.
    #[error("'{path}' cannot be written: {cause}", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// Another one is being written.
    #[error("another snapshot is being written")]
    Busy,
    /// The guest cannot be stopped: it has ended, or follows another host.
    #[error("the guest could not be stopped for its state")]
    NotStopped,
    /// The file cannot be written on.
    #[error("'{path}' cannot be written: {why}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What failed.
        why: String,
    },
}

/// A snapshot that is there.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// The exit the guest stood at.
    pub at: Ordinal,
    /// Length of the file.
    pub bytes: u64,
    /// How long the guest stood still, in nanoseconds.
    pub stopped_ns: u64,
}

/// Writes the guest's state to the new file `path`, which is in `folder`; the guest goes on. Blocks
/// until the file is complete.
///
/// # Errors
/// [`SaveError`]; the guest never notices.
pub fn save(
    transfer: &Arc<Transfer>,
    progress: &ProgressCell,
    folder: &Folder,
    path: &Path,
) -> Result<Saved, SaveError> {
    let _saving = match transfer.saving.try_lock() {
        Ok(saving) => saving,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return Err(SaveError::Busy),
    };
    if transfer.has_ended() {
        return Err(SaveError::NotStopped);
    }
    let name = new_name(folder, path)?;
    let mut partial = name.to_owned();
    partial.push(".partial");
    let partial = Partial { folder, name: partial };
    let file = user_file::create_in("snapshot", folder, &partial.name, true)?;
    let made = |cause| SaveError::Create { path: path.into(), cause };
    let whole = file.handle().map_err(made)?;
    let written = |error: SnapshotError| SaveError::Write {
        path: folder.join(&partial.name),
        why: why(&error),
    };
    let writer = SnapshotWriter::new(BufWriter::new(file), &transfer.header).map_err(&written)?;
    let destination = Arc::new(ToFile {
        transfer: Arc::clone(transfer),
        path: path.to_string_lossy().into_owned(),
        writing: Mutex::new(Writing { writer, failed: None, last: None }),
    });
    let summary = send_state(transfer, destination.clone(), progress);
    let last = destination.lock().last.take();
    if let Some(error) = destination.lock().failed.take() {
        return Err(written(error));
    }
    let (Some(summary), Some(last)) = (summary, last) else {
        return Err(SaveError::NotStopped);
    };
    let parts = final_parts(&last).chain([StatePart::Machine(last.machine.encode())]);
    let bytes = destination.lock().complete(parts).map_err(&written)?;
    whole
        .sync_all()
        .and_then(|()| folder.rename(&partial.name, name))
        .and_then(|()| folder.sync())
        .map_err(made)?;
    let saved = Saved { at: summary.at, bytes, stopped_ns: summary.stopped_ns };
    tracing::info!(
        path = %path.display(),
        at = %saved.at,
        bytes,
        iterations = summary.iterations,
        stopped_ms = saved.stopped_ns as f64 / 1e6,
        "a snapshot is written"
    );
    Ok(saved)
}

/// With its cause, which says more.
fn why(error: &SnapshotError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// The name of a file in `folder` that is not there yet.
fn new_name<'a>(folder: &Folder, path: &'a Path) -> Result<&'a OsStr, SaveError> {
    if !folder.is_at(parent(path)) {
        let folder = folder.path().into();
        return Err(SaveError::Elsewhere { path: path.into(), folder });
    }
    let name = path.file_name().unwrap_or_default();
    match folder.facts(name) {
        Ok(_) => Err(SaveError::Exists { path: path.into() }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(name),
        Err(cause) => Err(SaveError::Create { path: path.into(), cause }),
    }
}

/// The file under its first name; gone with this.
struct Partial<'a> {
    folder: &'a Folder,
    name: OsString,
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        // After the renaming there is none.
        let _ = self.folder.remove(&self.name);
    }
}

struct Writing {
    writer: SnapshotWriter<BufWriter<Written>>,
    failed: Option<SnapshotError>,
    last: Option<FinalState>,
}

impl Writing {
    fn complete(&mut self, parts: impl Iterator<Item = StatePart>) -> Result<u64, SnapshotError> {
        for part in parts {
            self.writer.write_part(&part)?;
        }
        self.writer.flush()?;
        Ok(self.writer.written_bytes())
    }
}

/// The file of one snapshot.
struct ToFile {
    transfer: Arc<Transfer>,
    path: String,
    writing: Mutex<Writing>,
}

impl ToFile {
    fn lock(&self) -> MutexGuard<'_, Writing> {
        lock(&self.writing)
    }
}

impl Destination for ToFile {
    fn part(&self, part: StatePart) -> bool {
        let mut writing = self.lock();
        writing.failed = writing.writer.write_part(&part).err();
        writing.failed.is_none() && !self.transfer.has_ended()
    }

    fn finish(&self, last: FinalState) -> Option<SnapshotMark> {
        let mark =
            SnapshotMark { path: self.path.clone(), memory_digest: last.machine.memory_digest };
        // It is written when the guest runs again.
        self.lock().last = Some(last);
        Some(mark)
    }
}
