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

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

use ftvmm_replication::Term;
use ftvmm_replication::witness::{
    ENTRY_BYTES_MAX, Entry, Nonce, Replaced, WitnessError, WitnessStore, stored_term,
};
use nix::errno::Errno;

use crate::user_file;

/// So many of the newest files stay.
const KEPT: u64 = 64;
/// A proof that a process has left behind is removed after so long, in seconds.
const PROOF_LEFT_S: u64 = 86_400;

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

    fn suffixed(&self, suffix: &str) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(suffix);
        name.into()
    }

    fn folder(&self) -> PathBuf {
        match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        }
    }

    fn unusable(&self, error: &io::Error) -> WitnessError {
        let folder = self.folder();
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
    fn numbers(&self) -> Result<Vec<u64>, WitnessError> {
        let prefix = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
        let mut numbers = Vec::new();
        for entry in fs::read_dir(self.folder()).map_err(|e| self.unusable(&e))? {
            let name = entry.map_err(|e| self.unusable(&e))?.file_name();
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

    fn highest(&self) -> Result<u64, WitnessError> {
        Ok(self.numbers()?.into_iter().max().unwrap_or(0))
    }

    fn entry(&self, number: u64) -> Result<Option<Entry>, WitnessError> {
        if number == 0 {
            return Ok(None);
        }
        let file = self.suffixed(&format!(".{number}"));
        let limit = "an entry is one line";
        let found = user_file::read("witness", &file, ENTRY_BYTES_MAX as u64, limit);
        let found = found.map_err(|error| WitnessError::Unusable {
            place: self.place(),
            reason: error.to_string(),
            remedy: "look at what put it there; only ftvmm may write these files".into(),
        })?;
        Entry::from_stored(&found).map(Some).map_err(|found| WitnessError::Malformed {
            place: self.place(),
            found: format!("{found} in {}", file.display()),
        })
    }

    /// The newest file's number, and its entry.
    fn newest(&self) -> Result<(u64, Option<Entry>), WitnessError> {
        let number = self.highest()?;
        Ok((number, self.entry(number)?))
    }

    /// Makes the file `PATH.suffix` with this content in one step; false when it is there already.
    fn create(&self, suffix: &str, content: &[u8]) -> io::Result<bool> {
        let mine = self.suffixed(&format!(".new-{}", self.process));
        let linked = (|| {
            let mut file = fs::File::create(&mine)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::hard_link(&mine, self.suffixed(&format!(".{suffix}")))
        })();
        let _ = fs::remove_file(&mine);
        match linked {
            // A term that was granted must not be forgotten, or another host is granted it too.
            Ok(()) => user_file::sync_folder_of(&mine).map(|()| true),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn remove_old(&self, numbers: &[u64], newest: u64) {
        for number in numbers.iter().filter(|number| **number + KEPT < newest) {
            let _ = fs::remove_file(self.suffixed(&format!(".{number}")));
        }
    }

    fn proof_file(&self, nonce: Nonce) -> PathBuf {
        self.suffixed(&format!(".proof-{nonce}"))
    }

    /// Removes what killed processes have left behind.
    fn remove_left_proofs(&self) {
        let prefix = self.suffixed(".proof-");
        let prefix = prefix.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Ok(folder) = fs::read_dir(self.folder()) else { return };
        for file in folder.flatten() {
            let age = file.metadata().and_then(|facts| facts.modified()).ok();
            let age = age.and_then(|modified| modified.elapsed().ok());
            let is_left = age.is_some_and(|age| age.as_secs() > PROOF_LEFT_S);
            if is_left && file.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = fs::remove_file(file.path());
            }
        }
    }
}

impl Drop for FileWitness {
    fn drop(&mut self) {
        if let Some(nonce) = self.proof {
            let _ = fs::remove_file(self.proof_file(nonce));
        }
    }
}

impl WitnessStore for FileWitness {
    fn place(&self) -> String {
        format!("file:{}", self.path.display())
    }

    fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
        Ok(self.newest()?.1)
    }

    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError> {
        let (number, held) = self.newest()?;
        if held.as_ref() != expected {
            return Ok(Replaced::Conflict(held));
        }
        let made = self.create(&(number + 1).to_string(), new.to_line().as_bytes());
        if !made.map_err(|e| self.unusable(&e))? {
            // Another was faster.
            return Ok(Replaced::Conflict(self.read()?));
        }
        let numbers = self.numbers()?;
        let newest = numbers.iter().copied().max().unwrap_or(0);
        if newest != number + 1 {
            return Ok(Replaced::Conflict(self.entry(newest)?));
        }
        self.remove_old(&numbers, newest);
        Ok(Replaced::Stored)
    }

    fn prove(&mut self, nonce: Nonce) -> Result<(), WitnessError> {
        if self.proof.is_none() {
            self.remove_left_proofs();
        }
        let content = format!("{}\n", self.process);
        let made = self.create(&format!("proof-{nonce}"), content.as_bytes());
        made.map_err(|e| self.unusable(&e))?;
        if let Some(last) = self.proof.replace(nonce).filter(|last| *last != nonce) {
            let _ = fs::remove_file(self.proof_file(last));
        }
        Ok(())
    }

    fn sees(&mut self, nonce: Nonce) -> Result<bool, WitnessError> {
        match fs::symlink_metadata(self.proof_file(nonce)) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                // A folder that is gone has no answer.
                fs::read_dir(self.folder()).map(|_| false).map_err(|e| self.unusable(&e))
            }
            Err(e) => Err(self.unusable(&e)),
        }
    }
}

#[cfg(test)]
mod tests {
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
        assert!(busy.create("2", live(2, "b").to_line().as_bytes()).unwrap());
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
}
