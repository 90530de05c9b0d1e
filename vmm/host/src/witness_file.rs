//! The file witness. The host that first creates a term's file, on storage that both hosts share,
//! may be active in that term.
//!
//! For `file:PATH` the right to term N is the file `PATH.N`, made with `link`, which either makes
//! the name or says that it is there: atomic on local file systems and on NFS (open(2), O_EXCL).
//! The file names its holder. Files of past terms stay: they are the history, and they keep the
//! number from being won twice.

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

use ftvmm_replication::Term;
use ftvmm_replication::witness::{Claim, Witness, WitnessEntry, WitnessError, judge, stored_term};

use crate::user_file;

/// Longer than any term with its holder.
const ENTRY_BYTES_MAX: u64 = 4096;

/// A witness in the files `PATH.1`, `PATH.2`, …
#[derive(Clone, Debug)]
pub struct FileWitness {
    path: PathBuf,
}

impl FileWitness {
    /// A witness at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn suffixed(&self, suffix: &str) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(suffix);
        name.into()
    }

    fn unreachable(&self, source: impl Error + Send + Sync + 'static) -> WitnessError {
        WitnessError::Unreachable {
            place: self.path.display().to_string(),
            source: Box::new(source),
        }
    }

    fn highest_term(&self) -> Result<Term, WitnessError> {
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let prefix = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
        let mut highest = Term(0);
        for entry in fs::read_dir(folder).map_err(|e| self.unreachable(e))? {
            let name = entry.map_err(|e| self.unreachable(e))?.file_name();
            let name = name.to_string_lossy();
            let Some(number) = name.strip_prefix(&prefix) else { continue };
            // Nobody won such a term. To leave it out would be to guess which one is the highest.
            let term = stored_term(number).map_err(|_| WitnessError::Malformed {
                place: self.path.display().to_string(),
                found: name.clone().into_owned(),
            })?;
            highest = highest.max(term.unwrap_or_default());
        }
        Ok(highest)
    }

    fn entry(&self, term: Term) -> Result<Option<WitnessEntry>, WitnessError> {
        if term == Term(0) {
            return Ok(None);
        }
        let file = self.suffixed(&format!(".{term}"));
        let found = user_file::read("witness", &file, ENTRY_BYTES_MAX, "it is one line")
            .map_err(|e| self.unreachable(e))?;
        let found = String::from_utf8_lossy(&found).into_owned();
        let entry = WitnessEntry::from_line(&found).filter(|entry| entry.term == term);
        let place = file.display().to_string();
        entry.map(Some).ok_or(WitnessError::Malformed { place, found })
    }

    /// Makes the term's file with its content in one step; false when it is there already.
    fn create(&self, entry: &WitnessEntry) -> io::Result<bool> {
        let mine = self.suffixed(&format!(".claim-{}", entry.holder.replace(['/', ' '], "-")));
        let mut file = fs::File::create(&mine)?;
        file.write_all(entry.to_line().as_bytes())?;
        file.sync_all()?;
        let linked = fs::hard_link(&mine, self.suffixed(&format!(".{}", entry.term)));
        let _ = fs::remove_file(&mine);
        match linked {
            // A term that was granted must not be forgotten, or another host is granted it too.
            Ok(()) => user_file::sync_folder_of(&mine).map(|()| true),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        }
    }
}

impl Witness for FileWitness {
    fn claim(&mut self, term: Term, holder: &str) -> Result<Claim, WitnessError> {
        let highest = self.highest()?;
        let current = self.entry(highest)?;
        if let denied @ Claim::Denied { .. } = judge(current.as_ref(), term, holder) {
            return Ok(denied);
        }
        let wanted = WitnessEntry { term, holder: holder.to_owned() };
        if self.create(&wanted).map_err(|e| self.unreachable(e))? {
            return Ok(Claim::Granted);
        }
        // Another was faster, or this is our own file.
        Ok(judge(self.entry(term)?.as_ref(), term, holder))
    }

    fn highest(&mut self) -> Result<Term, WitnessError> {
        self.highest_term()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(term: u64, holder: &str) -> Claim {
        Claim::Denied { current: WitnessEntry { term: Term(term), holder: holder.into() } }
    }

    #[test]
    fn a_term_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let mut witness = FileWitness::new(folder.path().join("witness"));
        assert_eq!(witness.highest().unwrap(), Term(0));
        assert_eq!(witness.claim(Term(1), "a").unwrap(), Claim::Granted);
        assert_eq!(witness.claim(Term(1), "b").unwrap(), denied(1, "a"));
        assert_eq!(witness.claim(Term(1), "a").unwrap(), Claim::Granted, "asked again");
        assert_eq!(witness.claim(Term(2), "b").unwrap(), Claim::Granted);
        assert_eq!(witness.highest().unwrap(), Term(2));
        assert_eq!(witness.claim(Term(1), "a").unwrap(), denied(2, "b"), "a past term");
    }

    #[test]
    fn of_many_that_race_for_a_term_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("witness");
        let granted: usize = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..16)
                .map(|i| {
                    let mut witness = FileWitness::new(path.clone());
                    scope.spawn(move || {
                        witness.claim(Term(7), &format!("host {i}")).unwrap() == Claim::Granted
                    })
                })
                .collect();
            racers.into_iter().map(|r| usize::from(r.join().unwrap())).sum()
        });
        assert_eq!(granted, 1);
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let mut witness = FileWitness::new("/nowhere/at/all/witness".into());
        let error = witness.claim(Term(1), "a").unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all/witness"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_entry_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("witness");
        std::fs::write(folder.path().join("witness.3"), "hello").unwrap();
        let answer = FileWitness::new(path).claim(Term(4), "a");
        assert!(matches!(answer, Err(WitnessError::Malformed { .. })));
    }

    #[test]
    fn a_file_of_a_term_that_nobody_can_have_won_is_named() {
        for number in [u64::MAX.to_string(), "9".repeat(23), (1u64 << 62).to_string()] {
            let folder = tempfile::tempdir().unwrap();
            let mut witness = FileWitness::new(folder.path().join("w"));
            witness.claim(Term(1), "a").unwrap();
            fs::write(folder.path().join(format!("w.{number}")), "").unwrap();
            for refused in
                [witness.highest().unwrap_err(), witness.claim(Term(2), "a").unwrap_err()]
            {
                let refused = refused.to_string();
                assert!(refused.contains(&format!("\"w.{number}\"")), "{refused}");
            }
        }
        // No term's number, so not ours.
        let folder = tempfile::tempdir().unwrap();
        let mut witness = FileWitness::new(folder.path().join("w"));
        for name in ["w.007", "w.+7", "w.7.bak", "w.", "v.9"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(witness.highest().unwrap(), Term(0));
    }

    #[test]
    fn an_entry_that_is_no_small_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("witness");
        let mut witness = FileWitness::new(path.clone());
        fs::write(folder.path().join("witness.1"), vec![b'x'; 5000]).unwrap();
        let refused = witness.claim(Term(2), "a").unwrap_err();
        assert!(matches!(refused, WitnessError::Unreachable { .. }), "{refused:?}");
        // Nobody writes to this one.
        let pipe = folder.path().join("witness.2");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = witness.claim(Term(3), "a").unwrap_err();
        assert!(matches!(refused, WitnessError::Unreachable { .. }), "{refused:?}");
    }
}
