//! How far a transfer is: for the status, and for a progress bar.

use ftvmm_host::clock::HostClock;
use ftvmm_host::sync::{Mutex, MutexGuard, lock};
use ftvmm_replication::{HostNs, StatePart};

/// How far a transfer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// 1 for the first pass over memory; on the receiver always 1.
    pub iteration: u32,
    /// Bytes of memory and disk so far.
    pub bytes: u64,
    /// Bytes it will be, as far as is known.
    pub total_bytes: u64,
    /// When it began.
    pub since: HostNs,
}

impl Progress {
    fn begin(total_bytes: u64, since: HostNs) -> Self {
        Self { iteration: 1, bytes: 0, total_bytes, since }
    }

    fn next_iteration(&mut self, iteration: u32, more_bytes: u64) {
        self.iteration = iteration;
        self.total_bytes += more_bytes;
    }

    fn advance(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.total_bytes = self.total_bytes.max(self.bytes);
    }

    /// Bytes per second until `now`.
    fn rate(&self, now: HostNs) -> u64 {
        let elapsed_ns = now.since_ns(self.since).max(1);
        (u128::from(self.bytes) * 1_000_000_000 / u128::from(elapsed_ns)) as u64
    }
}

/// Displays the progress of a transfer. Called from several threads.
pub trait ProgressDisplay: Send + Sync {
    /// A transfer begins; `what` says which.
    fn begin(&self, what: &'static str, progress: &Progress);

    /// It got so far.
    fn show(&self, progress: &Progress);

    /// It is over.
    fn end(&self);
}

/// A progress that several threads read and change.
pub struct ProgressCell {
    progress: Mutex<Progress>,
    display: Box<dyn ProgressDisplay>,
    clock: HostClock,
}

impl ProgressCell {
    /// No transfer yet; shown on `display`.
    pub fn new(clock: HostClock, display: Box<dyn ProgressDisplay>) -> Self {
        Self { progress: Mutex::default(), display, clock }
    }

    /// A transfer begins; `what` names it on the display.
    pub fn begin(&self, what: &'static str, total_bytes: u64) {
        let progress = Progress::begin(total_bytes, self.clock.host_now());
        *self.lock() = progress;
        tracing::info!(bytes = total_bytes, "{what}: transferring memory");
        self.display.begin(what, &progress);
    }

    /// A further iteration over memory begins, with so many bytes to send.
    pub fn next_iteration(&self, iteration: u32, more_bytes: u64) {
        let mut progress = self.lock();
        progress.next_iteration(iteration, more_bytes);
        self.display.show(&progress);
    }

    /// So many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        let mut progress = self.lock();
        progress.advance(bytes);
        self.display.show(&progress);
    }

    /// A part of a state has come.
    pub fn take(&self, part: &StatePart) {
        match part {
            StatePart::Outline { total_bytes } => self.begin("joining", *total_bytes),
            part => self.advance(part.content_bytes()),
        }
    }

    /// The transfer is over, successful or not.
    pub fn end(&self) {
        self.display.end();
    }

    /// How far it is, and at what rate in bytes per second.
    pub fn read(&self) -> (Progress, u64) {
        let progress = *self.lock();
        (progress, progress.rate(self.clock.host_now()))
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_progress_is_never_beyond_its_total() {
        let mut progress = Progress::begin(100, HostNs(5));
        progress.advance(60);
        progress.next_iteration(2, 20);
        assert_eq!((progress.iteration, progress.bytes, progress.total_bytes), (2, 60, 120));
        progress.advance(70);
        assert_eq!((progress.bytes, progress.total_bytes), (130, 130));
    }

    #[test]
    fn the_rate_is_since_the_beginning() {
        let mut progress = Progress::begin(0, HostNs(1_000_000_000));
        progress.advance(3000);
        assert_eq!(progress.rate(HostNs(3_000_000_000)), 1500);
        assert_eq!(progress.rate(HostNs(0)), 3000 * 1_000_000_000);
    }
}
