//! Sends the whole state of a running guest: to a backup that attaches, or into a snapshot.
//!
//! ```text
//! sender thread   copy of memory ──parts──► Destination;  asks for dirty syncs, then for the stop
//! vCPU thread     TransferPort: dirty sync, stop at a slice or a HLT, FinalState ──► Destination
//! ```
//! While the guest runs (pre-copy), the tracker's copy of memory is sent. It changes only at a
//! dirty sync, and a page that a sync finds changed is sent again. When few pages are left, the
//! guest is stopped for one last sync and the pages that are left (stop-and-copy).

mod blocks;
mod file;
mod port;
mod progress;
mod rendezvous;
mod restored;
mod sender;

use std::sync::{Arc, OnceLock};

use ftvmm_replication::{FileHeader, SnapshotMark};

pub use blocks::put_on_disk;
pub use file::{SaveError, Saved, save};
pub use port::TransferPort;
pub use progress::{Progress, ProgressCell, ProgressDisplay};
pub use restored::Restore;
pub use sender::{TransferSummary, final_parts, send_state};

use ftvmm_host::clock::HostClock;
use ftvmm_host::disk::Disk;
use ftvmm_host::sync::{self, Mutex};
use ftvmm_machine::machine_state::MachineState;
use ftvmm_machine::page_tracker::MemoryCopy;

use crate::input::InputQueue;
use rendezvous::Rendezvous;

/// A page and its content.
pub use ftvmm_machine::page_tracker::PageImage;

/// What stop-and-copy sends: the part of a state that was taken while the guest stood still.
pub struct FinalState {
    /// Pages that have not been sent as they are.
    pub pages: Vec<PageImage>,
    /// Blocks of the disk that have not been sent as they are.
    pub blocks: Vec<BlockImage>,
    /// The machine.
    pub machine: MachineState,
    /// The guest's requests to its disk up to this one are carried out.
    pub disk_through: u64,
}

/// A block of the disk and its content.
pub type BlockImage = (u64, Vec<u8>);

/// Where a state goes.
pub trait Destination: Send + Sync {
    /// Takes a part while the guest runs; waits when it cannot take it yet. Returns `false` when
    /// the transfer was cancelled.
    fn part(&self, part: ftvmm_replication::StatePart) -> bool;

    /// Takes what is left, on the vCPU's thread, while the guest stands still. What is returned is
    /// put into the guest's log, if it has one, at this very point.
    fn finish(&self, last: FinalState) -> Option<SnapshotMark>;
}

/// Wakes the vCPU's thread.
type Wake = Box<dyn Fn() + Send + Sync>;

/// What the sender and the vCPU's thread share. Only one state is sent at a time.
pub struct Transfer {
    rendezvous: Rendezvous<Arc<dyn Destination>>,
    copy: Arc<MemoryCopy>,
    disk: Option<Arc<Disk>>,
    queue: Arc<InputQueue>,
    /// Where else the vCPU's thread may wait.
    wakes: OnceLock<Wake>,
    clock: HostClock,
    header: FileHeader,
    /// Held while a snapshot is written.
    saving: Mutex<()>,
}

impl Transfer {
    /// A transfer for the guest with this `copy` of memory and this disk, whose vCPU thread waits
    /// at `queue`; `header` identifies the guest.
    pub fn new(
        copy: Arc<MemoryCopy>,
        disk: Option<Arc<Disk>>,
        queue: Arc<InputQueue>,
        clock: HostClock,
        header: FileHeader,
    ) -> Self {
        Self {
            rendezvous: Rendezvous::new(),
            copy,
            disk,
            queue,
            wakes: OnceLock::new(),
            clock,
            header,
            saving: Mutex::default(),
        }
    }

    /// Sets how to wake a vCPU thread that also waits elsewhere, where it checks
    /// [`Self::wants_stop`]. `wake` is called when the request has changed, so it must take the
    /// lock under which the thread checks before it notifies.
    pub fn wakes_with(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wakes.set(Box::new(wake));
    }

    /// Wakes the vCPU thread, whether it waits or runs the guest.
    fn wake(&self) {
        self.queue.request_attention();
        if let Some(wake) = self.wakes.get() {
            wake();
        }
    }

    /// The guest has ended: nothing more is sent, and a snapshot that was begun is complete or
    /// gone when this returns.
    pub fn end(&self) {
        self.rendezvous.end();
        drop(sync::lock(&self.saving));
    }

    fn has_ended(&self) -> bool {
        self.rendezvous.has_ended()
    }

    /// Whether the guest is to be stopped now.
    pub fn wants_stop(&self) -> bool {
        self.rendezvous.wants(rendezvous::TransferRequest::StopAndCopy)
    }
}

#[cfg(test)]
pub(crate) mod tests;
