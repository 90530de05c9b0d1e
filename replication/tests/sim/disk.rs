//! A host's disk: carries out the guest's requests in order, beside the guest.

use std::collections::{BTreeMap, VecDeque};

use ftvmm_devices::{DiskOp, DiskOutcome, DiskRequest, Input};
use ftvmm_replication::{DiskLabel, DiskMark, DiskPurpose, DiskState, Term, may_use};
use serde::{Deserialize, Serialize};

use crate::coverage::Mark;
use crate::guest::CELLS;
use crate::world::World;

/// How a request ended on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    /// The request.
    pub id: u64,
    /// It was a flush.
    pub is_flush: bool,
    /// For the guest.
    pub outcome: DiskOutcome,
    /// A live guest may have it.
    pub released: bool,
}

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub blocks: [u64; CELLS],
    /// Requests not carried out yet.
    pub queue: VecDeque<DiskRequest>,
    /// The last request made.
    pub last_id: u64,
    /// Everything up to this request is carried out.
    pub done_through: u64,
    completions: BTreeMap<u64, Completion>,
    /// The next request, or block put in place, fails.
    pub is_bad: bool,
    /// What it is when no state is being written over it.
    pub mark: DiskMark,
    /// A state is.
    pub copying: bool,
}

impl Disk {
    pub fn submit(&mut self, request: DiskRequest) {
        self.last_id = request.id;
        self.queue.push_back(request);
    }

    /// Carries out the next request. One that `fails` has done its work, so that disks stay equal.
    pub fn carry_out(&mut self, fails: bool) -> Option<Completion> {
        let DiskRequest { id, op } = self.queue.pop_front()?;
        self.done_through = id;
        let mut data = Vec::new();
        let is_flush = op == DiskOp::Flush;
        match op {
            DiskOp::Read { sector, .. } => data = self.blocks[sector as usize].to_le_bytes().into(),
            DiskOp::Write { sector, data } => {
                self.blocks[sector as usize] =
                    u64::from_le_bytes(data[..].try_into().expect("a number"));
            }
            DiskOp::Flush | DiskOp::Zero { .. } => {}
        }
        let outcome = if fails { DiskOutcome::Failed } else { DiskOutcome::Done { data } };
        let completion = Completion { id, is_flush, outcome, released: false };
        self.completions.insert(id, completion.clone());
        Some(completion)
    }

    pub fn complete(&mut self, id: u64) {
        if let Some(completion) = self.completions.get_mut(&id) {
            completion.released = true;
        }
    }

    /// Releases every flush up to this one that was done here.
    pub fn complete_flushes(&mut self, through: u64) {
        for completion in self.completions.range_mut(..=through).map(|(_, completion)| completion) {
            completion.released |= completion.is_flush && completion.outcome != DiskOutcome::Failed;
        }
    }

    /// A completion a live guest may have.
    pub fn take_completed(&mut self) -> Option<Input> {
        let id = self.completions.values().find(|completion| completion.released)?.id;
        let Completion { outcome, .. } = self.completions.remove(&id)?;
        Some(Input::DiskDone { id, outcome })
    }

    pub fn take(&mut self, id: u64) -> Option<Completion> {
        self.completions.remove(&id)
    }

    /// Completions the guest has not had.
    pub fn untaken(&self) -> Vec<Completion> {
        self.completions.values().cloned().collect()
    }

    /// Another guest's state comes: its requests are none of this disk's.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.completions.clear();
    }

    /// What is noted of it.
    pub fn label(&self) -> DiskLabel {
        let state = if self.copying { DiskState::Incomplete } else { self.mark.state };
        let mark = DiskMark { state, ..self.mark };
        DiskLabel { guest: None, mark, since: String::new() }
    }

    /// The disk as it lies there when its host is gone.
    pub fn left(&self) -> Self {
        let Self { blocks, last_id, done_through, mark, copying, .. } = *self;
        Self { blocks, last_id, done_through, mark, copying, ..Self::default() }
    }

    /// Resumes after a transfer.
    pub fn resume(&mut self, last_id: u64, completions: Vec<Completion>) {
        (self.last_id, self.done_through) = (last_id, last_id);
        let released = completions
            .into_iter()
            .map(|completion| (completion.id, Completion { released: true, ..completion }));
        self.completions = released.collect();
    }
}

impl World {
    /// Were every host lost now, a disk on which the guest may be started again would have every
    /// write that the guest was told is safe. Each may be attached again.
    pub fn judge_disks(&mut self) {
        let known = self.witness.store.last_run();
        for disk in [0, 1].map(|host| self.hosts[host].disk.left()) {
            let label = disk.label();
            may_use(Some(&label), DiskPurpose::Follow, known, &[]).expect("a copy goes over it");
            let refused = may_use(Some(&label), DiskPurpose::Run, known, &[]).is_err();
            match label.mark.state {
                DiskState::Incomplete => self.coverage.mark(Mark::DiskIncomplete),
                _ if refused => self.coverage.mark(Mark::DiskOutdated),
                // A guest that has not run yet was told nothing.
                _ if label.mark.term == Term(0) => {}
                _ => self.coverage.mark(Mark::DiskUsable),
            }
            let is_clear = !(self.faults.flipped || self.faults.forged);
            if !refused && label.mark.term > Term(0) && is_clear {
                self.checker.on_usable(&disk);
            }
        }
    }
}
