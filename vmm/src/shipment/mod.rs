//! The state of a running guest on its way to somewhere else: a backup that attaches, or a snapshot.
//!
//! ```text
//! sender thread   copy of memory ──parts──► Destination        looks, and at last a stop, asked of the vCPU
//! vCPU thread     TransferPort: looks at memory, stops at a slice or a HLT, hands over the rest
//! ```
//! What is sent while the guest runs is the tracker's copy of memory, which stands still between two looks at
//! memory; a page that a look finds changed is sent again. When few are left the guest is stopped, for as long as the
//! last look and the rest of the pages take.

mod blocks;
mod file;
mod inputs;
mod progress;
mod restored;
mod sender;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ftvmm_replication::{FileHeader, Ordinal as ExitOrdinal, SnapshotMark};

pub use blocks::put_on_disk;
pub use file::{SaveError, Saved, save};
pub use inputs::TransferPort;
pub use progress::{Gauge, Progress};
pub use restored::Restore;
pub use sender::{Shipped, rest_parts, ship};

use crate::disk::Disk;
use crate::host::clock::HostClock;
use crate::input::LiveQueue;
use crate::machine_state::MachineState;
use crate::page_tracker::PageTracker;

/// A page and its content.
pub use crate::page_tracker::PageImage;

/// The rest of a state, taken while the guest stood still.
pub struct Rest {
    /// Pages that have not been sent as they are.
    pub pages: Vec<PageImage>,
    /// Blocks of the disk, likewise.
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
    /// Takes a part while the guest runs; waits when it cannot take it yet. `false` when nobody wants the state any
    /// more.
    fn part(&self, part: ftvmm_replication::StatePart) -> bool;

    /// Takes the rest, on the vCPU's thread, while the guest stands still. What is returned is put into the guest's
    /// log, if it has one, at this very point.
    fn rest(&self, rest: Rest) -> Option<SnapshotMark>;
}

/// What the sender wants of the vCPU's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Wanted {
    Nothing = 0,
    /// A look at memory at the next exit, which renews the copy.
    Look = 1,
    /// The rest, as soon as the guest can be stopped.
    Rest = 2,
}

#[derive(Default)]
struct Meeting {
    destination: Option<Arc<dyn Destination>>,
    looked: bool,
    stopped_at: Option<ExitOrdinal>,
    stopped_ns: u64,
    /// The longest of the looks.
    look_ns: u64,
    /// The run is over: nothing is to be waited for.
    ended: bool,
}

/// Where the sender and the vCPU's thread meet. One state is shipped at a time.
pub struct Shipment {
    wanted: AtomicU8,
    meeting: Mutex<Meeting>,
    changed: Condvar,
    pages: Arc<Mutex<PageTracker>>,
    disk: Option<Arc<Disk>>,
    queue: Arc<LiveQueue>,
    clock: HostClock,
    header: FileHeader,
    /// Held while a snapshot is written.
    saving: Mutex<()>,
}

impl Shipment {
    /// Ships the guest whose memory `pages` tracks, with its disk, and whose vCPU waits at `queue`; `header` says which
    /// guest that is.
    pub fn new(
        pages: Arc<Mutex<PageTracker>>,
        disk: Option<Arc<Disk>>,
        queue: Arc<LiveQueue>,
        clock: HostClock,
        header: FileHeader,
    ) -> Self {
        Self {
            wanted: AtomicU8::new(Wanted::Nothing as u8),
            meeting: Mutex::default(),
            changed: Condvar::new(),
            pages,
            disk,
            queue,
            clock,
            header,
            saving: Mutex::default(),
        }
    }

    /// The guest has ended: nothing more is shipped, and a snapshot that was begun is complete or gone when this
    /// returns.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
        drop(self.saving.lock());
    }

    fn has_ended(&self) -> bool {
        self.lock().ended
    }

    fn wants(&self, what: Wanted) -> bool {
        self.wanted.load(Ordering::Acquire) == what as u8
    }

    fn want(&self, what: Wanted) {
        self.wanted.store(what as u8, Ordering::Release);
        if what != Wanted::Nothing {
            self.queue.attend();
        }
    }

    /// What was wanted is done. Something else may be wanted by now.
    fn done(&self, what: Wanted) {
        let nothing = Wanted::Nothing as u8;
        let _ =
            self.wanted.compare_exchange(what as u8, nothing, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether the guest is to be stopped now.
    pub fn wants_rest(&self) -> bool {
        self.wants(Wanted::Rest)
    }

    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pages(&self) -> MutexGuard<'_, PageTracker> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, at most so long; whether it is.
    fn wait_for(&self, longest: Duration, done: impl Fn(&Meeting) -> bool) -> bool {
        let meeting = self.lock();
        let waited = self.changed.wait_timeout_while(meeting, longest, |meeting| !done(meeting));
        let (meeting, _) = waited.unwrap_or_else(PoisonError::into_inner);
        done(&meeting)
    }
}
