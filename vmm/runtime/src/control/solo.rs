//! Answers for a guest that runs alone.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ftvmm_devices::Input;
use ftvmm_host::clock::HostClock;
use ftvmm_host::folder::{Folder, Place};
use ftvmm_host::{Console, Tap};

use super::operator::{ControlRole, Operator, Refused, SnapshotSummary, Status};
use crate::input::InputQueue;
use crate::transfer::{ProgressCell, Transfer, save};

/// Answers for a guest without another host.
pub struct SoloOperator {
    /// The run's live inputs.
    pub queue: Arc<InputQueue>,
    /// Frames the guest sent.
    pub outputs: Arc<AtomicU64>,
    /// Where the guest prints.
    pub console: Arc<Console>,
    /// The guest's tap, if it has a network card.
    pub tap: Option<Tap>,
    /// The recording, if one is written.
    pub recording: Option<Place>,
    /// Where snapshots go.
    pub snapshots: Folder,
    /// Started with this ftvmm.
    pub clock: HostClock,
    /// The means to send the guest's state, once it has started.
    pub transfer: Arc<OnceLock<Arc<Transfer>>>,
    /// How far a snapshot is.
    pub progress: ProgressCell,
}

/// Whether clients reach the guest over this tap, in a word, or why not.
pub fn link(tap: &Tap) -> String {
    tap.why_down().unwrap_or_else(|| "up".into())
}

impl Operator for SoloOperator {
    fn status(&self) -> Status {
        let recorded = self.recording.as_ref().and_then(|place| place.facts().ok());
        Status {
            role: ControlRole::Solo,
            state: "Running".into(),
            transmits: true,
            exit: self.queue.last_exit(),
            stuck_ms: self.queue.pulse().stuck_ns().map(|ns| ns / 1_000_000),
            outputs: self.outputs.load(Ordering::Relaxed),
            network: self.queue.network().report(),
            log_bytes: recorded.map_or(0, |file| file.st_size.max(0) as u64),
            link: self.tap.as_ref().map(link),
            console_dropped_bytes: self.console.dropped_bytes(),
            uptime_ms: self.clock.host_now_ns() / 1_000_000,
            ..Status::default()
        }
    }

    fn snapshot(&self, path: &Path) -> Result<SnapshotSummary, Refused> {
        match self.transfer.get() {
            Some(transfer) => Ok(save(transfer, &self.progress, &self.snapshots, path)?.into()),
            None => Err(Refused::not_now("the guest has not started yet")),
        }
    }

    fn stop(&self) -> Result<(), Refused> {
        self.queue.shut_down();
        Ok(())
    }

    fn nmi(&self) -> Result<(), Refused> {
        self.queue.push_signal(Input::Nmi);
        Ok(())
    }
}
