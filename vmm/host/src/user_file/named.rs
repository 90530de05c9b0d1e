//! The files that a command line names: none is written that another option names too.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::FileError;
use crate::folder::parent;

/// Which file a path is, through links: the file itself, or its place in its folder where there is
/// none yet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Identity {
    There(u64, u64),
    New(PathBuf),
}

impl Identity {
    fn of(path: &Path) -> Self {
        match fs::metadata(path) {
            Ok(facts) => Self::There(facts.dev(), facts.ino()),
            Err(_) => {
                let folder = fs::canonicalize(parent(path));
                let folder = folder.unwrap_or_else(|_| parent(path).into());
                Self::New(folder.join(path.file_name().unwrap_or_default()))
            }
        }
    }
}

/// The files a command line names, with the options that name them.
#[derive(Debug, Default)]
pub struct Named {
    read: Vec<(&'static str, PathBuf)>,
    written: Vec<(&'static str, PathBuf)>,
}

impl Named {
    /// An option whose file is read.
    #[must_use]
    pub fn read(mut self, option: &'static str, path: Option<&Path>) -> Self {
        self.read.extend(path.map(|path| (option, path.into())));
        self
    }

    /// An option whose file is written.
    #[must_use]
    pub fn written(mut self, option: &'static str, path: Option<&Path>) -> Self {
        self.written.extend(path.map(|path| (option, path.into())));
        self
    }

    /// Refuses a file that is written and named twice.
    ///
    /// # Errors
    /// [`FileError::Same`].
    pub fn check(&self) -> Result<(), FileError> {
        let identities = |files: &[(&'static str, PathBuf)]| -> Vec<_> {
            files.iter().map(|(option, path)| (*option, Identity::of(path))).collect()
        };
        let (read, written) = (identities(&self.read), identities(&self.written));
        for (index, (second, identity)) in written.iter().enumerate() {
            let mut others = read.iter().chain(&written[..index]);
            if let Some((first, _)) = others.find(|(_, other)| other == identity) {
                let path = self.written[index].1.clone();
                let (first, second) = (*first, *second);
                return Err(FileError::Same { first, second, path });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn one_file_under_two_names_is_found_through_links() {
        let folder = tempfile::tempdir().unwrap();
        let [disk, link, hard, new] =
            ["disk", "link", "hard", "new"].map(|n| folder.path().join(n));
        fs::write(&disk, "x").unwrap();
        symlink(&disk, &link).unwrap();
        fs::hard_link(&disk, &hard).unwrap();
        for name in [&disk, &link, &hard] {
            let named = Named::default().read("--disk", Some(&disk));
            let error = named.written("--record", Some(name)).check().unwrap_err().to_string();
            assert!(error.contains("--disk and --record name the same file"), "{error}");
        }
        let both = Named::default().written("--record", Some(&new));
        both.written("--report", Some(&new)).check().unwrap_err();
        let apart = Named::default().read("--kernel", Some(&disk)).read("--initrd", Some(&disk));
        apart.written("--record", Some(&new)).written("--report", None).check().unwrap();
    }
}
