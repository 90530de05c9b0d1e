//! What recorder and replayer compare to find a silent divergence before it reaches the network.
//!
//! Why values beside digests: a digest says *that* two executions differ. The registers, the bytes
//! at the instruction pointer and the hashes of the pages that changed say *where*, from the two
//! recordings alone.

use core::fmt;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::bounded;

/// The general registers a [`CpuCheck`] holds, in its order.
pub const REGISTER_NAMES: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip", "rflags",
];
/// Position of the instruction pointer in [`CpuCheck::registers`].
pub const RIP: usize = 16;
/// Most pages that a check names; its digest is of all memory. A guest that is started again has
/// changed all it used, and a check is one record of the log.
pub const CHANGED_PAGES_MAX: usize = 1 << 16;
/// Names at most so many pages in a sentence.
const PAGES_NAMED: usize = 8;

/// The execution so far, as the recorder saw it at an exit before it was answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Running digest of the exit stream up to this exit, as the run loop keeps it.
    pub chain: u64,
    /// The processor.
    pub cpu: CpuCheck,
    /// Memory; not in every check, because it costs more.
    pub memory: Option<MemoryCheck>,
}

/// The processor's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuCheck {
    /// Digest of all of it: general, segment, control, debug and model-specific registers, FPU.
    pub digest: u64,
    /// The general registers, as [`REGISTER_NAMES`] names them.
    pub registers: [u64; 18],
    /// The bytes at the instruction pointer, at most 15; none where no memory is mapped.
    #[serde(with = "serde_bytes")]
    pub code: Vec<u8>,
}

/// All of guest memory, and what changed in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryCheck {
    /// Digest of all of it.
    pub digest: u64,
    /// The pages that differ from the copy the recorder had taken before, in order.
    #[serde(deserialize_with = "bounded::list::<_, _, CHANGED_PAGES_MAX>")]
    pub changed: Vec<PageHash>,
    /// The copy was renewed here, and the next slice says what differs from the new one.
    pub renews_copy: bool,
}

/// What a check does about memory; a greater one does what a smaller one does, and more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryCheckMode {
    /// Nothing.
    #[default]
    None,
    /// Takes its digest, and leaves alone the copy that slices refer to.
    Digest,
    /// Renews the copy too.
    Renew,
}

/// A page and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageHash {
    /// Guest-physical address divided by 4096.
    pub page: u64,
    /// Digest of its content.
    pub hash: u32,
}

/// A page that is not the same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageDifference {
    /// Guest-physical address divided by 4096.
    pub page: u64,
    /// Digest of its content here; `None` where it is as it was in the copy before.
    pub own: Option<u32>,
    /// Digest of its content on the peer, in the same way.
    pub theirs: Option<u32>,
}

impl Check {
    /// The general registers that differ: name, value here, value there.
    pub fn differing_registers(
        &self,
        other: &Self,
    ) -> impl Iterator<Item = (&'static str, u64, u64)> {
        let pairs = self.cpu.registers.iter().zip(&other.cpu.registers).zip(REGISTER_NAMES);
        pairs
            .filter(|((own, theirs), _)| own != theirs)
            .map(|((own, theirs), name)| (name, *own, *theirs))
    }

    /// Whether something of the processor differs that is no general register.
    #[must_use]
    pub fn differs_elsewhere(&self, other: &Self) -> bool {
        self.cpu.digest != other.cpu.digest && self.cpu.registers == other.cpu.registers
    }

    /// What a replay must do about memory to agree with this check.
    #[must_use]
    pub fn memory_look(&self) -> MemoryCheckMode {
        match &self.memory {
            None => MemoryCheckMode::None,
            Some(MemoryCheck { renews_copy: false, .. }) => MemoryCheckMode::Digest,
            Some(MemoryCheck { renews_copy: true, .. }) => MemoryCheckMode::Renew,
        }
    }

    /// Whether memory differs; where one side did not look, it does not.
    #[must_use]
    pub fn memory_differs(&self, other: &Self) -> bool {
        let both = self.memory.as_ref().zip(other.memory.as_ref());
        both.is_some_and(|(own, theirs)| own.digest != theirs.digest)
    }

    /// Says in what this execution differs from `other`; `None` when it does not.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<String> {
        let mut parts = Vec::new();
        if self.chain != other.chain {
            parts.push(format!("exits have digest {:016x}, not {:016x}", self.chain, other.chain));
        }
        for (name, own, theirs) in self.differing_registers(other) {
            parts.push(format!("{name} is {own:#x}, not {theirs:#x}"));
        }
        if self.differs_elsewhere(other) {
            parts.push("a segment, control, FPU or model-specific register differs".into());
        }
        if let (Some(own), Some(theirs)) = (&self.memory, &other.memory)
            && own.digest != theirs.digest
        {
            let pages = own.differing_pages(theirs);
            parts.push(match pages.len() {
                0 => "memory differs in pages that did not change since the last check".into(),
                count => {
                    let named =
                        pages.iter().take(PAGES_NAMED).map(|entry| format!("{:#x}", entry.page));
                    let named = named.collect::<Vec<_>>().join(" ");
                    let more = if count > PAGES_NAMED { " …" } else { "" };
                    format!("{count} pages of memory differ: {named}{more}")
                }
            });
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

impl MemoryCheck {
    /// Pages whose content changed on one side only, or to something else.
    #[must_use]
    pub fn differing_pages(&self, other: &Self) -> Vec<PageDifference> {
        let hashes = |side: &Self| -> BTreeMap<u64, u32> {
            side.changed.iter().map(|entry| (entry.page, entry.hash)).collect()
        };
        let (own, theirs) = (hashes(self), hashes(other));
        let pages: BTreeSet<u64> = own.keys().chain(theirs.keys()).copied().collect();
        let entries = pages.into_iter().map(|page| PageDifference {
            page,
            own: own.get(&page).copied(),
            theirs: theirs.get(&page).copied(),
        });
        entries.filter(|entry| entry.own != entry.theirs).collect()
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rip = self.cpu.registers[RIP];
        write!(f, "check {:016x} cpu {:016x} rip {rip:#x}", self.chain, self.cpu.digest)?;
        match &self.memory {
            Some(memory) => {
                write!(f, " memory {:016x} ({} pages)", memory.digest, memory.changed.len())
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rip: u64, pages: &[(u64, u32)]) -> Check {
        let mut cpu = CpuCheck { digest: rip, ..CpuCheck::default() };
        cpu.registers[RIP] = rip;
        let changed: Vec<PageHash> =
            pages.iter().map(|&(page, hash)| PageHash { page, hash }).collect();
        let digest = changed.iter().map(|p| u64::from(p.hash)).sum();
        Check { chain: 7, cpu, memory: Some(MemoryCheck { digest, changed, renews_copy: true }) }
    }

    #[test]
    fn names_the_register_and_the_pages_that_differ() {
        let same = check(0x1000, &[(1, 10), (2, 20)]);
        assert_eq!(same.difference(&same), None);
        let other = check(0x2000, &[(1, 10), (2, 21), (5, 3)]);
        assert_eq!(
            same.difference(&other).unwrap(),
            "rip is 0x1000, not 0x2000; 2 pages of memory differ: 0x2 0x5"
        );
    }

    #[test]
    fn a_difference_outside_the_general_registers_is_told() {
        let own = check(0x1000, &[]);
        let mut other = own.clone();
        other.cpu.digest += 1;
        assert!(own.difference(&other).unwrap().contains("model-specific"));
        other.chain += 1;
        assert!(own.difference(&other).unwrap().starts_with("exits have digest"));
    }
}
