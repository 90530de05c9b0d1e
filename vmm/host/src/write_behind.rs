//! A file that a thread of its own writes, so that a disk or a server that hangs does not hold the
//! guest.
//!
//! The bytes that wait are bounded. When the buffer is full and the file still takes bytes, the
//! writer waits for room. When the file takes none for [`TIMEOUT`], it is given up and the writer
//! gets an error.

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::time::Duration;

use super::progress_timeout::ProgressTimeout;
use crate::contain::Thread;
use crate::profile::{self, Phase};
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait, wait_timeout};

/// What waits at most, in bytes.
const WAITING_BYTES_MAX: usize = 64 << 20;
/// What is written at once: each is progress.
const CHUNK_BYTES: usize = 1 << 20;
/// How long a file may take no bytes.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Writes to a file without waiting for it; [`Write::flush`] waits until everything is written.
pub struct WriteBehind {
    shared: Arc<Shared>,
    bytes_max: usize,
    timeout: Duration,
}

struct Shared {
    state: Mutex<WriteState>,
    changed: Condvar,
}

#[derive(Default)]
struct WriteState {
    waiting: Vec<u8>,
    /// Bytes the thread has taken and not written.
    under_way: usize,
    written_bytes: u64,
    failed: Option<Failure>,
    closed: bool,
}

/// An error that can be returned more than once.
#[derive(Clone)]
struct Failure {
    os: Option<i32>,
    kind: ErrorKind,
    text: String,
}

impl From<&io::Error> for Failure {
    fn from(error: &io::Error) -> Self {
        Self { os: error.raw_os_error(), kind: error.kind(), text: error.to_string() }
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        match failure.os {
            Some(code) => Self::from_raw_os_error(code),
            None => Self::new(failure.kind, failure.text),
        }
    }
}

impl WriteBehind {
    /// Starts the thread that writes to `file`; it ends when this is dropped and all is written.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start(file: impl Write + Send + 'static) -> io::Result<Self> {
        Self::with(file, WAITING_BYTES_MAX, TIMEOUT)
    }

    fn with(
        file: impl Write + Send + 'static,
        bytes_max: usize,
        timeout: Duration,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let writing = Arc::clone(&shared);
        Thread::Recording.start(move || writing.run(file))?;
        Ok(Self { shared, bytes_max, timeout })
    }

    /// Waits until `is_so`, as long as the file takes bytes.
    fn wait_until(
        &self,
        is_so: impl Fn(&WriteState) -> bool,
    ) -> io::Result<MutexGuard<'_, WriteState>> {
        let mut state = self.shared.lock();
        let mut progress = ProgressTimeout::new(self.timeout, state.written_bytes);
        loop {
            if let Some(failure) = &state.failed {
                return Err(failure.clone().into());
            }
            if is_so(&state) {
                return Ok(state);
            }
            let Some(left) = progress.left(state.written_bytes) else {
                let text = format!("it takes no bytes for {} s", self.timeout.as_secs_f32());
                state.fail(&io::Error::new(ErrorKind::TimedOut, text));
                continue;
            };
            state = wait_timeout(&self.shared.changed, state, left);
        }
    }
}

impl Write for WriteBehind {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let has_room = |state: &WriteState| {
            let pending = state.waiting.len() + state.under_way;
            pending == 0 || pending + bytes.len() <= self.bytes_max
        };
        self.wait_until(has_room)?.waiting.extend_from_slice(bytes);
        self.shared.changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wait_until(|state| state.waiting.is_empty() && state.under_way == 0).map(drop)
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl WriteState {
    fn fail(&mut self, error: &io::Error) {
        self.waiting = Vec::new();
        self.failed.get_or_insert_with(|| error.into());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, WriteState> {
        lock(&self.state)
    }

    fn run(&self, mut file: impl Write) {
        let _wait = profile::enter(Phase::Wait);
        let mut state = self.lock();
        while state.failed.is_none() {
            if state.waiting.is_empty() {
                if state.closed {
                    return;
                }
                state = wait(&self.changed, state);
                continue;
            }
            let taken = std::mem::take(&mut state.waiting);
            state.under_way = taken.len();
            for chunk in taken.chunks(CHUNK_BYTES) {
                drop(state);
                let _log = profile::enter(Phase::Log);
                let written = file.write_all(chunk);
                state = self.lock();
                state.under_way -= chunk.len();
                match written {
                    Ok(()) => state.written_bytes += chunk.len() as u64,
                    Err(error) => state.fail(&error),
                }
                self.changed.notify_all();
                if state.failed.is_some() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn everything_is_written_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let wanted: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let length = wanted.len();
        let reading = std::thread::spawn(move || {
            let mut read = vec![0; length];
            reader.read_exact(&mut read).unwrap();
            read
        });
        let file = File::from(OwnedFd::from(writer));
        let mut behind = WriteBehind::with(file, 10_000, Duration::MAX).unwrap();
        wanted.chunks(997).for_each(|piece| behind.write_all(piece).unwrap());
        behind.flush().unwrap();
        assert!(reading.join().unwrap() == wanted);
    }

    #[test]
    fn a_file_that_takes_nothing_is_given_up() {
        let (_reader, writer) = io::pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        let mut behind = WriteBehind::with(file, 1 << 20, Duration::from_millis(20)).unwrap();
        // More than a pipe holds; nobody waits for it.
        behind.write_all(&[0; 1 << 20]).unwrap();
        assert_eq!(behind.write(b"x").unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(behind.flush().unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn what_the_host_said_is_told_each_time() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(libc::ENOSPC))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut behind = WriteBehind::start(Full).unwrap();
        behind.write_all(b"x").unwrap();
        for _ in 0..2 {
            assert_eq!(behind.flush().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        }
    }
}
