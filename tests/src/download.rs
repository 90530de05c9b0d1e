//! A real client: curl downloads from the guest, and we watch the bytes arrive.

use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use sha2::{Digest, Sha256};

use crate::Program;
use crate::clock;
use crate::lab::{Lab, LabError, at};

/// How often is looked how far a download in the background has come.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A download under way.
pub struct Download {
    curl: Child,
    started: Instant,
    hash: Sha256,
    bytes: u64,
    first: Option<Duration>,
    last: Duration,
    longest_stall: Duration,
}

/// A download that ended.
#[derive(Clone, Debug)]
pub struct Downloaded {
    /// What curl ended with; 0 is success.
    pub status: i32,
    /// Bytes received.
    pub bytes: u64,
    /// SHA-256 of them.
    pub sha256: [u8; 32],
    /// From the request to the end.
    pub total: Duration,
    /// Longest time without a byte after the first one.
    pub longest_stall: Duration,
}

impl Download {
    /// Starts curl on `url` in the clients' network.
    ///
    /// # Errors
    /// When curl cannot be started.
    pub fn start(lab: &Lab, url: &str) -> Result<Self, LabError> {
        let curl = lab
            .client(Program::Curl, &["--silent", "--show-error", "--no-buffer"])?
            .args(["--speed-limit", "1", "--speed-time", "60", "--connect-timeout", "30", url])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(at("curl"))?;
        Ok(Self {
            curl,
            started: clock::now(),
            hash: Sha256::new(),
            bytes: 0,
            first: None,
            last: Duration::ZERO,
            longest_stall: Duration::ZERO,
        })
    }

    /// Reads until at least `through` bytes have arrived or the download ended; the bytes so far.
    ///
    /// # Errors
    /// When the pipe breaks.
    pub fn read_through(
        &mut self,
        through: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<u64, LabError> {
        let mut buffer = vec![0; 64 * 1024];
        let mut pipe = self.curl.stdout.take();
        while let Some(stdout) = &mut pipe
            && self.bytes < through
        {
            let count = stdout.read(&mut buffer).map_err(at("curl"))?;
            if count == 0 {
                break;
            }
            let now = clock::now() - self.started;
            if self.first.replace(self.first.unwrap_or(now)).is_some() {
                self.longest_stall = self.longest_stall.max(now - self.last);
            }
            self.last = now;
            self.hash.update(&buffer[..count]);
            self.bytes += count as u64;
            progress(self.bytes);
        }
        self.curl.stdout = pipe;
        Ok(self.bytes)
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// When the pipe breaks.
    pub fn finish(mut self, progress: impl FnMut(u64)) -> Result<Downloaded, LabError> {
        self.read_through(u64::MAX, progress)?;
        let status = self.curl.wait().map_err(at("curl"))?;
        Ok(Downloaded {
            status: status.code().unwrap_or(-1),
            bytes: self.bytes,
            sha256: std::mem::take(&mut self.hash).finalize().into(),
            total: clock::now() - self.started,
            longest_stall: self.longest_stall,
        })
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let _ = self.curl.kill();
        let _ = self.curl.wait();
    }
}

/// A download that goes on while the test does other things.
pub struct Background {
    client: JoinHandle<Result<Downloaded, LabError>>,
    arrived_bytes: Arc<AtomicU64>,
}

impl Download {
    /// Downloads the rest on a thread of its own.
    pub fn in_background(self) -> Background {
        let arrived_bytes = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&arrived_bytes);
        let client =
            thread::spawn(move || self.finish(|bytes| counted.store(bytes, Ordering::Relaxed)));
        Background { client, arrived_bytes }
    }
}

impl Background {
    /// Bytes that have arrived so far.
    pub fn arrived_bytes(&self) -> u64 {
        self.arrived_bytes.load(Ordering::Relaxed)
    }

    /// It has ended.
    pub fn is_over(&self) -> bool {
        self.client.is_finished()
    }

    /// Waits until so many bytes have arrived or it is over.
    pub fn wait_for_bytes(&self, bytes: u64) {
        while self.arrived_bytes() < bytes && !self.is_over() {
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// What [`Download::finish`] says, or that its thread panicked.
    pub fn finish(self) -> Result<Downloaded, Failed> {
        Ok(self.client.join().map_err(|_| "the client panicked")??)
    }
}
