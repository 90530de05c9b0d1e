//! Creates the socket file (mode 0600), replaces one whose server is dead, refuses any other file,
//! and removes it at exit.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, listen, shutdown, socket,
};
use nix::sys::stat::{Mode, fchmod};
use thiserror::Error;

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("another ftvmm serves it; choose another path with --control")]
    InUse,
    /// It is something else.
    #[error("a file is there that is no socket; choose another path with --control")]
    NoSocket,
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
    path: PathBuf,
    /// Device and inode of the file: a later ftvmm may have replaced it.
    file: (u64, u64),
}

impl Socket {
    /// Listens at `path`.
    ///
    /// # Errors
    /// When a live ftvmm does already, or the host refuses.
    pub fn listen(path: &Path) -> Result<Self, SocketError> {
        remove_stale(path)?;
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // Before bind: Linux makes the file with the socket's own mode, so it is never open to
        // others (unix(7)).
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::MAXCONN)?;
        let found = fs::symlink_metadata(path)?;
        let listener = UnixListener::from(fd);
        Ok(Self { listener, path: path.into(), file: (found.dev(), found.ino()) })
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
        let is_ours = |found: fs::Metadata| (found.dev(), found.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
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
