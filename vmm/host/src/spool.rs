//! A buffer for a reader that may have stopped reading: a terminal stopped by Ctrl-S, a full pipe.
//!
//! A writer never waits. Bytes that do not fit the bounded buffer are dropped and counted; a thread
//! of its own writes the rest, in order.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};

use super::progress_timeout::ProgressTimeout;
use crate::contain::Thread;
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait, wait_timeout};

/// Bytes written at a time.
const CHUNK_BYTES: usize = 64 << 10;

#[derive(Default)]
struct SpoolState {
    waiting: Vec<u8>,
    /// The thread has taken bytes that are not out yet.
    writing: bool,
    written_bytes: u64,
    dropped_bytes: u64,
    /// Why no more can be written.
    closed: Option<String>,
}

struct Shared {
    bytes_max: usize,
    state: Mutex<SpoolState>,
    /// There is something to write, or less of it.
    changed: Condvar,
}

/// What became of bytes that were handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// They will be written.
    Whole,
    /// There was no room; so many have been dropped so far.
    Dropped {
        /// These included.
        in_all_bytes: u64,
    },
    /// The reader has gone.
    Closed {
        /// The host's error.
        why: String,
    },
}

/// The buffer and its thread, which lives as long as the process: a blocking write cannot be taken
/// back.
#[derive(Clone)]
pub struct Spool(Arc<Shared>);

impl Spool {
    /// A buffer of `bytes_max` in front of `out`; `thread` is which one writes.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start(thread: Thread, out: File, bytes_max: usize) -> io::Result<Self> {
        let state = Mutex::default();
        let shared = Arc::new(Shared { bytes_max, state, changed: Condvar::new() });
        let worker = Arc::clone(&shared);
        // The thread inherits the mask. Signals are for others, who may not have asked for them
        // yet; and a background process may write to its terminal when it blocks SIGTTOU
        // (tcsetattr(3p), general terminal interface), where `stty tostop` would stop the
        // whole process.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let spawned = thread.start(move || worker.write_on(&out));
        before.thread_set_mask()?;
        spawned?;
        Ok(Self(shared))
    }

    /// Hands bytes over: all of them or none, so that a line is never cut.
    pub fn push(&self, bytes: &[u8]) -> Taken {
        let mut state = self.0.lock();
        if let Some(why) = &state.closed {
            let why = why.clone();
            state.dropped_bytes += bytes.len() as u64;
            return Taken::Closed { why };
        }
        if state.waiting.len() + bytes.len() > self.0.bytes_max {
            state.dropped_bytes += bytes.len() as u64;
            return Taken::Dropped { in_all_bytes: state.dropped_bytes };
        }
        state.waiting.extend_from_slice(bytes);
        drop(state);
        self.0.changed.notify_all();
        Taken::Whole
    }

    /// Bytes that were dropped.
    pub fn dropped_bytes(&self) -> u64 {
        self.0.lock().dropped_bytes
    }

    /// Waits until everything is written. Gives up when nothing has been written for `timeout`;
    /// the rest then counts as dropped, and no more bytes are taken.
    pub fn finish(&self, timeout: Duration) {
        let mut state = self.0.lock();
        let mut progress = ProgressTimeout::new(timeout, state.written_bytes);
        while state.closed.is_none() && (state.writing || !state.waiting.is_empty()) {
            // A writer wakes this thread too, which does not mean that a reader takes bytes.
            let Some(left) = progress.left(state.written_bytes) else {
                return state.close("nobody reads it");
            };
            state = wait_timeout(&self.0.changed, state, left);
        }
    }
}

impl SpoolState {
    fn close(&mut self, why: &str) {
        self.dropped_bytes += self.waiting.len() as u64;
        self.waiting.clear();
        self.closed.get_or_insert_with(|| why.to_owned());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, SpoolState> {
        lock(&self.state)
    }

    fn write_on(&self, out: &File) {
        let mut chunk = Vec::new();
        loop {
            let mut state = self.lock();
            while state.waiting.is_empty() {
                state = wait(&self.changed, state);
            }
            chunk.clear();
            let count = state.waiting.len().min(CHUNK_BYTES);
            chunk.extend(state.waiting.drain(..count));
            state.writing = true;
            drop(state);
            let result = self.write_chunk(out, &chunk);
            let mut state = self.lock();
            state.writing = false;
            if let Err((error, lost_bytes)) = result {
                state.dropped_bytes += lost_bytes as u64;
                state.close(&error.to_string());
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Writes it all, or says how much is left.
    fn write_chunk(&self, mut out: &File, mut chunk: &[u8]) -> Result<(), (io::Error, usize)> {
        while !chunk.is_empty() {
            match out.write(chunk) {
                Ok(0) => return Err((ErrorKind::WriteZero.into(), chunk.len())),
                Ok(count) => {
                    chunk = &chunk[count..];
                    self.lock().written_bytes += count as u64;
                    self.changed.notify_all();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The descriptor was non-blocking when this process got it.
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(out.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut fds, PollTimeout::NONE);
                }
                Err(e) => return Err((e, chunk.len())),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(20);

    fn spool(bytes_max: usize) -> (Spool, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let out = File::from(OwnedFd::from(writer));
        (Spool::start(Thread::Stderr, out, bytes_max).unwrap(), reader)
    }

    #[test]
    fn who_reads_gets_everything_in_order() {
        let (spool, mut reader) = spool(1 << 20);
        let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let wanted = sent.len();
        let reading = std::thread::spawn(move || {
            let mut read = vec![0; wanted];
            reader.read_exact(&mut read).unwrap();
            read
        });
        for piece in sent.chunks(997) {
            assert_eq!(spool.push(piece), Taken::Whole);
        }
        assert!(reading.join().unwrap() == sent);
        spool.finish(TIMEOUT);
        assert_eq!(spool.dropped_bytes(), 0);
    }

    /// As [`spool`], with a pipe that is full.
    fn unread(bytes_max: usize) -> (Spool, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut out = File::from(OwnedFd::from(writer));
        while out.write(b".").is_ok() {}
        fcntl(&out, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        (Spool::start(Thread::Stderr, out, bytes_max).unwrap(), reader)
    }

    #[test]
    fn who_does_not_read_holds_nobody_up_and_what_is_dropped_is_counted() {
        let (spool, _reader) = unread(4096);
        let piece = [b'x'; 1000];
        let mut sent_bytes = 0;
        // Nothing here waits for the reader.
        let dropped_bytes = loop {
            sent_bytes += piece.len() as u64;
            if let Taken::Dropped { in_all_bytes } = spool.push(&piece) {
                break in_all_bytes;
            }
        };
        assert_eq!(dropped_bytes, 1000);
        spool.finish(TIMEOUT);
        assert!(matches!(spool.push(&piece), Taken::Closed { .. }));
        sent_bytes += piece.len() as u64;
        // What the thread holds may still be read.
        let lost_bytes = spool.dropped_bytes();
        assert!((2000..=sent_bytes).contains(&lost_bytes), "{lost_bytes} of {sent_bytes}");
    }

    /// What is added to what waits is no sign that somebody reads: else this test would not end.
    #[test]
    fn who_writes_on_does_not_keep_the_end_waiting() {
        let (spool, _reader) = unread(1 << 20);
        assert_eq!(spool.push(b"nobody reads this"), Taken::Whole);
        let writer = spool.clone();
        let writing = std::thread::spawn(move || while writer.push(b"") == Taken::Whole {});
        spool.finish(TIMEOUT);
        writing.join().unwrap();
    }

    #[test]
    fn a_closed_pipe_is_no_reason_to_wait() {
        let (spool, reader) = spool(4096);
        drop(reader);
        spool.push(b"x");
        spool.finish(Duration::from_secs(600));
        let Taken::Closed { why } = spool.push(b"yz") else { panic!("still open") };
        assert!(why.contains("pipe"), "{why}");
        assert_eq!(spool.dropped_bytes(), 3);
    }
}
