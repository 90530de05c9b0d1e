//! Folders in the cache named by content.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::{GuestBuildError, at};

/// Enough of a SHA-256 to tell apart what one cache will ever hold.
pub(crate) const NAME_DIGITS: usize = 16;
const TEMPORARY_PREFIX: &str = ".guest-";
const TAIL_LINES: usize = 15;

/// The cache, held by one builder at a time.
pub(crate) struct Store {
    root: PathBuf,
    _lock: Flock<File>,
}

impl Store {
    /// Waits for any other builder.
    pub(crate) fn lock(cache: &Path) -> Result<Self, GuestBuildError> {
        fs::create_dir_all(cache).map_err(at(cache))?;
        let path = cache.join("guest.lock");
        let file = File::create(&path).map_err(at(&path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| at(&path)(io::Error::from(errno)))?;
        remove_leftovers(cache)?;
        Ok(Self { root: cache.to_owned(), _lock: lock })
    }

    /// A path directly in the cache.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Returns the folder `kind-digest`, filling it first when it is not there.
    pub(crate) fn publish(
        &self,
        kind: &str,
        digest: &str,
        fill: impl FnOnce(&Path) -> Result<(), GuestBuildError>,
    ) -> Result<PathBuf, GuestBuildError> {
        let finished = self.root.join(format!("{kind}-{}", &digest[..NAME_DIGITS]));
        if finished.is_dir() {
            return Ok(finished);
        }
        let aside = self.temporary()?;
        let folder = aside.path().join(kind);
        fs::create_dir(&folder).map_err(at(&folder))?;
        fill(&folder)?;
        fs::rename(&folder, &finished).map_err(at(&finished))?;
        Ok(finished)
    }

    /// A folder on the file system of the cache that goes away by itself.
    pub(crate) fn temporary(&self) -> Result<tempfile::TempDir, GuestBuildError> {
        let builder = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempdir_in(&self.root);
        builder.map_err(at(&self.root))
    }
}

/// Removes what an interrupted builder left: it held the lock, so none is at work there.
fn remove_leftovers(cache: &Path) -> Result<(), GuestBuildError> {
    for entry in fs::read_dir(cache).map_err(at(cache))? {
        let entry = entry.map_err(at(cache))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            fs::remove_dir_all(entry.path()).map_err(at(&entry.path()))?;
        }
    }
    Ok(())
}

/// The SHA-256 of the parts, each with its length so that no two lists of parts look alike.
pub(crate) fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    ftvmm_guest_programs::stream::hex(&hash.finalize())
}

/// Turns a bad exit into an error that shows the last lines of the log.
pub(crate) fn succeeded(
    command: &Command,
    status: ExitStatus,
    log: &Path,
) -> Result<(), GuestBuildError> {
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&fs::read(log).map_err(at(log))?).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
    let command = format!("{command:?}");
    Err(GuestBuildError::CommandFailed { command, status, log: log.to_owned(), tail })
}

/// Adapter for `map_err`: this program could not be started.
pub(crate) fn not_started(command: &Command) -> impl FnOnce(io::Error) -> GuestBuildError {
    let program = command.get_program().to_string_lossy().into_owned();
    move |source| GuestBuildError::NotStarted { program, source }
}

#[cfg(test)]
mod tests {
    use ftvmm_host_programs::Program;

    use super::*;

    #[test]
    fn a_folder_is_filled_once_and_a_failure_leaves_nothing() {
        let cache = tempfile::tempdir().unwrap();
        let store = Store::lock(cache.path()).unwrap();
        let digest = digest([&b"content"[..]]);
        let failed = store.publish("thing", &digest, |folder| {
            fs::write(folder.join("half"), "x").unwrap();
            Err(GuestBuildError::NoExecutable { package: "x" })
        });
        assert!(failed.is_err());
        let left: Vec<_> = fs::read_dir(cache.path()).unwrap().map(Result::unwrap).collect();
        assert_eq!(left.len(), 1, "only the lock: {left:?}");

        let write = |folder: &Path| fs::write(folder.join("f"), "x").map_err(at(folder));
        let first = store.publish("thing", &digest, write).unwrap();
        let again = store.publish("thing", &digest, |_| panic!("it is there already")).unwrap();
        assert_eq!(first, again);
        assert_eq!(fs::read(first.join("f")).unwrap(), b"x");
    }

    #[test]
    fn what_an_interrupted_builder_left_is_removed_and_nothing_else() {
        let cache = tempfile::tempdir().unwrap();
        let (left, kept) = (cache.path().join(".guest-left"), cache.path().join("guest-kept"));
        fs::create_dir_all(left.join("build")).unwrap();
        fs::create_dir(&kept).unwrap();
        Store::lock(cache.path()).unwrap();
        assert!(!left.exists());
        assert!(kept.exists());
    }

    #[test]
    fn parts_that_join_to_the_same_bytes_have_different_digests() {
        assert_ne!(digest([&b"ab"[..], b"c"]), digest([&b"a"[..], b"bc"]));
    }

    #[test]
    fn a_failed_command_shows_the_end_of_its_log() {
        let log = tempfile::NamedTempFile::new().unwrap();
        fs::write(log.path(), "first\nlast words\n").unwrap();
        let mut command = Program::Sh.command().unwrap();
        let status = command.args(["-c", "exit 1"]).status().unwrap();
        let text = succeeded(&command, status, log.path()).unwrap_err().to_string();
        assert!(text.contains("last words"), "{text}");
    }
}
