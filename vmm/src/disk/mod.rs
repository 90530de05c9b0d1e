//! The host's side of the guest's disk: a worker thread carries out the guest's requests on a raw
//! file, one after the other in the order of their numbers, while the guest runs.
//!
//! ```text
//! vCPU thread   submit ──► queue ──► worker: file ──► answers ──► take_told (live), take (follower)
//!                                                        └─► listener: LiveQueue, or Peer and its session
//! ```
//!
//! An answer stays here until somebody takes it, so that a host that took over gives its guest what
//! the other host never logged. With [`Telling::WhenAllowed`] an answer is not for a live guest
//! before [`Disk::tell`] says so. Blocks can be read and written between two requests, for a copy
//! while the guest runs ([`Disk::read_block`]).

mod dirty;
mod file;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use ftvmm_devices::{DiskOp, DiskOutcome, DiskRequest, SECTOR_BYTES};

use dirty::DirtyBlocks;

use crate::disk_answer::Answer;
use crate::sync::{Condvar, Mutex, lock, wait};
pub use dirty::{BLOCK_BYTES, block_count};
pub use file::{DiskError, DiskFile};

/// When answers are for a live guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Telling {
    /// As soon as they are there.
    AtOnce,
    /// When [`Disk::tell`] was called.
    WhenAllowed,
}

#[derive(Debug)]
struct Held {
    answer: Answer,
    told: bool,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<DiskRequest>,
    executing: bool,
    /// The last request taken.
    last_id: u64,
    answers: BTreeMap<u64, Held>,
}

/// The file and the map of its changes: under one lock, so that a copy sees whole requests.
#[derive(Debug)]
struct Image {
    file: DiskFile,
    dirty: Option<DirtyBlocks>,
}

type Listener = Box<dyn Fn(&Answer) + Send + Sync>;

/// A guest's disk on this host. See the module documentation.
pub struct Disk {
    image: Mutex<Image>,
    size_bytes: u64,
    telling: Telling,
    state: Mutex<State>,
    submitted: Condvar,
    done: Condvar,
    listener: OnceLock<Listener>,
}

impl Disk {
    /// A disk and its worker.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn start(file: DiskFile, telling: Telling) -> io::Result<Arc<Self>> {
        let disk = Arc::new(Self {
            size_bytes: file.size_bytes(),
            image: Mutex::new(Image { file, dirty: None }),
            telling,
            state: Mutex::default(),
            submitted: Condvar::new(),
            done: Condvar::new(),
            listener: OnceLock::new(),
        });
        let worker = Arc::clone(&disk);
        std::thread::Builder::new().name("disk".into()).spawn(move || worker.work())?;
        Ok(disk)
    }

    /// Calls `listener` after each answer, on the worker's thread. Only the first listener is
    /// taken.
    pub fn on_answer(&self, listener: impl Fn(&Answer) + Send + Sync + 'static) {
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

    /// An answer a live guest may have.
    pub fn take_told(&self) -> Option<Answer> {
        let mut state = lock(&self.state);
        let id = state.answers.values().find(|held| held.told)?.answer.id;
        state.answers.remove(&id).map(|held| held.answer)
    }

    /// Whether [`Self::take_told`] would give one.
    pub fn has_told(&self) -> bool {
        lock(&self.state).answers.values().any(|held| held.told)
    }

    /// This host's answer to a request whose end is in another host's log; `None` while there is
    /// none.
    pub fn take(&self, id: u64) -> Option<Answer> {
        lock(&self.state).answers.remove(&id).map(|held| held.answer)
    }

    /// A live guest may have the answer to this request.
    pub fn tell(&self, id: u64) {
        if let Some(held) = lock(&self.state).answers.get_mut(&id) {
            held.told = true;
        }
    }

    /// A live guest may have the answers to its flushes up to this one.
    pub fn tell_flushes(&self, through: u64) {
        for held in lock(&self.state).answers.range_mut(..=through).map(|(_, held)| held) {
            held.told |= held.answer.is_flush && held.answer.error.is_none();
        }
    }

    /// Waits until every request is carried out and the listener has heard of it, so not under a
    /// lock the listener takes; returns a copy of the answers the guest has not had.
    pub fn drain(&self) -> Vec<Answer> {
        let mut state = lock(&self.state);
        while state.executing || !state.queue.is_empty() {
            state = wait(&self.done, state);
        }
        state.answers.values().map(|held| held.answer.clone()).collect()
    }

    /// Whether the guest has made this request, here or before its state came here.
    pub fn has_request(&self, id: u64) -> bool {
        let state = lock(&self.state);
        id <= state.last_id || state.answers.contains_key(&id)
    }

    /// The last request the guest made.
    pub fn last_id(&self) -> u64 {
        lock(&self.state).last_id
    }

    /// Goes on where another host's disk was drained: the guest has not had these answers.
    pub fn resume_with(&self, answers: Vec<Answer>) {
        let mut state = lock(&self.state);
        let held = answers.into_iter().map(|answer| (answer.id, Held { answer, told: true }));
        state.answers = held.collect();
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
        loop {
            let mut state = lock(&self.state);
            let request = loop {
                match state.queue.pop_front() {
                    Some(request) => break request,
                    None => {
                        state = wait(&self.submitted, state);
                    }
                }
            };
            state.executing = true;
            drop(state);
            let answer = self.carry_out(&request);
            let told = self.telling == Telling::AtOnce;
            let held = Held { answer: answer.clone(), told };
            lock(&self.state).answers.insert(answer.id, held);
            if let Some(listener) = self.listener.get() {
                listener(&answer);
            }
            lock(&self.state).executing = false;
            self.done.notify_all();
        }
    }

    fn carry_out(&self, DiskRequest { id, op }: &DiskRequest) -> Answer {
        let mut image = lock(&self.image);
        if let Some(dirty) = &mut image.dirty {
            written(op).into_iter().for_each(|bytes| dirty.mark(bytes));
        }
        let (outcome, error) = match image.file.execute(op) {
            Ok(data) => (DiskOutcome::Done { data }, None),
            Err(error) => (DiskOutcome::Failed, Some(error.to_string())),
        };
        let is_flush = matches!(op, DiskOp::Flush);
        let answer = Answer { id: *id, sector: op.sector(), is_flush, outcome, error };
        if let Some(failure) = answer.failure() {
            tracing::error!(path = %image.file.path().display(), failure, "the disk failed");
        }
        answer
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
