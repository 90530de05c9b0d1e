//! Which pages of guest memory changed since the last copy.
//!
//! A second copy of memory, and a digest over all of it. Both hosts, and a recording and its
//! replay, bring theirs up to date at the same points: at memory checks, where memory is equal
//! because execution is deterministic, and at slices, where it is equal because the state was
//! sent. So the copies are equal, and a slice need only say what differs from them.
//!
//! Invariant: a page that differs from its copy has its bit set in KVM's dirty log or in the
//! memory's own bitmap. Bits may be set for pages that do not differ; they cost a comparison, a
//! fraction of the fault that a write to a protected page costs. So a page is protected again only
//! when it has not changed for long.

mod copy;
mod live;
pub mod testing;
mod transfer;
mod zeroes;

pub use copy::{MemoryCopy, PageImage};

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use ftvmm_replication::check::CHANGED_PAGES_MAX;
use ftvmm_replication::slice::{WORD_BYTES, find_runs, for_each_run, words};
use ftvmm_replication::{
    MemoryCheck, MemoryCheckMode, PAGE_BYTES, PageDeltas, PageHash, SliceError,
};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use xxhash_rust::xxh3::xxh3_64;

use crate::cpu::{CpuError, DirtyLog};
use crate::memory::Memory;
use copy::CopyRegion;
use live::LiveMemory;

const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Pages of a slice go into records of about this size.
const PART_BYTES: usize = 1 << 20;

/// Words of a page.
const WORDS: u64 = (PAGE_BYTES / WORD_BYTES) as u64;

/// A page is protected again when it was found unchanged so many times in a row, ...
const UNCHANGED_SYNCS_MAX: u8 = 4;
/// ... together with so many others.
const COLD_PAGES_MIN: usize = 64;

/// A slice cannot be taken over.
#[derive(Debug, Error)]
pub enum LoadError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] CpuError),
    /// The pages are damaged.
    #[error(transparent)]
    Pages(#[from] SliceError),
    /// A page lies outside memory.
    #[error("a slice writes to page {page:#x}, which this guest does not have")]
    NoSuchPage {
        /// Guest-physical address divided by 4096.
        page: u64,
    },
    /// The processor's state cannot be decoded.
    #[error("a slice's processor state cannot be decoded")]
    Processor,
    /// Memory is not what it was on the other side: the copies had been different before.
    #[error("memory after a slice has digest {own:016x}, the recorder's {theirs:016x}")]
    Digest {
        /// Here.
        own: u64,
        /// There.
        theirs: u64,
    },
}

/// Whether the guest must lose its TLB.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    No,
    /// At a slice: loading one rewrites page tables without the guest's INVLPG, and no KVM call
    /// that sets registers flushes when CR3 stays. The recorder flushes at the same point, so that
    /// even a guest that forgot to invalidate an entry executes in the same way.
    Tlb,
}

struct Region {
    first_page: u64,
    bytes: usize,
    /// For a page whose bit is set: how many times in a row it was found unchanged.
    idle: Vec<u8>,
}

/// See the module documentation. It belongs to the guest's thread, like the memory it has a share
/// of; what other threads may have is the [`MemoryCopy`].
pub struct PageTracker {
    log: Box<dyn DirtyLog>,
    memory: LiveMemory,
    regions: Vec<Region>,
    copy: Arc<MemoryCopy>,
    digest: u64,
}

impl PageTracker {
    /// A tracker whose copy is of memory as it was loaded; the guest has not run yet.
    ///
    /// # Errors
    /// When the host has no memory for the copy.
    pub fn new(log: Box<dyn DirtyLog>, memory: Rc<Memory>) -> Result<Self, CpuError> {
        let mut digest = 0u64;
        let (mut regions, mut copies) = (Vec::new(), Vec::new());
        let mut live = LiveMemory::new(memory.clone());
        for (slot, loaded) in memory.iter().enumerate() {
            let bytes = loaded.len() as usize;
            let first_page = loaded.start_addr().raw_value() / PAGE_BYTES as u64;
            let mut copy = CopyRegion::zeroed(first_page, bytes)
                .map_err(|cause| CpuError::Copy { bytes: bytes as u64, cause })?;
            for index in set_bits(&live.take_written(slot)) {
                let content = live.page(slot, index);
                let page = first_page + index as u64;
                digest = digest.wrapping_add(digest_change(page, 0, &ZERO_PAGE, content));
                copy.page(index).copy_from_slice(content);
            }
            regions.push(Region { first_page, bytes, idle: vec![0; bytes / PAGE_BYTES] });
            copies.push(copy);
        }
        let copy = Arc::new(MemoryCopy::new(copies));
        Ok(Self { log, memory: live, regions, copy, digest })
    }

    /// The copy, for a transfer.
    pub fn copy(&self) -> &Arc<MemoryCopy> {
        &self.copy
    }

    /// The digest of memory and the first [`CHANGED_PAGES_MAX`] pages that differ from the copy,
    /// which is renewed if `mode` says so.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn check(&mut self, mode: MemoryCheckMode) -> Result<Option<MemoryCheck>, CpuError> {
        let mut changed = Vec::new();
        let visit = |page: u64, new: &[u8], _: &[Range<usize>]| {
            if changed.len() < CHANGED_PAGES_MAX {
                changed.push(PageHash { page, hash: xxh3_64(new) as u32 });
            }
        };
        let digest = match mode {
            MemoryCheckMode::None => return Ok(None),
            MemoryCheckMode::Digest => self.compare(visit)?,
            MemoryCheckMode::Renew => {
                self.catch_up(Flush::No, visit)?;
                self.digest
            }
        };
        Ok(Some(MemoryCheck { digest, changed, renews_copy: mode == MemoryCheckMode::Renew }))
    }

    /// Brings the copy up to date; the changes in parts, and the digest of memory.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn capture(&mut self) -> Result<(Vec<Vec<u8>>, u64), CpuError> {
        let (mut parts, mut deltas) = (Vec::new(), PageDeltas::default());
        self.catch_up(Flush::Tlb, |page, new, runs| {
            deltas.push(page, new, runs);
            if deltas.len_bytes() >= PART_BYTES {
                parts.push(deltas.finish());
            }
        })?;
        parts.push(deltas.finish());
        Ok((parts, self.digest))
    }

    /// Puts memory back to what the copy is, then writes the changes to both; the digest of memory.
    ///
    /// # Errors
    /// When KVM refuses or the changes are none.
    pub fn load<'a>(&mut self, parts: impl Iterator<Item = &'a [u8]>) -> Result<u64, LoadError> {
        let Self { log, memory, regions, copy, digest } = self;
        let mut copies = copy.lock();
        for (slot, (region, copy)) in regions.iter_mut().zip(&mut *copies).enumerate() {
            let dirty = Dirty::read(&**log, memory, slot, region)?;
            for index in dirty.pages() {
                let (live, copy) = (memory.page(slot, index), copy.page(index));
                let changed = live != copy;
                if changed {
                    live.copy_from_slice(copy);
                }
                region.note(index, changed);
            }
            dirty.protect(&**log, slot, region, Flush::Tlb)?;
        }
        for part in parts {
            let mut unknown = None;
            for_each_run(part, |page, offset, words| {
                let Some((slot, index)) = place_of(regions, page) else {
                    unknown = Some(page);
                    return;
                };
                let range = offset..offset + words.len();
                memory.page(slot, index)[range.clone()].copy_from_slice(words);
                let copy = &mut copies[slot].page(index)[range];
                *digest = digest.wrapping_add(digest_change(page, offset, copy, words));
                copy.copy_from_slice(words);
            })?;
            if let Some(page) = unknown {
                return Err(LoadError::NoSuchPage { page });
            }
        }
        Ok(*digest)
    }

    /// Reports every page that changed, and leaves everything as it was for the next check; the
    /// digest of memory.
    fn compare(
        &mut self,
        mut visit: impl FnMut(u64, &[u8], &[Range<usize>]),
    ) -> Result<u64, CpuError> {
        let mut digest = self.digest;
        let mut runs = Vec::new();
        let Self { log, memory, regions, copy, .. } = self;
        let mut copies = copy.lock();
        for (slot, (region, copy)) in regions.iter().zip(&mut *copies).enumerate() {
            for index in Dirty::read(&**log, memory, slot, region)?.pages() {
                let live = memory.page(slot, index);
                let page = region.first_page + index as u64;
                let change = compare(page, copy.page(index), live, &mut runs);
                if !runs.is_empty() {
                    visit(page, live, &runs);
                    digest = digest.wrapping_add(change);
                    // Reading has reset it.
                    memory.mark_written(slot, index);
                }
            }
        }
        Ok(digest)
    }

    /// Renews the copy of every changed page and reports it: page, new content, where it changed.
    fn catch_up(
        &mut self,
        flush: Flush,
        mut visit: impl FnMut(u64, &[u8], &[Range<usize>]),
    ) -> Result<(), CpuError> {
        let mut runs = Vec::new();
        let Self { log, memory, regions, copy, digest } = self;
        let mut copies = copy.lock();
        for (slot, (region, copy)) in regions.iter_mut().zip(&mut *copies).enumerate() {
            let dirty = Dirty::read(&**log, memory, slot, region)?;
            for index in dirty.pages() {
                let live = memory.page(slot, index);
                let page = region.first_page + index as u64;
                let change = compare(page, copy.page(index), live, &mut runs);
                if !runs.is_empty() {
                    visit(page, live, &runs);
                    *digest = digest.wrapping_add(change);
                    copy.mark_unsent(index);
                }
                let copy = copy.page(index);
                for run in &runs {
                    copy[run.clone()].copy_from_slice(&live[run.clone()]);
                }
                region.note(index, !runs.is_empty());
            }
            dirty.protect(&**log, slot, region, flush)?;
        }
        Ok(())
    }
}

impl Region {
    fn index(&self, page: u64) -> Option<usize> {
        let index = page.checked_sub(self.first_page)? as usize;
        (index < self.idle.len()).then_some(index)
    }

    /// Keeps count of how long a page that may have changed did not.
    fn note(&mut self, index: usize, changed: bool) {
        self.idle[index] = if changed { 0 } else { self.idle[index].saturating_add(1) };
    }
}

/// The slot of a page and its index there.
fn place_of(regions: &[Region], page: u64) -> Option<(usize, usize)> {
    let mut places = regions.iter().enumerate();
    places.find_map(|(slot, region)| Some((slot, region.index(page)?)))
}

/// Finds where `page` differs from its copy, and says how memory's digest changes with it.
fn compare(page: u64, copy: &[u8], live: &[u8], runs: &mut Vec<Range<usize>>) -> u64 {
    find_runs(copy, live, runs);
    let changes = runs
        .iter()
        .map(|run| digest_change(page, run.start, &copy[run.clone()], &live[run.clone()]));
    changes.fold(0, u64::wrapping_add)
}

/// How memory's digest changes when `old` becomes `new`, both from byte `offset` of `page` on. The
/// digest is the sum of a number for each word that is not zero, so a change costs as much as it
/// changes, and untouched memory nothing.
fn digest_change(page: u64, offset: usize, old: &[u8], new: &[u8]) -> u64 {
    let first_word = page * WORDS + (offset / WORD_BYTES) as u64;
    let changes =
        (first_word..).zip(words(old).zip(words(new))).filter(|(_, (old, new))| old != new);
    changes.fold(0, |sum: u64, (word, (old, new))| {
        sum.wrapping_add(word_digest(word, new)).wrapping_sub(word_digest(word, old))
    })
}

/// The finalizer of splitmix64 over content and place (Steele et al., OOPSLA 2014).
fn word_digest(word: u64, content: u64) -> u64 {
    if content == 0 {
        return 0;
    }
    let mut z = content ^ word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The pages of a slot that may differ from their copy.
struct Dirty {
    /// From both logs.
    bits: Vec<u64>,
    /// From KVM's, which is cleared page by page.
    logged: Vec<u64>,
}

impl Dirty {
    fn read(
        log: &dyn DirtyLog,
        memory: &LiveMemory,
        slot: usize,
        region: &Region,
    ) -> Result<Self, CpuError> {
        let logged = log.read(slot as u32, region.bytes)?;
        let written = memory.take_written(slot);
        let mut bits = logged.clone();
        for (word, more) in bits.iter_mut().zip(written) {
            *word |= more;
        }
        Ok(Self { bits, logged })
    }

    fn pages(&self) -> impl Iterator<Item = usize> {
        set_bits(&self.bits)
    }

    /// Clears KVM's bits of the pages that have not changed for long. The call flushes the guest's
    /// TLB, whatever it clears: to have that done, it is given the page that has not changed
    /// for the longest.
    fn protect(
        &self,
        log: &dyn DirtyLog,
        slot: usize,
        region: &mut Region,
        flush: Flush,
    ) -> Result<(), CpuError> {
        let is_cold = |region: &Region, index: usize| region.idle[index] >= UNCHANGED_SYNCS_MAX;
        let mut chosen: Vec<_> = set_bits(&self.logged).filter(|i| is_cold(region, *i)).collect();
        if chosen.len() < COLD_PAGES_MIN {
            chosen.clear();
            if flush == Flush::Tlb {
                chosen.extend(set_bits(&self.logged).max_by_key(|index| region.idle[*index]));
            }
        }
        if chosen.is_empty() {
            return Ok(());
        }
        let mut bits = vec![0u64; self.logged.len()];
        for index in chosen {
            bits[index / 64] |= 1 << (index % 64);
            region.idle[index] = 0;
        }
        log.clear(slot as u32, region.idle.len() as u32, &bits)
    }
}

fn set_bits(words: &[u64]) -> impl Iterator<Item = usize> {
    words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(i, word)| {
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| i * 64 + bit)
    })
}

#[cfg(test)]
mod tests;
