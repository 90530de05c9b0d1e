//! Standard error. Every thread logs, some while they hold a lock that others need, so no thread
//! may wait for its reader.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::Duration;

use super::spool::Spool;
use crate::contain::Thread;

/// Far more than a run logs before it is read.
const BYTES_MAX: usize = 1 << 20;
/// How long the end waits for a reader that has stopped.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Static, because a panic hook has no object to reach it through.
static SPOOL: OnceLock<Spool> = OnceLock::new();

/// From now on a write to [`StandardError`] never waits.
///
/// # Errors
/// When the host has no descriptor or thread left.
pub fn spool_stderr() -> io::Result<()> {
    let out = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let spool = Spool::start(Thread::Stderr, out, BYTES_MAX)?;
    let _ = SPOOL.set(spool);
    Ok(())
}

/// Waits a short time until everything is written. Nothing may be written afterwards.
pub fn finish_stderr() {
    if let Some(spool) = SPOOL.get() {
        spool.finish(TIMEOUT);
    }
}

/// Bytes of log that were dropped.
pub fn stderr_dropped_bytes() -> u64 {
    SPOOL.get().map_or(0, Spool::dropped_bytes)
}

/// Writes this line behind what was written before.
pub fn say(line: &str) {
    let _ = StandardError.write_all(format!("{line}\n").as_bytes());
}

/// A writer to standard error.
#[derive(Clone, Copy, Debug, Default)]
pub struct StandardError;

impl Write for StandardError {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match SPOOL.get() {
            Some(spool) => {
                spool.push(bytes);
                Ok(bytes.len())
            }
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
