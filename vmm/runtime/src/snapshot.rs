//! A snapshot that a guest is to go on from.
//!
//! The file is read to its end before anything else is done with it: a damaged one is refused while
//! there is no guest yet, and what it holds is known when a recording's header is written.

use std::io::{BufReader, Seek};
use std::path::{Path, PathBuf};

use ftvmm_host::user_file::{self, FileError, Shared};
use ftvmm_machine::machine_state::{MachineState, StateError};
use ftvmm_replication::{
    FileHeader, Ordinal, SnapshotError, SnapshotMark, SnapshotReader, Start, StatePart,
};
use thiserror::Error;

/// The parts of a snapshot, in order.
pub type Parts = SnapshotReader<BufReader<Shared>>;

/// Why a snapshot cannot be used.
#[derive(Debug, Error)]
#[error("snapshot '{path}': {why}", path = path.display())]
pub struct SnapshotUnusable {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: SnapshotFault,
}

/// What is wrong with a snapshot.
#[derive(Debug, Error)]
pub enum SnapshotFault {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] std::io::Error),
    /// It is no file to read.
    #[error(transparent)]
    Unreadable(#[from] FileError),
    /// It is none, or damaged.
    #[error(transparent)]
    File(#[from] SnapshotError),
    /// The machine in it is none, or of another version.
    #[error(transparent)]
    Machine(#[from] StateError),
    /// It is complete, but belongs to another guest or recording.
    #[error("{0}")]
    Other(String),
}

/// A snapshot that is whole.
pub struct Snapshot {
    path: PathBuf,
    parts: Parts,
    start: Start,
}

impl Snapshot {
    /// Opens a snapshot and reads it to its end.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, SnapshotUnusable> {
        Self::read(path).map_err(|why| SnapshotUnusable { path: path.into(), why })
    }

    fn read(path: &Path) -> Result<Self, SnapshotFault> {
        let mut file = user_file::open_shared("snapshot", path).map_err(|error| match error {
            FileError::Host { cause, .. } => SnapshotFault::Open(cause),
            error => SnapshotFault::Unreadable(error),
        })?;
        let mut reader = SnapshotReader::new(BufReader::new(&mut file))?;
        let mut machine = None;
        while let Some(part) = reader.next_part()? {
            if let StatePart::Machine(bytes) = part {
                machine = Some(MachineState::decode(&bytes)?);
            }
        }
        let MachineState { at, memory_digest, .. } = machine.ok_or(StateError::Damaged)?;
        drop(reader);
        file.rewind()?;
        let parts = SnapshotReader::new(BufReader::new(file))?;
        let absolute = std::path::absolute(path)?.to_string_lossy().into_owned();
        let snapshot = SnapshotMark { path: absolute, memory_digest };
        Ok(Self { path: path.into(), parts, start: Start { at, snapshot } })
    }

    /// The guest it is of.
    pub fn header(&self) -> &FileHeader {
        self.parts.header()
    }

    /// Where a guest stands that goes on from it.
    pub fn start(&self) -> &Start {
        &self.start
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses it unless it is the one of this exit and this memory.
    ///
    /// # Errors
    /// Says what it is, and what it should be.
    pub fn expect(&self, at: Ordinal, mark: &SnapshotMark) -> Result<(), SnapshotUnusable> {
        let Start { at: own_at, snapshot } = &self.start;
        let (own, wanted) = (snapshot.memory_digest, mark.memory_digest);
        if (*own_at, own) == (at, wanted) {
            return Ok(());
        }
        Err(self.unusable(format!(
            "is of exit {own_at}, memory {own:016x}; the recording's is of exit {at}, memory \
             {wanted:016x}"
        )))
    }

    /// It does not do, because of this.
    pub fn unusable(&self, why: String) -> SnapshotUnusable {
        SnapshotUnusable { path: self.path.clone(), why: SnapshotFault::Other(why) }
    }

    /// Its parts, from the first.
    pub fn into_parts(self) -> Parts {
        self.parts
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use ftvmm_replication::SnapshotWriter;

    use super::*;
    use crate::testing::header;

    #[test]
    fn another_version_of_the_machine_is_named() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let mut writer = SnapshotWriter::new(File::create(&path).unwrap(), &header()).unwrap();
        writer.write_part(&StatePart::Machine(99u32.to_le_bytes().to_vec())).unwrap();
        let error = Snapshot::open(&path).err().unwrap().to_string();
        assert!(error.contains("machine's state has version 99"), "{error}");
        assert!(error.starts_with(&format!("snapshot '{}'", path.display())), "{error}");
    }
}
