//! A guest small enough to simulate: a processor of one number, a memory of eight, a disk of eight
//! blocks. Everything it was given goes into them, so that a frame from it tells which inputs came
//! before.

use std::collections::BTreeMap;

use ftvmm_devices::{DiskOp, DiskOutcome, DiskRequest, Input, Output};
use ftvmm_replication::{Check, CpuCheck, MemoryCheck, MemoryCheckMode, Slice};
use serde::{Deserialize, Serialize};

/// Pages of memory, and blocks of the disk; each holds a number.
pub const CELLS: usize = 8;
/// Requests the guest has under way at most.
const PENDING_MAX: usize = 4;

/// Mixes `value` into `state` (the finaliser of SplitMix64).
pub fn mix(state: u64, value: u64) -> u64 {
    let mut z = state ^ value.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A frame the guest sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Exit at which it did.
    pub at: u64,
    /// Number and state, eight bytes each.
    pub frame: Vec<u8>,
    /// How many of [`Guest::told_writes`] it knew of.
    pub told_writes: usize,
}

/// The guest at an exit, or between two.
#[derive(Clone, Serialize, Deserialize)]
pub struct Guest {
    /// The last exit it came to.
    pub at: u64,
    /// That was no exit but the point of a slice.
    at_slice: bool,
    /// Its processor.
    pub state: u64,
    /// Digest of the exits it has left.
    chain: u64,
    /// Travels in parts of its own.
    #[serde(skip)]
    pub memory: [u64; CELLS],
    /// Memory at the last point at which both sides renewed their copy.
    #[serde(skip)]
    copy: [u64; CELLS],
    /// Every frame it ever sent.
    pub sent: Vec<Sent>,
    /// Every request to its disk it ever made, and those without an answer.
    pub requests: Vec<DiskRequest>,
    pub pending: BTreeMap<u64, DiskOp>,
    /// Writes it was told of that are done, in the order in which it was told.
    pub told_writes: Vec<u64>,
}

impl Guest {
    /// The guest at its first exit after power-on.
    pub fn new(rtc_epoch_s: u64) -> Self {
        let mut guest = Self {
            at: 0,
            at_slice: false,
            state: mix(rtc_epoch_s, 1),
            chain: 0,
            memory: [0; CELLS],
            copy: [0; CELLS],
            sent: Vec::new(),
            requests: Vec::new(),
            pending: BTreeMap::new(),
            told_writes: Vec::new(),
        };
        guest.run();
        guest
    }

    /// Goes on from one exit to the next.
    pub fn run(&mut self) {
        self.compute();
        (self.at, self.at_slice) = (self.at + 1, false);
        self.state = mix(self.state, self.at);
    }

    /// Some of the way to the next exit.
    pub fn compute(&mut self) {
        let cell = (self.state >> 8) as usize % CELLS;
        self.state = mix(self.state, self.memory[cell]);
        self.memory[self.state as usize % CELLS] = self.state;
    }

    /// What the exit is that it stands at, and what it sends there.
    pub fn answer(&mut self) -> Vec<Output> {
        self.chain = mix(self.chain, mix(self.state, self.at));
        let mut outputs = Vec::new();
        if self.at_slice {
            return outputs;
        }
        if self.state.is_multiple_of(5) {
            let number = self.sent.len() as u64 + 1;
            let frame = [number.to_le_bytes(), self.state.to_le_bytes()].concat();
            let told_writes = self.told_writes.len();
            self.sent.push(Sent { at: self.at, frame: frame.clone(), told_writes });
            outputs.push(Output::Frame(frame));
        }
        if self.state % 7 < 2 && self.pending.len() < PENDING_MAX {
            let sector = (self.state >> 16) % CELLS as u64;
            let op = match self.state >> 24 & 3 {
                0 => DiskOp::Read { sector, length_bytes: 512 },
                1 => DiskOp::Flush,
                _ => DiskOp::Write { sector, data: self.state.to_le_bytes().to_vec() },
            };
            let request = DiskRequest { id: self.requests.len() as u64 + 1, op };
            self.requests.push(request.clone());
            self.pending.insert(request.id, request.op.clone());
            outputs.push(Output::Disk(request));
        }
        outputs
    }

    /// Takes an input.
    pub fn apply(&mut self, input: &Input) {
        self.state = match input {
            Input::Time { now_ns } => mix(self.state, *now_ns),
            Input::NetRx { frame: bytes }
            | Input::ConsoleRx { bytes }
            | Input::Entropy { bytes } => mix_bytes(self.state, bytes),
            Input::PowerButton => mix(self.state, 1),
            Input::Nmi => mix(self.state, 2),
            Input::ConsoleBreak => mix(self.state, 3),
            Input::NetAnnounce => mix(self.state, 4),
            Input::NewIdentity { unix_s, .. } => mix(self.state, *unix_s),
            Input::DiskDone { id, outcome } => {
                let op = self.pending.remove(id).expect("a request is answered once");
                match outcome {
                    DiskOutcome::Done { data } => {
                        if let DiskOp::Write { .. } = op {
                            self.told_writes.push(*id);
                        }
                        mix_bytes(mix(self.state, *id), data)
                    }
                    DiskOutcome::Failed => mix(self.state, !id),
                }
            }
        };
    }

    /// Digest of its state.
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&self.state.to_le_bytes());
        digest[8..16].copy_from_slice(&self.at.to_le_bytes());
        digest[16..24].copy_from_slice(&self.memory_digest().to_le_bytes());
        digest
    }

    fn memory_digest(&self) -> u64 {
        self.memory.iter().fold(0, |digest, cell| mix(digest, *cell))
    }

    /// Digest of the exits it has left.
    pub fn chain(&self) -> u64 {
        self.chain
    }

    /// What a recorder says of it, and a follower compares.
    pub fn check(&mut self, memory: MemoryCheckMode) -> Check {
        if memory == MemoryCheckMode::Renew {
            self.renew_copy();
        }
        let renews_copy = memory == MemoryCheckMode::Renew;
        let digest = self.memory_digest();
        let look = MemoryCheck { digest, changed: Vec::new(), renews_copy };
        Check {
            chain: self.chain,
            cpu: CpuCheck { digest: self.state, ..CpuCheck::default() },
            memory: (memory > MemoryCheckMode::None).then_some(look),
        }
    }

    /// Both sides have this memory.
    pub fn renew_copy(&mut self) {
        self.copy = self.memory;
    }

    /// Stops between two exits and makes that point one: its state there, in `parts` parts.
    pub fn capture(&mut self, parts: usize) -> Vec<Slice> {
        (self.at, self.at_slice) = (self.at + 1, true);
        let changed = (0..CELLS).filter(|cell| self.memory[*cell] != self.copy[*cell]);
        let cells: Vec<_> = changed.map(|cell| (cell as u8, self.memory[cell])).collect();
        self.renew_copy();
        let each = cells.len().div_ceil(parts).max(1);
        let mut slices: Vec<_> = cells
            .chunks(each)
            .map(|cells| Slice { pages: cells_to_bytes(cells), cpu: None })
            .collect();
        let cpu = Some(self.state.to_le_bytes().to_vec());
        slices.push(Slice { pages: cells_to_bytes(&[]), cpu });
        slices
    }

    /// Takes over the state of a slice, wherever it is since the exit before.
    pub fn load(&mut self, at: u64, parts: &[Slice]) {
        self.memory = self.copy;
        (self.at, self.at_slice) = (at, true);
        for part in parts {
            cells_from_bytes(&part.pages, |cell, value| self.memory[cell] = value);
            if let Some(cpu) = &part.cpu {
                self.state = u64::from_le_bytes(cpu[..].try_into().expect("a number"));
            }
        }
        self.renew_copy();
    }
}

fn mix_bytes(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |state, byte| mix(state, u64::from(*byte) + 1))
}

/// Pages or blocks with their numbers.
pub fn cells_to_bytes(cells: &[(u8, u64)]) -> Vec<u8> {
    let mut bytes = vec![cells.len() as u8];
    for (cell, value) in cells {
        bytes.push(*cell);
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Hands out what [`cells_to_bytes`] took; what follows is padding.
pub fn cells_from_bytes(bytes: &[u8], mut take: impl FnMut(usize, u64)) {
    let (count, cells) = bytes.split_first().expect("a count");
    for cell in cells.chunks_exact(9).take(usize::from(*count)) {
        take(usize::from(cell[0]), u64::from_le_bytes(cell[1..].try_into().expect("a number")));
    }
}

/// The number in a frame.
pub fn number(frame: &[u8]) -> u64 {
    frame[..8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
