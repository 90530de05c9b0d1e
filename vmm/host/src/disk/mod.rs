//! The host's side of the guest's disk: a worker thread carries out the guest's requests on a raw
//! file, one after the other in the order of their numbers, while the guest runs.
//!
//! ```text
//! vCPU thread   submit ──► queue ──► worker: file ──► completions ──► take_completed (live),
//!                                                          │          take (follower)
//!                                                          └─► listener: InputQueue, or Peer
//! ```
//!
//! A completion stays here until it is taken, so that a host that took over gives its guest what
//! the other host never logged. With [`CompletionPolicy::Gated`] a live guest does not get a
//! completion before [`Disk::complete`] says so. Blocks can be read and written between two
//! requests, for a copy while the guest runs ([`Disk::read_block`]).

mod dirty;
mod file;
mod label;
mod marks;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use ftvmm_devices::{DiskOp, DiskOutcome, DiskRequest, SECTOR_BYTES};

use crate::contain::Thread;
use crate::profile::{self, Phase};
use crate::sync::{Condvar, Mutex, lock, wait};
use dirty::DirtyBlocks;
pub use dirty::{BLOCK_BYTES, block_count};
pub use file::{DiskError, DiskFile};
use ftvmm_machine::disk_completion::Completion;
pub use label::{LabelFile, label_beside};
use marks::Marks;

/// When a live guest may have a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionPolicy {
    /// As soon as it is there.
    Immediate,
    /// When [`Disk::complete`] was called.
    Gated,
}

#[derive(Debug)]
struct Held {
    completion: Completion,
    completed: bool,
}

#[derive(Debug, Default)]
struct DiskState {
    queue: VecDeque<DiskRequest>,
    executing: bool,
    /// The last request taken.
    last_id: u64,
    completions: BTreeMap<u64, Held>,
}

/// The file and the map of its changes: under one lock, so that a copy sees whole requests.
#[derive(Debug)]
struct Image {
    file: DiskFile,
    dirty: Option<DirtyBlocks>,
}

type Listener = Box<dyn Fn(&Completion) + Send + Sync>;

/// A guest's disk on this host. See the module documentation.
pub struct Disk {
    image: Mutex<Image>,
    size_bytes: u64,
    policy: CompletionPolicy,
    state: Mutex<DiskState>,
    submitted: Condvar,
    done: Condvar,
    listener: OnceLock<Listener>,
    marks: Marks,
}

impl Disk {
    /// A disk and its worker.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn start(file: DiskFile, policy: CompletionPolicy) -> io::Result<Arc<Self>> {
        let disk = Arc::new(Self {
            size_bytes: file.size_bytes(),
            image: Mutex::new(Image { file, dirty: None }),
            policy,
            state: Mutex::default(),
            submitted: Condvar::new(),
            done: Condvar::new(),
            listener: OnceLock::new(),
            marks: Marks::default(),
        });
        let worker = Arc::clone(&disk);
        Thread::Disk.start(move || worker.work())?;
        Ok(disk)
    }

    /// Calls `listener` after each completion, on the worker's thread. Only the first listener is
    /// taken.
    pub fn on_completion(&self, listener: impl Fn(&Completion) + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    /// Length of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Takes a request of the guest, to be carried out after those before it.
    pub fn submit(&self, request: DiskRequest) {
        let mut state = lock(&self.state);
        state.last_id = request.id;
        state.queue.push_back(request);
        drop(state);
        self.submitted.notify_one();
    }

    /// A completion that a live guest may have.
    pub fn take_completed(&self) -> Option<Completion> {
        let mut state = lock(&self.state);
        let id = state.completions.values().find(|held| held.completed)?.completion.id;
        state.completions.remove(&id).map(|held| held.completion)
    }

    /// Whether [`Self::take_completed`] would give one.
    pub fn has_completed(&self) -> bool {
        lock(&self.state).completions.values().any(|held| held.completed)
    }

    /// This host's completion of a request whose end is in another host's log; `None` while there
    /// is none.
    pub fn take(&self, id: u64) -> Option<Completion> {
        lock(&self.state).completions.remove(&id).map(|held| held.completion)
    }

    /// A live guest may have the completion of this request.
    pub fn complete(&self, id: u64) {
        if let Some(held) = lock(&self.state).completions.get_mut(&id) {
            held.completed = true;
        }
    }

    /// A live guest may have the completions of its flushes up to this one.
    pub fn complete_flushes(&self, through: u64) {
        for held in lock(&self.state).completions.range_mut(..=through).map(|(_, held)| held) {
            held.completed |= held.completion.is_flush && held.completion.error.is_none();
        }
    }

    /// Waits until every request is carried out and the listener has heard of it, so not under a
    /// lock the listener takes; returns a copy of the completions the guest has not had.
    pub fn drain(&self) -> Vec<Completion> {
        let mut state = lock(&self.state);
        while state.executing || !state.queue.is_empty() {
            state = wait(&self.done, state);
        }
        state.completions.values().map(|held| held.completion.clone()).collect()
    }

    /// Whether the guest has made this request, here or before its state came here.
    pub fn has_request(&self, id: u64) -> bool {
        let state = lock(&self.state);
        id <= state.last_id || state.completions.contains_key(&id)
    }

    /// The last request the guest made.
    pub fn last_id(&self) -> u64 {
        lock(&self.state).last_id
    }

    /// Resumes after a transfer; these completions have not reached the guest yet.
    pub fn resume_with(&self, completions: Vec<Completion>) {
        let mut state = lock(&self.state);
        let held = completions
            .into_iter()
            .map(|completion| (completion.id, Held { completion, completed: true }));
        state.completions = held.collect();
    }

    /// Begins to note which blocks change, or ends it.
    pub fn note_changes(&self, on: bool) {
        let mut image = lock(&self.image);
        image.dirty = on.then(|| DirtyBlocks::none(self.size_bytes));
    }

    /// The blocks that changed since [`Self::note_changes`] or the last call, in order.
    pub fn take_changed(&self) -> Vec<u64> {
        lock(&self.image).dirty.as_mut().map(DirtyBlocks::take).unwrap_or_default()
    }

    fn block(&self, index: u64) -> Range<u64> {
        let start = index * BLOCK_BYTES;
        start..(start + BLOCK_BYTES).min(self.size_bytes)
    }

    /// Content of a block, between two requests; the last block may be short.
    ///
    /// # Errors
    /// What the host says.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn read_block(&self, index: u64) -> io::Result<Vec<u8>> {
        let Range { start, end } = self.block(index);
        let mut data = vec![0; (end - start) as usize];
        lock(&self.image).file.read_at(start, &mut data)?;
        Ok(data)
    }

    /// Replaces a block by one that [`Self::read_block`] returned on another host.
    ///
    /// # Errors
    /// What the host says, and when the block is not on this disk or of another length.
    pub fn write_block(&self, index: u64, data: &[u8]) -> io::Result<()> {
        let Range { start, end } = self.block(index);
        if end.checked_sub(start) != Some(data.len() as u64) || data.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        lock(&self.image).file.write_at(start, data)
    }

    /// Makes what [`Self::write_block`] wrote survive a loss of power.
    ///
    /// # Errors
    /// What the host says.
    pub fn sync(&self) -> io::Result<()> {
        lock(&self.image).file.execute(&DiskOp::Flush).map(drop)
    }

    fn work(&self) {
        let _wait = profile::enter(Phase::Wait);
        loop {
            let mut state = lock(&self.state);
            let request = loop {
                match state.queue.pop_front() {
                    Some(request) => break request,
                    None if self.marks.is_due() => {
                        drop(state);
                        self.marks.catch_up();
                        state = lock(&self.state);
                    }
                    None => {
                        state = wait(&self.submitted, state);
                    }
                }
            };
            state.executing = true;
            drop(state);
            let _disk = profile::enter(Phase::Disk);
            // Before the first write in a new state.
            self.marks.catch_up();
            let completion = self.carry_out(&request);
            let completed = self.policy == CompletionPolicy::Immediate;
            let held = Held { completion: completion.clone(), completed };
            lock(&self.state).completions.insert(completion.id, held);
            if let Some(listener) = self.listener.get() {
                listener(&completion);
            }
            lock(&self.state).executing = false;
            self.done.notify_all();
        }
    }

    fn carry_out(&self, DiskRequest { id, op }: &DiskRequest) -> Completion {
        let mut image = lock(&self.image);
        if let Some(dirty) = &mut image.dirty {
            written(op).into_iter().for_each(|bytes| dirty.mark(bytes));
        }
        let (outcome, error) = match image.file.execute(op) {
            Ok(data) => (DiskOutcome::Done { data }, None),
            Err(error) => (DiskOutcome::Failed, Some(error.to_string())),
        };
        let is_flush = matches!(op, DiskOp::Flush);
        let completion = Completion { id: *id, sector: op.sector(), is_flush, outcome, error };
        if let Some(failure) = completion.failure() {
            tracing::error!(path = %image.file.path().display(), failure, "the disk failed");
        }
        completion
    }
}

/// Bytes of the disk that a request may change.
fn written(op: &DiskOp) -> Vec<Range<u64>> {
    let span = |sector: u64, bytes: u64| sector * SECTOR_BYTES..sector * SECTOR_BYTES + bytes;
    match op {
        DiskOp::Read { .. } | DiskOp::Flush => Vec::new(),
        DiskOp::Write { sector, data } => vec![span(*sector, data.len() as u64)],
        DiskOp::Zero { ranges } => ranges
            .iter()
            .map(|range| span(range.sector, u64::from(range.sector_count) * SECTOR_BYTES))
            .collect(),
    }
}

#[cfg(test)]
mod tests;
