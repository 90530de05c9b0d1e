//! The file witness: who may be live in a term is whoever made that term's file first, on storage both hosts
//! share.
//!
//! For `file:PATH` the right to term N is the file `PATH.N`, made with `link`, which either makes the name or
//! says that it is there: atomic on local file systems and on NFS (open(2), O_EXCL). The file names its holder.
//! Files of past terms stay: they are the history, and they keep the number from being won twice.

use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use ftvmm_replication::{Claim, Term, Witness, WitnessError};

/// A witness in the files `PATH.1`, `PATH.2`, …
#[derive(Clone, Debug)]
pub struct FileWitness {
    path: PathBuf,
    holder: String,
}

impl FileWitness {
    /// A witness at `path` in whose files this host calls itself `holder`.
    pub fn new(path: PathBuf, holder: String) -> Self {
        Self { path, holder }
    }

    fn suffixed(&self, suffix: &str) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(suffix);
        name.into()
    }

    fn failed(&self, doing: &'static str) -> impl Fn(std::io::Error) -> WitnessError + '_ {
        move |e| WitnessError::Unavailable {
            what: format!("{doing} '{}': {e}", self.path.display()),
        }
    }
}

impl Witness for FileWitness {
    fn claim(&mut self, term: Term) -> Result<Claim, WitnessError> {
        let highest = self.highest()?;
        if highest > term {
            return Ok(Claim::Denied { holder: format!("a host in term {highest}") });
        }
        let mine = self.suffixed(&format!(".claim-{}", self.holder));
        let write = || -> std::io::Result<()> {
            let mut file = fs::File::create(&mine)?;
            writeln!(file, "{}", self.holder)?;
            file.sync_all()
        };
        write().map_err(self.failed("cannot write beside"))?;
        let term_file = self.suffixed(&format!(".{term}"));
        let linked = fs::hard_link(&mine, &term_file);
        let _ = fs::remove_file(&mine);
        match linked {
            Ok(()) => Ok(Claim::Granted),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                let holder = fs::read_to_string(&term_file).unwrap_or_default().trim().to_owned();
                Ok(if holder == self.holder { Claim::Granted } else { Claim::Denied { holder } })
            }
            Err(e) => Err(self.failed("cannot link beside")(e)),
        }
    }

    fn highest(&mut self) -> Result<Term, WitnessError> {
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let prefix = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
        let entries = fs::read_dir(folder).map_err(self.failed("cannot list the folder of"))?;
        let mut highest = Term(0);
        for entry in entries {
            let name = entry.map_err(self.failed("cannot list the folder of"))?.file_name();
            let term = name.to_string_lossy().strip_prefix(&prefix).and_then(|n| n.parse().ok());
            highest = highest.max(Term(term.unwrap_or(0)));
        }
        Ok(highest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(folder: &std::path::Path) -> (FileWitness, FileWitness) {
        let path = folder.join("witness");
        (FileWitness::new(path.clone(), "a".into()), FileWitness::new(path, "b".into()))
    }

    #[test]
    fn a_term_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let (mut a, mut b) = pair(folder.path());
        assert_eq!(a.claim(Term(1)).unwrap(), Claim::Granted);
        assert_eq!(b.claim(Term(1)).unwrap(), Claim::Denied { holder: "a".into() });
        assert_eq!(a.claim(Term(1)).unwrap(), Claim::Granted, "asking again changes nothing");
        assert_eq!(b.claim(Term(2)).unwrap(), Claim::Granted);
        assert_eq!(a.highest().unwrap(), Term(2));
        assert!(matches!(a.claim(Term(1)).unwrap(), Claim::Denied { .. }), "a past term");
    }

    #[test]
    fn of_many_that_race_for_a_term_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("witness");
        let granted: usize = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..16)
                .map(|i| {
                    let mut witness = FileWitness::new(path.clone(), format!("host-{i}"));
                    scope.spawn(move || witness.claim(Term(7)).unwrap() == Claim::Granted)
                })
                .collect();
            racers.into_iter().map(|r| usize::from(r.join().unwrap())).sum()
        });
        assert_eq!(granted, 1);
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let mut witness = FileWitness::new("/nowhere/at/all/witness".into(), "a".into());
        let error = witness.claim(Term(1)).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all/witness"), "{error}");
    }
}
