//! Files a user names: every option that takes a path goes through here.
//!
//! What is read must be a regular file: another process may never write to a FIFO, and a device
//! like `/dev/zero` has no end. What is written must be new, or empty, unless the user says that it
//! may be replaced; it is locked while it is written, is nobody else's to read where it holds a
//! guest's memory, and is no file that another option names ([`Named`]).

mod named;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use thiserror::Error;

pub use named::Named;

use crate::folder::{Folder, SECRET, parent};

/// A file that is written and ours until it is closed.
#[derive(Debug)]
pub struct Written(Flock<File>);

impl Written {
    /// A second handle on it, to sync it when all is written.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn handle(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self.0).flush()
    }
}

/// A file that is read, and that nobody writes until it is closed.
#[derive(Debug)]
pub struct Shared(Flock<File>);

impl Read for Shared {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(bytes)
    }
}

impl Seek for Shared {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        (&*self.0).seek(to)
    }
}

/// Why a file cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// The host refuses it.
    #[error("{what} '{path}': {cause}", path = path.display())]
    Host {
        /// What it is to be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// It is a folder, a pipe, a device or a socket.
    #[error("{what} '{path}' is {found}, no regular file", path = path.display())]
    NotRegular {
        /// What it is to be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// It has content.
    #[error(
        "{what} '{path}' is there already; name a new file, or add --overwrite to replace it",
        path = path.display()
    )]
    Exists {
        /// What it is to be.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Another process writes it.
    #[error("{what} '{path}' is being written by another ftvmm", path = path.display())]
    InUse {
        /// What it is to be.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// It is larger than what it is for.
    #[error("{what} '{path}' of {got_bytes} bytes does not fit: {limit}", path = path.display())]
    TooBig {
        /// What it is to be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its length.
        got_bytes: u64,
        /// Why not.
        limit: String,
    },
    /// It is a secret that is none.
    #[error(
        "{what} '{path}': every user may read or change it; run: chmod o= '{path}'",
        path = path.display()
    )]
    NoSecret {
        /// What it is to be.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Two options name one file, and one of them writes it.
    #[error(
        "{first} and {second} name the same file, '{path}', which would overwrite it",
        path = path.display()
    )]
    Same {
        /// One option.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// The second's path.
        path: PathBuf,
    },
}

fn host<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> FileError + 'a {
    move |cause| FileError::Host { what, path: path.into(), cause }
}

/// What a file that is not regular is.
fn kind(facts: &fs::Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let kind = facts.file_type();
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () if kind.is_block_device() => "a block device",
        () => "a device",
    }
}

fn regular(what: &'static str, path: &Path, file: &File) -> Result<fs::Metadata, FileError> {
    let facts = file.metadata().map_err(host(what, path))?;
    if facts.is_file() {
        return Ok(facts);
    }
    Err(FileError::NotRegular { what, path: path.into(), found: kind(&facts) })
}

/// Opens a regular file for reading. Never waits, as opening a pipe would.
///
/// # Errors
/// [`FileError`].
pub fn open(what: &'static str, path: &Path) -> Result<File, FileError> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(host(what, path))?;
    regular(what, path, &file)?;
    Ok(file)
}

/// Opens a file that ftvmm writes for reading, beside other readers but not while it is written.
///
/// # Errors
/// [`FileError`]; [`FileError::InUse`] while another process writes it.
pub fn open_shared(what: &'static str, path: &Path) -> Result<Shared, FileError> {
    let file = open(what, path)?;
    Flock::lock(file, FlockArg::LockSharedNonblock).map(Shared).map_err(|(_, e)| match e {
        Errno::EWOULDBLOCK => FileError::InUse { what, path: path.into() },
        e => host(what, path)(e.into()),
    })
}

/// Reads a regular file of at most `most_bytes`; `limit` says in words why not more.
///
/// # Errors
/// [`FileError`].
pub fn read(
    what: &'static str,
    path: &Path,
    most_bytes: u64,
    limit: &str,
) -> Result<Vec<u8>, FileError> {
    read_all(what, path, open(what, path)?, most_bytes, limit)
}

/// As [`read`], of the file `name` in `folder`.
///
/// # Errors
/// [`FileError`].
pub fn read_in(
    what: &'static str,
    folder: &Folder,
    name: &OsStr,
    most_bytes: u64,
    limit: &str,
) -> Result<Vec<u8>, FileError> {
    let path = folder.join(name);
    let file = folder.open_file(name).map_err(host(what, &path))?;
    regular(what, &path, &file)?;
    read_all(what, &path, file, most_bytes, limit)
}

fn read_all(
    what: &'static str,
    path: &Path,
    file: File,
    most_bytes: u64,
    limit: &str,
) -> Result<Vec<u8>, FileError> {
    let too_big = |got_bytes| {
        let limit = limit.to_owned();
        Err(FileError::TooBig { what, path: path.into(), got_bytes, limit })
    };
    let got_bytes = file.metadata().map_err(host(what, path))?.len();
    if got_bytes > most_bytes {
        return too_big(got_bytes);
    }
    // It may grow while it is read.
    let mut bytes = Vec::new();
    file.take(most_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(host(what, path))?;
    if bytes.len() as u64 > most_bytes {
        return too_big(bytes.len() as u64);
    }
    Ok(bytes)
}

/// As [`read`], where the file is refused that every user of the host may read or change.
///
/// # Errors
/// [`FileError`].
pub fn read_secret(
    what: &'static str,
    path: &Path,
    most_bytes: u64,
    limit: &str,
) -> Result<Vec<u8>, FileError> {
    let facts = open(what, path)?.metadata().map_err(host(what, path))?;
    if facts.permissions().mode() & 0o007 != 0 {
        return Err(FileError::NoSecret { what, path: path.into() });
    }
    read(what, path, most_bytes, limit)
}

/// A file to write, that is ours alone and only its owner's to read. It is new, or empty; or, with
/// `overwrite`, it was a regular file.
///
/// # Errors
/// [`FileError`]; nothing is lost then.
pub fn create(what: &'static str, path: &Path, overwrite: bool) -> Result<Written, FileError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(SECRET);
    let opened = options.custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(|cause| match fs::metadata(path) {
        // A pipe without a reader and a folder cannot be opened at all.
        Ok(facts) if !facts.is_file() => {
            FileError::NotRegular { what, path: path.into(), found: kind(&facts) }
        }
        _ => host(what, path)(cause),
    })?;
    take(what, path, file, overwrite)
}

/// As [`create`], of the file `name` in `folder`.
///
/// # Errors
/// [`FileError`]; nothing is lost then.
pub fn create_in(
    what: &'static str,
    folder: &Folder,
    name: &OsStr,
    overwrite: bool,
) -> Result<Written, FileError> {
    let path = folder.join(name);
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NONBLOCK;
    let file = folder.open_with(name, flags, SECRET).map_err(host(what, &path))?;
    take(what, &path, file, overwrite)
}

/// Makes an open file ours, and empty.
fn take(
    what: &'static str,
    path: &Path,
    file: File,
    overwrite: bool,
) -> Result<Written, FileError> {
    regular(what, path, &file)?;
    let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
        Errno::EWOULDBLOCK => FileError::InUse { what, path: path.into() },
        e => host(what, path)(e.into()),
    })?;
    let length = file.metadata().map_err(host(what, path))?.len();
    if length > 0 && !overwrite {
        return Err(FileError::Exists { what, path: path.into() });
    }
    file.set_len(0).map_err(host(what, path))?;
    file.set_permissions(fs::Permissions::from_mode(SECRET)).map_err(host(what, path))?;
    Ok(Written(file))
}

/// Refuses a path that [`Place::replace`](crate::folder::Place::replace) could not write: what can
/// be known before the guest has run.
///
/// # Errors
/// [`FileError`].
pub fn may_replace(what: &'static str, path: &Path, overwrite: bool) -> Result<(), FileError> {
    match fs::metadata(path) {
        Ok(facts) if !facts.is_file() => {
            Err(FileError::NotRegular { what, path: path.into(), found: kind(&facts) })
        }
        Ok(facts) if facts.len() > 0 && !overwrite => {
            Err(FileError::Exists { what, path: path.into() })
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let folder = fs::metadata(parent(path)).map_err(host(what, path))?;
            let not_a_folder = || io::Error::from(ErrorKind::NotADirectory);
            folder.is_dir().then_some(()).ok_or_else(not_a_folder).map_err(host(what, path))
        }
        Err(error) => Err(host(what, path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads it through its folder.
    fn in_folder(path: &Path) -> Result<Vec<u8>, FileError> {
        let folder = Folder::of(path).unwrap();
        read_in("witness", &folder, path.file_name().unwrap(), 10, "")
    }

    #[test]
    fn what_is_no_regular_file_is_named_and_never_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, found) in [
            (pipe.as_path(), "a pipe"),
            (folder.path(), "a directory"),
            (Path::new("/dev/zero"), "a device"),
        ] {
            let errors = [
                read("kernel", path, 10, "").unwrap_err(),
                create("recording", path, true).unwrap_err(),
                in_folder(path).unwrap_err(),
                may_replace("report", path, true).unwrap_err(),
            ];
            for error in errors.map(|e| e.to_string()) {
                assert!(error.contains(found), "{error}");
                assert!(error.contains(&path.display().to_string()), "{error}");
            }
        }
    }

    #[test]
    fn a_file_with_content_is_replaced_only_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.log");
        let mut file = create("recording", &path, false).unwrap();
        assert_eq!(file.0.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        file.write_all(b"precious").unwrap();
        let error = create("recording", &path, true).unwrap_err();
        assert!(matches!(error, FileError::InUse { .. }), "{error}");
        drop(file);
        let error = create("recording", &path, false).unwrap_err().to_string();
        assert!(error.contains("there already") && error.contains("--overwrite"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert!(may_replace("report", &path, false).is_err());
        may_replace("report", &path, true).unwrap();
        create("recording", &path, true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        create("recording", &path, false).unwrap();
    }

    #[test]
    fn a_file_that_is_written_has_one_writer_and_readers_have_no_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.log");
        let writer = create("recording", &path, false).unwrap();
        let error = open_shared("recording", &path).unwrap_err();
        assert!(matches!(error, FileError::InUse { .. }), "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        drop(writer);
        let readers = [(); 2].map(|()| open_shared("recording", &path).unwrap());
        let error = create("recording", &path, true).unwrap_err();
        assert!(matches!(error, FileError::InUse { .. }), "{error}");
        drop(readers);
        create("recording", &path, true).unwrap();
    }

    #[test]
    fn a_file_that_is_too_long_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("big");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let error = read("initramfs", &path, 1 << 20, "give more with --mem").unwrap_err();
        assert!(error.to_string().contains("1099511627776 bytes does not fit"), "{error}");
        let held = Folder::open(folder.path()).unwrap();
        let error = read_in("witness", &held, "big".as_ref(), 100, "it is a line").unwrap_err();
        assert!(error.to_string().contains("does not fit: it is a line"), "{error}");
        crate::folder::Place::of(&path).unwrap().replace(b"{}").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{}");
        assert_eq!(read_in("witness", &held, "big".as_ref(), 100, "").unwrap(), b"{}");
    }
}
