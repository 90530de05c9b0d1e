//! A folder that is held open, and the files in it by their names (decision 0039).
//!
//! Its path is looked up once, at set-up. What is made, replaced or removed later is reached
//! through the descriptor and a plain name, so that it lies in this folder whatever its path has
//! become. A name leads nowhere else: a symbolic link is not followed.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

/// Only its owner reads a file that holds what is in a guest's memory.
pub const SECRET: u32 = 0o600;
/// The longest name of a file (linux/limits.h, `NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;
/// What a file is called while it is written, behind its own name and this process's number.
const UNFINISHED: &str = "partial";

/// A folder that is held open.
#[derive(Debug)]
pub struct Folder {
    descriptor: OwnedFd,
    /// Where it was when it was opened, for messages.
    path: PathBuf,
}

impl Folder {
    /// Opens the folder at `path`.
    ///
    /// # Errors
    /// When there is none, or it may not be searched.
    pub fn open(path: &Path) -> io::Result<Self> {
        // It needs no right to read: that is asked for when it is listed or synced.
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let descriptor = open(path, flags, Mode::empty())?;
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        Ok(Self { descriptor, path })
    }

    /// Opens the folder in which `file` is.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn of(file: &Path) -> io::Result<Self> {
        Self::open(parent(file))
    }

    /// Where it was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a file in it is called in messages.
    pub fn join(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// Whether `path` leads to this folder. One that leads nowhere now is known by what it was
    /// called when it was opened.
    pub fn is_at(&self, path: &Path) -> bool {
        match (fs::metadata(path), fstat(&self.descriptor)) {
            (Ok(there), Ok(own)) => (there.dev(), there.ino()) == (own.st_dev, own.st_ino),
            _ => path == self.path,
        }
    }

    /// Opens a file for reading. Never waits, as opening a pipe would.
    ///
    /// # Errors
    /// When there is none, its name is none, or the host refuses.
    pub fn open_file(&self, name: &OsStr) -> io::Result<File> {
        self.open_with(name, OFlag::O_RDONLY | OFlag::O_NONBLOCK, 0)
    }

    /// A new file that only its owner reads and writes, whatever the umask of this process.
    ///
    /// # Errors
    /// When there is one already (`AlreadyExists`), its name is none, or the host refuses.
    pub fn create_new(&self, name: &OsStr) -> io::Result<File> {
        let file = self.open_with(name, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL, SECRET)?;
        fchmod(&file, Mode::from_bits_truncate(SECRET))?;
        Ok(file)
    }

    pub(crate) fn open_with(&self, name: &OsStr, flags: OFlag, mode: u32) -> io::Result<File> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let mode = Mode::from_bits_truncate(mode);
        Ok(openat(&self.descriptor, plain(name)?, flags, mode)?.into())
    }

    /// Writes a whole file in one step: after a loss of power too the file of that name is the old
    /// one or the new one. Which of the two, [`Self::sync`] decides.
    ///
    /// # Errors
    /// When its name is none, or the host refuses. The old file is there then.
    pub fn replace(&self, name: &OsStr, content: &[u8]) -> io::Result<()> {
        let mut unfinished = plain(name)?.to_owned();
        unfinished.push(format!(".{}.{UNFINISHED}", std::process::id()));
        // Of a process with this number that was killed.
        let _ = self.remove(&unfinished);
        let whole = || {
            let mut file = self.create_new(&unfinished)?;
            file.write_all(content)?;
            file.sync_all()?;
            self.rename(&unfinished, name)
        };
        whole().inspect_err(|_| drop(self.remove(&unfinished)))
    }

    /// Gives a file another name, whose file it replaces.
    ///
    /// # Errors
    /// When there is none, a name is none, or the host refuses.
    pub fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        let folder = &self.descriptor;
        Ok(renameat(folder, plain(from)?, folder, plain(to)?)?)
    }

    /// Gives a file a second name.
    ///
    /// # Errors
    /// When there is such a file (`AlreadyExists`), a name is none, or the host refuses.
    pub fn link(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        let folder = &self.descriptor;
        Ok(linkat(folder, plain(from)?, folder, plain(to)?, AtFlags::empty())?)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// When there is none, its name is none, or the host refuses.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.descriptor, plain(name)?, UnlinkatFlags::NoRemoveDir)?)
    }

    /// What the host knows of the file, or of the link, of that name.
    ///
    /// # Errors
    /// When there is none (`NotFound`), its name is none, or the host refuses.
    pub fn facts(&self, name: &OsStr) -> io::Result<FileStat> {
        Ok(fstatat(&self.descriptor, plain(name)?, AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// The names of everything in it, in no order.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut listed = Dir::openat(&self.descriptor, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in listed.iter() {
            let name = entry?.file_name().to_bytes().to_owned();
            if !matches!(name.as_slice(), b"." | b"..") {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    /// Makes sure that the names in it outlive a loss of power: a file that was synced may still be
    /// missing from its folder (fsync(2)). A file system that cannot sync folders keeps what it
    /// promises by itself.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn sync(&self) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let own = File::from(openat(&self.descriptor, ".", flags, Mode::empty())?);
        match own.sync_all() {
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    }
}

/// A file by its folder, which is held open, and its name. There need not be one yet.
#[derive(Debug)]
pub struct Place {
    folder: Folder,
    name: OsString,
}

impl Place {
    /// The place of `path`: that of the file itself, where `path` is a link to one, so that the
    /// link stays when the file is replaced.
    ///
    /// # Errors
    /// When its folder cannot be opened, or its name is none.
    pub fn of(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let name = plain(path.file_name().unwrap_or_default())?.to_owned();
        Ok(Self { folder: Folder::of(&path)?, name })
    }

    /// Its folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Its name there.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// What it is called in messages.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// What the host knows of the file.
    ///
    /// # Errors
    /// As [`Folder::facts`].
    pub fn facts(&self) -> io::Result<FileStat> {
        self.folder.facts(&self.name)
    }

    /// Writes the whole file in one step.
    ///
    /// # Errors
    /// As [`Folder::replace`].
    pub fn replace(&self, content: &[u8]) -> io::Result<()> {
        self.folder.replace(&self.name, content)
    }
}

/// The folder in which `file` is.
pub fn parent(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Refuses what would lead out of a folder, or nowhere.
fn plain(name: &OsStr) -> io::Result<&OsStr> {
    let bytes = name.as_bytes();
    let is_plain = (1..=NAME_BYTES_MAX).contains(&bytes.len())
        && !matches!(bytes, b"." | b"..")
        && !bytes.iter().any(|byte| matches!(byte, b'/' | 0));
    let refused = || {
        let shown: String = name.to_string_lossy().chars().take(NAME_BYTES_MAX).collect();
        let text = format!(
            "{shown:?} is no file name: that has 1 to {NAME_BYTES_MAX} bytes, none of them '/' or \
             0, and is not '.' or '..'"
        );
        io::Error::new(ErrorKind::InvalidInput, text)
    };
    is_plain.then_some(name).ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_written_lies_in_the_folder_that_was_opened_wherever_that_is_now() {
        let around = tempfile::tempdir().unwrap();
        let [before, after] = ["before", "after"].map(|name| around.path().join(name));
        fs::create_dir(&before).unwrap();
        let folder = Folder::open(&before).unwrap();
        let place = Place::of(&before.join("report")).unwrap();
        fs::rename(&before, &after).unwrap();
        assert!(folder.is_at(&before), "nothing else is called so");
        // What has taken its name is another folder.
        fs::create_dir(&before).unwrap();
        assert!(folder.is_at(&after) && !folder.is_at(&before));

        folder.create_new("new".as_ref()).unwrap().write_all(b"n").unwrap();
        folder.link("new".as_ref(), "second".as_ref()).unwrap();
        folder.rename("new".as_ref(), "first".as_ref()).unwrap();
        place.replace(b"{}").unwrap();
        folder.sync().unwrap();
        let mut names = folder.names().unwrap();
        names.sort();
        assert_eq!(names, ["first", "report", "second"]);
        assert_eq!(place.facts().unwrap().st_size, 2);
        assert_eq!(fs::read(after.join("second")).unwrap(), b"n");
        folder.remove("second".as_ref()).unwrap();
        assert_eq!(fs::read_dir(&after).unwrap().count(), 2);
        assert_eq!(fs::read_dir(&before).unwrap().count(), 0);
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused_in_one_line() {
        let around = tempfile::tempdir().unwrap();
        let inside = around.path().join("inside");
        fs::create_dir(&inside).unwrap();
        fs::write(around.path().join("secret"), "s").unwrap();
        let folder = Folder::open(&inside).unwrap();
        let too_long = "x".repeat(256);
        for name in ["", ".", "..", "../secret", "/etc/passwd", "a/b", "a\0b", &too_long] {
            let name = OsStr::new(name);
            let good = OsStr::new("good");
            for refused in [
                folder.open_file(name).map(drop),
                folder.create_new(name).map(drop),
                folder.replace(name, b"x"),
                folder.rename(name, good),
                folder.rename(good, name),
                folder.link(name, good),
                folder.link(good, name),
                folder.remove(name),
                folder.facts(name).map(drop),
            ] {
                let error = refused.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidInput, "{name:?}");
                let said = error.to_string();
                assert!(said.contains("no file name") && !said.contains('\n'), "{said}");
            }
        }
        // A link to a file elsewhere is neither read nor written.
        symlink(around.path().join("secret"), inside.join("link")).unwrap();
        let link = OsStr::new("link");
        assert_eq!(folder.open_file(link).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        folder.create_new(link).unwrap_err();
        folder.replace(link, b"own").unwrap();
        assert_eq!(fs::read(around.path().join("secret")).unwrap(), b"s");
        assert_eq!(fs::read(inside.join("link")).unwrap(), b"own");
        folder.create_new(OsStr::new(&too_long[1..])).unwrap();
        let error = Place::of(Path::new("/")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }

    #[test]
    fn what_is_written_in_one_step_is_its_owners_and_never_half_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report");
        let place = Place::of(&path).unwrap();
        for before in [None, Some(0o644)] {
            if let Some(mode) = before {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            }
            // Of a process that was killed.
            let left = format!("report.{}.partial", std::process::id());
            fs::write(folder.path().join(left), "half").unwrap();
            place.replace(b"{}").unwrap();
            assert_eq!((mode(&path), fs::read(&path).unwrap()), (SECRET, b"{}".to_vec()));
        }
        // A folder cannot be replaced by a file.
        fs::create_dir(folder.path().join("folder")).unwrap();
        Place::of(&folder.path().join("folder")).unwrap().replace(b"{}").unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
    }

    #[test]
    fn a_link_to_a_file_stays_when_the_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let [file, link] = ["file", "link"].map(|name| folder.path().join(name));
        fs::write(&file, "old").unwrap();
        symlink(&file, &link).unwrap();
        Place::of(&link).unwrap().replace(b"new").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_folder_that_is_gone_takes_nothing() {
        let around = tempfile::tempdir().unwrap();
        let path = around.path().join("gone");
        let missing = Folder::open(&path).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        fs::write(&path, "a file").unwrap();
        assert_eq!(Folder::open(&path).unwrap_err().kind(), ErrorKind::NotADirectory);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let folder = Folder::open(&path).unwrap();
        fs::remove_dir(&path).unwrap();
        for error in [
            folder.create_new("x".as_ref()).unwrap_err(),
            folder.replace("x".as_ref(), b"x").unwrap_err(),
            folder.facts("x".as_ref()).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::NotFound);
        }
    }
}
