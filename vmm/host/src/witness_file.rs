//! The file witness: a [`WitnessStore`] in a folder that both hosts share.
//!
//! For `file:PATH` the entry is in the file `PATH.R` with the highest number R. It is replaced by
//! making `PATH.(R+1)` with `link`, which either makes the name, with the whole content, or says
//! that it is there: atomic on local file systems and on NFS (open(2), O_EXCL). So of two hosts
//! that replace the same entry one succeeds, and a loss of power leaves either entry whole.
//!
//! Old files are removed only far behind the newest ([`KEPT`]). A host that was away between its
//! look at the folder and its link may find its number free again; it looks once more after the
//! link, sees the newer files, and has replaced nothing.
//!
//! The folder is looked up for each question, and not held: both hosts know the witness by its
//! path, and a folder that has been moved away is the witness of nobody (decision 0039).

use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

use ftvmm_replication::Term;
use ftvmm_replication::witness::{
    ENTRY_BYTES_MAX, Entry, Nonce, Replaced, WitnessError, WitnessStore, stored_term,
};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::clock::host_unix_seconds;
use crate::folder::{Folder, parent};
use crate::user_file;

/// So many of the newest files stay.
const KEPT: u64 = 64;
/// A proof that a process has left behind is removed after so long, in seconds.
const PROOF_LEFT_S: u64 = 86_400;
/// Two hosts may write and read as two users: who may do what, umask and folder say.
const SHARED: u32 = 0o666;

/// A witness in the files `PATH.1`, `PATH.2`, …
#[derive(Debug)]
pub struct FileWitness {
    path: PathBuf,
    /// For the names of this process's own files.
    process: String,
    /// The nonce that this process has written last.
    proof: Option<Nonce>,
}

impl FileWitness {
    /// A witness at `path`; `process` is what no other process is called.
    pub fn new(path: PathBuf, process: &str) -> Self {
        Self { path, process: process.replace(['/', ' '], "-"), proof: None }
    }

    /// The name of one of its files.
    fn name(&self, suffix: &str) -> OsString {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(suffix);
        name
    }

    fn folder(&self) -> Result<Folder, WitnessError> {
        Folder::of(&self.path).map_err(|error| self.unusable(&error))
    }

    fn unusable(&self, error: &io::Error) -> WitnessError {
        let folder = parent(&self.path);
        let remedy = match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT) => "make the folder, or mount it",
            Some(Errno::ENOSPC | Errno::EDQUOT) => "make room on its file system",
            Some(Errno::EROFS) => "mount its file system for writing",
            Some(Errno::EACCES | Errno::EPERM) => "let ftvmm read and write there",
            Some(Errno::EIO | Errno::ESTALE | Errno::ETIMEDOUT) => "look after its server or disk",
            Some(Errno::ENOTDIR) => "name a file in a folder",
            _ => "see that ftvmm can make files and hard links there",
        };
        WitnessError::Unusable {
            place: self.place(),
            reason: format!("{}: {error}", folder.display()),
            remedy: remedy.into(),
        }
    }

    /// The numbers of all files, in no order.
    fn numbers(&self, folder: &Folder) -> Result<Vec<u64>, WitnessError> {
        let prefix = self.name(".").to_string_lossy().into_owned();
        let mut numbers = Vec::new();
        for name in folder.names().map_err(|e| self.unusable(&e))? {
            let name = name.to_string_lossy();
            let Some(number) = name.strip_prefix(&prefix) else { continue };
            // Nobody made such a file. To leave it out would be to guess which one is the newest.
            let number = stored_term(number).map_err(|_| WitnessError::Malformed {
                place: self.place(),
                found: format!("a file \"{name}\""),
            })?;
            numbers.extend(number.map(|Term(number)| number));
        }
        Ok(numbers)
    }

    fn entry(&self, folder: &Folder, number: u64) -> Result<Option<Entry>, WitnessError> {
        if number == 0 {
            return Ok(None);
        }
        let file = self.name(&format!(".{number}"));
        let limit = "an entry is one line";
        let found = user_file::read_in("witness", folder, &file, ENTRY_BYTES_MAX as u64, limit);
        let found = found.map_err(|error| WitnessError::Unusable {
            place: self.place(),
            reason: error.to_string(),
            remedy: "look at what put it there; only ftvmm may write these files".into(),
        })?;
        Entry::from_stored(&found).map(Some).map_err(|found| WitnessError::Malformed {
            place: self.place(),
            found: format!("{found} in {}", folder.join(&file).display()),
        })
    }

    /// The newest file's number, and its entry.
    fn newest(&self, folder: &Folder) -> Result<(u64, Option<Entry>), WitnessError> {
        let number = self.numbers(folder)?.into_iter().max().unwrap_or(0);
        Ok((number, self.entry(folder, number)?))
    }

    /// Makes the file `PATH.suffix` with this content in one step; false when it is there already.
    fn create(&self, folder: &Folder, suffix: &str, content: &[u8]) -> io::Result<bool> {
        let mine = self.name(&format!(".new-{}", self.process));
        let linked = (|| {
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
            let mut file = folder.open_with(&mine, flags, SHARED)?;
            file.write_all(content)?;
            file.sync_all()?;
            folder.link(&mine, &self.name(&format!(".{suffix}")))
        })();
        let _ = folder.remove(&mine);
        match linked {
            // A term that was granted must not be forgotten, or another host is granted it too.
            Ok(()) => folder.sync().map(|()| true),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn remove_old(&self, folder: &Folder, numbers: &[u64], newest: u64) {
        for number in numbers.iter().filter(|number| **number + KEPT < newest) {
            let _ = folder.remove(&self.name(&format!(".{number}")));
        }
    }

    fn proof_file(&self, nonce: Nonce) -> OsString {
        self.name(&format!(".proof-{nonce}"))
    }

    /// Removes what killed processes have left behind.
    fn remove_left_proofs(&self, folder: &Folder) {
        let prefix = self.name(".proof-").to_string_lossy().into_owned();
        let is_left = |name: &OsStr| {
            let written_s = folder.facts(name).map(|facts| facts.st_mtime.max(0) as u64);
            written_s.is_ok_and(|at_s| host_unix_seconds().saturating_sub(at_s) > PROOF_LEFT_S)
        };
        for name in folder.names().unwrap_or_default() {
            if name.to_string_lossy().starts_with(&prefix) && is_left(&name) {
                let _ = folder.remove(&name);
            }
        }
    }
}

impl Drop for FileWitness {
    fn drop(&mut self) {
        if let (Some(nonce), Ok(folder)) = (self.proof, self.folder()) {
            let _ = folder.remove(&self.proof_file(nonce));
        }
    }
}

impl WitnessStore for FileWitness {
    fn place(&self) -> String {
        format!("file:{}", self.path.display())
    }

    fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
        Ok(self.newest(&self.folder()?)?.1)
    }

    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError> {
        let folder = self.folder()?;
        let (number, held) = self.newest(&folder)?;
        if held.as_ref() != expected {
            return Ok(Replaced::Conflict(held));
        }
        let made = self.create(&folder, &(number + 1).to_string(), new.to_line().as_bytes());
        if !made.map_err(|e| self.unusable(&e))? {
            // Another was faster.
            return Ok(Replaced::Conflict(self.newest(&folder)?.1));
        }
        let numbers = self.numbers(&folder)?;
        let newest = numbers.iter().copied().max().unwrap_or(0);
        if newest != number + 1 {
            return Ok(Replaced::Conflict(self.entry(&folder, newest)?));
        }
        self.remove_old(&folder, &numbers, newest);
        Ok(Replaced::Stored)
    }

    fn prove(&mut self, nonce: Nonce) -> Result<(), WitnessError> {
        let folder = self.folder()?;
        if self.proof.is_none() {
            self.remove_left_proofs(&folder);
        }
        let content = format!("{}\n", self.process);
        let made = self.create(&folder, &format!("proof-{nonce}"), content.as_bytes());
        made.map_err(|e| self.unusable(&e))?;
        if let Some(last) = self.proof.replace(nonce).filter(|last| *last != nonce) {
            let _ = folder.remove(&self.proof_file(last));
        }
        Ok(())
    }

    fn sees(&mut self, nonce: Nonce) -> Result<bool, WitnessError> {
        let folder = self.folder()?;
        match folder.facts(&self.proof_file(nonce)) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                // A folder that is gone has no answer.
                folder.names().map(|_| false).map_err(|e| self.unusable(&e))
            }
            Err(e) => Err(self.unusable(&e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ftvmm_replication::witness::{Claim, claim};
    use ftvmm_replication::witness::{Doing, GuestId, Holder, Purpose, moment};

    use super::*;

    fn entry(term: u64, holder: &str, doing: Doing) -> Entry {
        let holder = Holder::from_text(holder).unwrap();
        let guest = GuestId::from_random([1; 16]);
        let ran = Some(Term(if doing == Doing::Live { term } else { 0 }));
        Entry { term: Term(term), guest, holder, doing, ran, seen: moment(0) }
    }

    fn live(term: u64, holder: &str) -> Entry {
        entry(term, holder, Doing::Live)
    }

    fn witness(folder: &tempfile::TempDir, process: &str) -> FileWitness {
        FileWitness::new(folder.path().join("w"), process)
    }

    #[test]
    fn an_entry_replaces_exactly_the_one_that_was_read() {
        let folder = tempfile::tempdir().unwrap();
        let (mut a, mut b) = (witness(&folder, "a"), witness(&folder, "b"));
        assert_eq!(a.read().unwrap(), None);
        assert_eq!(a.replace(None, &live(1, "a")).unwrap(), Replaced::Stored);
        let conflict = Replaced::Conflict(Some(live(1, "a")));
        assert_eq!(b.replace(None, &live(1, "b")).unwrap(), conflict);
        assert_eq!(b.replace(Some(&live(1, "b")), &live(2, "b")).unwrap(), conflict);
        assert_eq!(b.replace(Some(&live(1, "a")), &live(2, "b")).unwrap(), Replaced::Stored);
        assert_eq!(a.read().unwrap(), Some(live(2, "b")));
    }

    #[test]
    fn old_files_go_and_one_who_was_away_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut busy = witness(&folder, "a");
        let states = [entry(1, "a", Doing::Waiting), live(1, "a")];
        let mut expected = None;
        for number in 0..KEPT + 10 {
            let new = &states[(number % 2) as usize];
            assert_eq!(busy.replace(expected, new).unwrap(), Replaced::Stored);
            expected = Some(new);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count() as u64, KEPT + 1);
        // Its number is free, but what it makes of it is not the newest.
        let held = Folder::open(folder.path()).unwrap();
        assert!(busy.create(&held, "2", live(2, "b").to_line().as_bytes()).unwrap());
        assert_eq!(busy.read().unwrap().as_ref(), expected);
    }

    #[test]
    fn of_many_that_claim_at_once_one_is_granted() {
        let folder = tempfile::tempdir().unwrap();
        let granted: usize = std::thread::scope(|scope| {
            let ask = |number: usize| {
                let holder = format!("host-{number}");
                let mut witness = witness(&folder, &holder);
                let answer = claim(&mut witness, &live(1, &holder), Purpose::Start);
                usize::from(answer.unwrap() == Claim::Granted)
            };
            let asking: Vec<_> = (0..8).map(|number| scope.spawn(move || ask(number))).collect();
            asking.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(granted, 1);
    }

    #[test]
    fn an_error_says_the_reason_and_what_to_do() {
        let says = |errno: Errno| {
            let witness = FileWitness::new("/somewhere/w".into(), "a");
            witness.unusable(&io::Error::from_raw_os_error(errno as i32)).to_string()
        };
        for (errno, reason, remedy) in [
            (Errno::ENOENT, "No such file", "mount it"),
            (Errno::ENOSPC, "No space left", "make room"),
            (Errno::EROFS, "Read-only file system", "for writing"),
            (Errno::EACCES, "Permission denied", "read and write"),
        ] {
            let said = says(errno);
            for part in ["file:/somewhere/w", reason, remedy] {
                assert!(said.contains(part), "{said}");
            }
        }
        let mut missing = FileWitness::new("/nowhere/at/all/w".into(), "a");
        for error in [
            missing.read().unwrap_err(),
            missing.replace(None, &live(1, "a")).unwrap_err(),
            missing.prove(Nonce([1; 16])).unwrap_err(),
            missing.sees(Nonce([1; 16])).unwrap_err(),
        ] {
            assert!(error.to_string().contains("/nowhere/at/all: No such file"), "{error}");
        }
    }

    #[test]
    fn what_is_no_entry_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut witness = witness(&folder, "a");
        for rubbish in ["hi", "", "3 an-entry-of-version-1\n"] {
            fs::write(folder.path().join("w.5"), rubbish).unwrap();
            let error = witness.read().unwrap_err();
            assert!(matches!(error, WitnessError::Malformed { .. }), "{error:?}");
            assert!(error.to_string().contains("w.5"), "{error}");
        }
        fs::write(folder.path().join("w.5"), vec![b'x'; 5000]).unwrap();
        assert!(witness.read().unwrap_err().to_string().contains("one line"));
        // Nobody writes to this one.
        nix::unistd::mkfifo(&folder.path().join("w.6"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(witness.read().unwrap_err().to_string().contains("a pipe"));
    }

    #[test]
    fn a_number_that_no_file_can_have_is_named_and_other_names_are_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let mut witness = witness(&folder, "a");
        for name in ["w.007", "w.+7", "w.7.bak", "w.", "v.9", "w.new-x"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(witness.read().unwrap(), None);
        for number in [u64::MAX.to_string(), "9".repeat(23), (1u64 << 62).to_string()] {
            let file = folder.path().join(format!("w.{number}"));
            fs::write(&file, "").unwrap();
            let error = witness.read().unwrap_err().to_string();
            assert!(error.contains(&format!("\"w.{number}\"")), "{error}");
            fs::remove_file(file).unwrap();
        }
    }

    #[test]
    fn a_proof_is_seen_in_the_same_folder_only_and_none_is_left() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (first, second) = (Nonce([1; 16]), Nonce([2; 16]));
        let mut a = witness(&folder, "a");
        a.prove(first).unwrap();
        assert!(witness(&folder, "b").sees(first).unwrap());
        assert!(!witness(&other, "b").sees(first).unwrap());
        a.prove(second).unwrap();
        let mut b = witness(&folder, "b");
        assert_eq!((b.sees(first).unwrap(), b.sees(second).unwrap()), (false, true));
        drop(a);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_is_moved_away_is_no_witness_and_one_in_its_place_is() {
        let around = tempfile::tempdir().unwrap();
        let [path, away] = ["shared", "away"].map(|name| around.path().join(name));
        fs::create_dir(&path).unwrap();
        let mut witness = FileWitness::new(path.join("w"), "a");
        witness.replace(None, &live(1, "a")).unwrap();
        fs::rename(&path, &away).unwrap();
        for error in [
            witness.read().unwrap_err(),
            witness.replace(Some(&live(1, "a")), &live(2, "a")).unwrap_err(),
            witness.prove(Nonce([1; 16])).unwrap_err(),
            witness.sees(Nonce([1; 16])).unwrap_err(),
        ] {
            assert!(error.to_string().contains("shared: No such file"), "{error}");
        }
        fs::create_dir(&path).unwrap();
        assert_eq!(witness.read().unwrap(), None);
        fs::remove_dir(&path).unwrap();
        fs::rename(&away, &path).unwrap();
        assert_eq!(witness.read().unwrap(), Some(live(1, "a")));
    }
}
