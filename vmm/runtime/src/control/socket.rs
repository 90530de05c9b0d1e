//! Creates the socket file (mode 0600), replaces one whose server is dead, refuses any other file,
//! and removes it at exit, from the folder that it was made in.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use ftvmm_host::clock::sleep_ms;
use ftvmm_host::folder::{Place, parent};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, listen, shutdown, socket,
};
use nix::sys::stat::{Mode, fchmod};
use thiserror::Error;

/// How often a folder's lock is tried for.
const LOCK_TRIES: u32 = 100;
/// Between two tries, in milliseconds.
const LOCK_PAUSE_MS: u64 = 20;

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("another ftvmm serves it; choose another path with --control")]
    InUse,
    /// It is something else.
    #[error("a file is there that is no socket; choose another path with --control")]
    NoSocket,
    /// Another process has its folder locked.
    #[error("its folder stays locked by another process; choose another path with --control")]
    FolderLocked,
    /// The host refuses.
    #[error(transparent)]
    Host(#[from] io::Error),
}

impl From<nix::Error> for SocketError {
    fn from(error: nix::Error) -> Self {
        Self::Host(error.into())
    }
}

/// A socket that is listened on, and its file.
pub struct Socket {
    listener: UnixListener,
    place: Place,
    /// Device and inode of the file: a later ftvmm may have replaced it.
    file: (u64, u64),
}

impl Socket {
    /// Listens at `path`.
    ///
    /// # Errors
    /// When a live ftvmm does already, or the host refuses.
    pub fn listen(path: &Path) -> Result<Self, SocketError> {
        // Two that start at once would both find the dead one's socket, and the slower remove the
        // faster's. The lock is given back when this one listens.
        let _alone = lock_folder_of(path)?;
        remove_stale(path)?;
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // Before bind: Linux makes the file with the socket's own mode, so it is never open to
        // others (unix(7)).
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::MAXCONN)?;
        let found = fs::symlink_metadata(path)?;
        let (listener, place) = (UnixListener::from(fd), Place::of(path)?);
        Ok(Self { listener, place, file: (found.dev(), found.ino()) })
    }

    /// Waits for a client.
    ///
    /// # Errors
    /// When the host fails, or after [`Self::close`].
    pub fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept()?.0)
    }

    /// Takes no more clients and removes the file.
    pub fn close(&self) {
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        let Ok(found) = self.place.facts() else { return };
        if (found.st_dev, found.st_ino) == self.file {
            let _ = self.place.folder().remove(self.place.name());
        }
    }
}

/// Locks the folder of `path` against another ftvmm that makes a socket there. Does not wait for
/// long: others may lock a folder like `/tmp` too.
fn lock_folder_of(path: &Path) -> Result<Flock<File>, SocketError> {
    let mut folder = File::open(parent(path))?;
    for _ in 0..LOCK_TRIES {
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((back, Errno::EWOULDBLOCK)) => folder = back,
            Err((_, error)) => return Err(error.into()),
        }
        sleep_ms(LOCK_PAUSE_MS);
    }
    Err(SocketError::FolderLocked)
}

/// Removes a socket nobody listens on.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NoSocket),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(fs::remove_file(path)?),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_live_socket_is_left_alone_and_a_dead_one_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let first = Socket::listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Socket::listen(&path), Err(SocketError::InUse)));
        // As a killed ftvmm leaves it.
        drop(first.listener);
        assert!(path.exists());
        let second = Socket::listen(&path).unwrap();
        second.close();
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::listen(&path), Err(SocketError::NoSocket)));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn of_many_that_start_at_once_one_serves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        for _ in 0..20 {
            // As a killed ftvmm leaves it.
            drop(Socket::listen(&path).unwrap().listener);
            let started: Vec<_> = std::thread::scope(|scope| {
                let start = || Socket::listen(&path);
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let (serving, refused): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
            assert_eq!(serving.len(), 1);
            for refused in refused {
                assert!(matches!(refused, Err(SocketError::InUse)));
            }
            assert!(UnixStream::connect(&path).is_ok());
        }
    }

    #[test]
    fn another_ones_file_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let first = Socket::listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Socket::listen(&path).unwrap();
        first.close();
        assert!(UnixStream::connect(&path).is_ok());
        second.close();
        assert!(!path.exists());
    }
}
