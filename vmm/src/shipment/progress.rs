//! How far a state on its way is: for the status, and as a bar where somebody looks.

use ftvmm_replication::StatePart;
use indicatif::{ProgressBar, ProgressStyle};

use crate::host::clock::HostClock;
use crate::sync::{Mutex, MutexGuard, lock};

/// How far a shipment is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// 1 for the first pass over memory; on the receiver always 1.
    pub round: u32,
    /// Bytes of memory and disk so far.
    pub bytes: u64,
    /// Bytes it will be, as far as is known.
    pub total_bytes: u64,
    /// When it began, on the host's clock.
    pub since_ns: u64,
}

/// A progress that is looked at from several threads, with its bar.
pub struct Gauge {
    progress: Mutex<Progress>,
    bar: ProgressBar,
    clock: HostClock,
}

impl Gauge {
    /// A gauge at rest. The bar is on the standard error, when that is a terminal.
    pub fn new(clock: HostClock) -> Self {
        let bar = ProgressBar::hidden();
        let style =
            "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} round {msg}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Self { progress: Mutex::default(), bar, clock }
    }

    /// Begins; `what` is written in front of the bar.
    pub fn begin(&self, what: &'static str, total_bytes: u64) {
        let since_ns = self.clock.host_now_ns();
        *self.lock() = Progress { round: 1, bytes: 0, total_bytes, since_ns };
        tracing::info!(bytes = total_bytes, "{what}: memory is on its way");
        self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr_with_hz(5));
        self.bar.reset();
        self.bar.set_prefix(what);
        self.bar.set_message("1");
        self.bar.set_length(total_bytes);
    }

    /// A further round over memory begins, with so many bytes to send.
    pub fn next_round(&self, round: u32, more_bytes: u64) {
        let mut progress = self.lock();
        progress.round = round;
        progress.total_bytes += more_bytes;
        self.bar.set_message(round.to_string());
        self.bar.set_length(progress.total_bytes);
    }

    /// So many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        let mut progress = self.lock();
        progress.bytes += bytes;
        progress.total_bytes = progress.total_bytes.max(progress.bytes);
        self.bar.set_position(progress.bytes);
    }

    /// A part of a state has come.
    pub fn take(&self, part: &StatePart) {
        match part {
            StatePart::Outline { total_bytes } => self.begin("joining", *total_bytes),
            part => self.advance(part.content_bytes()),
        }
    }

    /// It is over; whether it went well others say.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }

    /// How far it is, and at what rate in bytes per second.
    pub fn read(&self) -> (Progress, u64) {
        let progress = *self.lock();
        let elapsed_ns = self.clock.host_now_ns().saturating_sub(progress.since_ns).max(1);
        let rate = u128::from(progress.bytes) * 1_000_000_000 / u128::from(elapsed_ns);
        (progress, rate as u64)
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }
}
