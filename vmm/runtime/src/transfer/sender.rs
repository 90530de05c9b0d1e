//! The sender: carries out the schedule of a transfer ([`PreCopy`]).

use std::sync::Arc;

use ftvmm_replication::state::{BLOCK_BYTES, PART_BLOCKS_MAX, PART_PAGES_MAX, pack};
use ftvmm_replication::transfer::{DirtySync, PreCopy, PreCopyStep, STOP_WAIT, SYNC_WAIT};
use ftvmm_replication::{HostNs, Ordinal, PAGE_BYTES, StatePart};

use super::blocks::{all_blocks, block_parts, read_blocks};
use super::rendezvous::Stop;
use super::{Destination, FinalState, PageImage, ProgressCell, Transfer};

/// Memory that is copied once to see how fast this host does it.
const SAMPLE_BYTES: usize = 8 << 20;

/// How a transfer went.
#[derive(Clone, Copy, Debug)]
pub struct TransferSummary {
    /// The exit the guest stood at.
    pub at: Ordinal,
    /// Iterations of pre-copy.
    pub iterations: u32,
    /// Bytes of memory and disk.
    pub bytes: u64,
    /// How long it took, in nanoseconds.
    pub took_ns: u64,
    /// The longest time the guest stood still, for a dirty sync or at the end, in nanoseconds.
    pub stopped_ns: u64,
    /// What one copy of all its memory takes on this host, in nanoseconds, from a sample.
    pub memory_copy_ns: u64,
}

/// What stop-and-copy sends, without the machine, as parts.
pub fn final_parts(last: &FinalState) -> impl Iterator<Item = StatePart> {
    page_parts(&last.pages).chain(block_parts(&last.blocks))
}

/// Packs pages into parts.
fn page_parts(pages: &[PageImage]) -> impl Iterator<Item = StatePart> {
    pages.chunks(PART_PAGES_MAX).map(|pages| {
        let items = pages.iter().map(|(page, content)| (*page, content.as_slice()));
        StatePart::Pages(pack(items))
    })
}

/// Sends the guest's state to `destination` while the guest runs; `None` when the transfer was
/// cancelled. `progress` shows how far it is. Blocks; one at a time.
pub fn send_state(
    transfer: &Transfer,
    destination: Arc<dyn Destination>,
    progress: &ProgressCell,
) -> Option<TransferSummary> {
    let started = transfer.clock.host_now();
    let summary = Sender { transfer, destination, progress }.run(started);
    progress.end();
    if summary.is_none() {
        transfer.copy.end_transfer();
        if let Some(disk) = &transfer.disk {
            disk.note_changes(false);
        }
    }
    summary
}

struct Sender<'a> {
    transfer: &'a Transfer,
    destination: Arc<dyn Destination>,
    progress: &'a ProgressCell,
}

impl Sender<'_> {
    fn run(self, started: HostNs) -> Option<TransferSummary> {
        let blocks = self.begin()?;
        let iterations = self.pre_copy(blocks)?;
        let bytes = self.progress.read().0.bytes;
        let rendezvous = &self.transfer.rendezvous;
        let Stop { at, stopped_ns } =
            rendezvous.stop(self.destination.clone(), STOP_WAIT, || self.transfer.wake())?;
        let took_ns = self.transfer.clock.host_now().since_ns(started);
        let stopped_ns = stopped_ns.max(rendezvous.sync_ns());
        let memory_copy_ns = self.time_a_copy();
        Some(TransferSummary { at, iterations, bytes, took_ns, stopped_ns, memory_copy_ns })
    }

    /// Begins to track changes; all blocks of the disk.
    fn begin(&self) -> Option<Vec<u64>> {
        self.transfer.rendezvous.begin();
        let mut total_bytes = self.transfer.copy.begin_transfer() * PAGE_BYTES as u64;
        let mut blocks = Vec::new();
        if let Some(disk) = &self.transfer.disk {
            disk.note_changes(true);
            blocks = all_blocks(disk);
            total_bytes += disk.size_bytes();
        }
        self.progress.begin("sending", total_bytes);
        self.destination.part(StatePart::Outline { total_bytes }).then_some(blocks)
    }

    /// Sends memory and `blocks` while the guest runs, until it is to be stopped; returns how many
    /// iterations that took.
    fn pre_copy(&self, mut blocks: Vec<u64>) -> Option<u32> {
        let mut schedule = PreCopy::default();
        loop {
            self.send_blocks(&blocks)?;
            self.send_unsent()?;
            let sync;
            (sync, blocks) = self.sync();
            match schedule.next(sync) {
                PreCopyStep::Iteration { number, bytes } => {
                    self.progress.next_iteration(number, bytes)
                }
                PreCopyStep::StopAndCopy => {
                    self.send_blocks(&blocks)?;
                    return Some(schedule.iteration());
                }
            }
        }
    }

    /// What the guest has changed by its next exit, and which blocks of the disk that is.
    fn sync(&self) -> (DirtySync, Vec<u64>) {
        if !self.transfer.rendezvous.dirty_sync(SYNC_WAIT, || self.transfer.wake()) {
            return (DirtySync::NoExit, Vec::new());
        }
        let pages = self.transfer.copy.unsent_pages();
        let blocks = self.transfer.disk.as_ref().map_or_else(Vec::new, |disk| disk.take_changed());
        (DirtySync::Dirty { pages, blocks: blocks.len() as u64 }, blocks)
    }

    /// How long a copy of all memory would take, from a sample.
    fn time_a_copy(&self) -> u64 {
        let mut sample = vec![1; SAMPLE_BYTES];
        let began = self.transfer.clock.host_now();
        let (copied, all) = self.transfer.copy.sample(&mut sample);
        std::hint::black_box(&sample);
        let took_ns = self.transfer.clock.host_now().since_ns(began);
        (u128::from(took_ns) * u128::from(all) / u128::from(copied.max(1))) as u64
    }

    /// Sends blocks of the disk.
    fn send_blocks(&self, blocks: &[u64]) -> Option<()> {
        let Some(disk) = &self.transfer.disk else { return Some(()) };
        for some in blocks.chunks(PART_BLOCKS_MAX) {
            let read = read_blocks(disk, some)
                .inspect_err(|error| tracing::error!(%error, "the disk cannot be copied"))
                .ok()?;
            if !block_parts(&read).all(|part| self.destination.part(part)) {
                return None;
            }
            self.progress.advance((some.len() * BLOCK_BYTES) as u64);
        }
        Some(())
    }

    /// Sends what has to be sent, until nothing is left.
    fn send_unsent(&self) -> Option<()> {
        loop {
            let pages = self.transfer.copy.take_unsent(PART_PAGES_MAX);
            if pages.is_empty() {
                return Some(());
            }
            if !page_parts(&pages).all(|part| self.destination.part(part)) {
                return None;
            }
            self.progress.advance((pages.len() * PAGE_BYTES) as u64);
        }
    }
}
