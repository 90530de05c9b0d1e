//! Which pages of guest memory changed since the last copy.
//!
//! A second copy of memory, and a digest over all of it. Both hosts, and a recording and its replay,
//! bring theirs up to date at the same points: at memory checks, where memory is equal because execution is
//! deterministic, and at slices, where it is equal because the state was shipped. So the copies are equal,
//! and a slice need only say what differs from them.
//!
//! Invariant: a page that differs from its copy has its bit set in KVM's dirty log or in the memory's own
//! bitmap. Bits may be set for pages that do not differ; they cost a comparison, a fraction of the fault that a
//! write to a protected page costs. So a page is protected again only when it has not changed for long.

mod copy;
mod transfer;

pub use transfer::PageImage;

use std::ops::Range;
use std::sync::Arc;

use copy::Copy;
use ftvmm_replication::slice::{WORD_BYTES, find_runs, for_each_run, words};
use ftvmm_replication::{MemoryCheck, MemoryLook, PAGE_BYTES, PageDeltas, PageHash, SliceError};
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};
use xxhash_rust::xxh3::xxh3_64;

use crate::kvm::{DirtyLog, KvmError, Memory};

const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Pages of a slice go into records of about this size.
const PART_BYTES: usize = 1 << 20;
/// A check names so many changed pages at most; its digest is of all of memory. A guest that is started again has changed
/// all it used, and a check is one record of the log.
const CHANGED_MAX: usize = 65_536;

/// Words of a page.
const WORDS: u64 = (PAGE_BYTES / WORD_BYTES) as u64;

/// A page is protected again when it was found unchanged so many times in a row, ...
const IDLE_LOOKS_MAX: u8 = 4;
/// ... together with so many others.
const COLD_PAGES_MIN: usize = 64;

/// A slice cannot be taken over.
#[derive(Debug, Error)]
pub enum LoadError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
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
    /// At a slice: loading one rewrites page tables behind the guest's back, and no KVM call that sets
    /// registers flushes when CR3 stays. The recorder's guest loses its TLB at the same point, so that even a
    /// guest that forgot to invalidate an entry goes on alike.
    Tlb,
}

struct Region {
    first_page: u64,
    bytes: usize,
    copy: Copy,
    /// For a page whose bit is set: how many times in a row it was found unchanged.
    idle: Vec<u8>,
    /// While a state is shipped: the pages whose copy has not been sent as it is now.
    unsent: Option<Vec<u64>>,
}

/// See the module documentation.
pub struct PageTracker {
    log: DirtyLog,
    memory: Arc<Memory>,
    regions: Vec<Region>,
    digest: u64,
}

impl PageTracker {
    /// A tracker whose copy is of memory as it was loaded; the guest has not run yet.
    ///
    /// # Errors
    /// When the host has no memory for the copy.
    pub fn new(log: DirtyLog, memory: Arc<Memory>) -> Result<Self, KvmError> {
        let mut digest = 0u64;
        let mut regions = Vec::new();
        for (slot, loaded) in memory.iter().enumerate() {
            let bytes = loaded.len() as usize;
            let mut region = Region {
                first_page: loaded.start_addr().raw_value() / PAGE_BYTES as u64,
                bytes,
                copy: Copy::zeroed(bytes)
                    .map_err(|source| KvmError::Copy { bytes: bytes as u64, source })?,
                idle: vec![0; bytes / PAGE_BYTES],
                unsent: None,
            };
            for index in set_bits(&written_pages(loaded)) {
                let content = live_page(&memory, slot, index);
                let page = region.first_page + index as u64;
                digest = digest.wrapping_add(digest_change(page, 0, &ZERO_PAGE, content));
                region.copy_of(index).copy_from_slice(content);
            }
            regions.push(region);
        }
        Ok(Self { log, memory, regions, digest })
    }

    /// The digest of memory and the first [`CHANGED_MAX`] pages that differ from the copy, which is renewed if `look` says
    /// so.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn check(&mut self, look: MemoryLook) -> Result<Option<MemoryCheck>, KvmError> {
        let mut changed = Vec::new();
        let visit = |page: u64, new: &[u8], _: &[Range<usize>]| {
            if changed.len() < CHANGED_MAX {
                changed.push(PageHash { page, hash: xxh3_64(new) as u32 });
            }
        };
        let digest = match look {
            MemoryLook::None => return Ok(None),
            MemoryLook::Digest => self.peek(visit)?,
            MemoryLook::Renew => {
                self.catch_up(Flush::No, visit)?;
                self.digest
            }
        };
        Ok(Some(MemoryCheck { digest, changed, renews_copy: look == MemoryLook::Renew }))
    }

    /// Brings the copy up to date; the changes in parts, and the digest of memory.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn capture(&mut self) -> Result<(Vec<Vec<u8>>, u64), KvmError> {
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
        let Self { log, memory, regions, digest } = self;
        for (slot, region) in regions.iter_mut().enumerate() {
            let dirty = Dirty::read(log, memory, slot, region)?;
            for index in dirty.pages() {
                let (live, copy) = (live_page(memory, slot, index), region.copy_of(index));
                let changed = live != copy;
                if changed {
                    live.copy_from_slice(copy);
                }
                region.note(index, changed);
            }
            dirty.protect(log, slot, region, Flush::Tlb)?;
        }
        for part in parts {
            let mut unknown = None;
            for_each_run(part, |page, offset, words| {
                let Some((slot, index, region)) = place_of(regions, page) else {
                    unknown = Some(page);
                    return;
                };
                let range = offset..offset + words.len();
                live_page(memory, slot, index)[range.clone()].copy_from_slice(words);
                let copy = &mut region.copy_of(index)[range];
                *digest = digest.wrapping_add(digest_change(page, offset, copy, words));
                copy.copy_from_slice(words);
            })?;
            if let Some(page) = unknown {
                return Err(LoadError::NoSuchPage { page });
            }
        }
        Ok(*digest)
    }

    /// Tells of every page that changed, and leaves everything as it was for the next look; the digest of
    /// memory.
    fn peek(
        &mut self,
        mut visit: impl FnMut(u64, &[u8], &[Range<usize>]),
    ) -> Result<u64, KvmError> {
        let mut digest = self.digest;
        let mut runs = Vec::new();
        let Self { log, memory, regions, .. } = self;
        for (slot, (region, mapping)) in regions.iter_mut().zip(memory.iter()).enumerate() {
            for index in Dirty::read(log, memory, slot, region)?.pages() {
                let live = live_page(memory, slot, index);
                let page = region.first_page + index as u64;
                let copy = region.copy_of(index);
                let change = compare(page, copy, live, &mut runs);
                if !runs.is_empty() {
                    visit(page, live, &runs);
                    digest = digest.wrapping_add(change);
                    // Reading has reset it.
                    mapping.bitmap().mark_dirty(index * PAGE_BYTES, 1);
                }
            }
        }
        Ok(digest)
    }

    /// Copies every page that changed, and tells of it: page, new content, where it changed.
    fn catch_up(
        &mut self,
        flush: Flush,
        mut visit: impl FnMut(u64, &[u8], &[Range<usize>]),
    ) -> Result<(), KvmError> {
        let mut runs = Vec::new();
        let Self { log, memory, regions, digest } = self;
        for (slot, region) in regions.iter_mut().enumerate() {
            let dirty = Dirty::read(log, memory, slot, region)?;
            for index in dirty.pages() {
                let live = live_page(memory, slot, index);
                let page = region.first_page + index as u64;
                let copy = region.copy_of(index);
                let change = compare(page, copy, live, &mut runs);
                if !runs.is_empty() {
                    visit(page, live, &runs);
                    *digest = digest.wrapping_add(change);
                    region.mark_unsent(index);
                }
                let copy = region.copy_of(index);
                for run in &runs {
                    copy[run.clone()].copy_from_slice(&live[run.clone()]);
                }
                region.note(index, !runs.is_empty());
            }
            dirty.protect(log, slot, region, flush)?;
        }
        Ok(())
    }
}

impl Region {
    fn index(&self, page: u64) -> Option<usize> {
        let index = page.checked_sub(self.first_page)? as usize;
        (index < self.idle.len()).then_some(index)
    }

    fn copy_of(&mut self, index: usize) -> &mut [u8] {
        &mut self.copy[index * PAGE_BYTES..(index + 1) * PAGE_BYTES]
    }

    /// Keeps count of how long a page that may have changed did not.
    fn note(&mut self, index: usize, changed: bool) {
        self.idle[index] = if changed { 0 } else { self.idle[index].saturating_add(1) };
    }
}

/// The slot of a page, its index there, and the region itself.
fn place_of(regions: &mut [Region], page: u64) -> Option<(usize, usize, &mut Region)> {
    let mut places = regions.iter_mut().enumerate();
    places.find_map(|(slot, region)| Some((slot, region.index(page)?, region)))
}

/// Finds where `page` differs from its copy, and says how memory's digest changes with it.
fn compare(page: u64, copy: &[u8], live: &[u8], runs: &mut Vec<Range<usize>>) -> u64 {
    find_runs(copy, live, runs);
    let changes = runs
        .iter()
        .map(|run| digest_change(page, run.start, &copy[run.clone()], &live[run.clone()]));
    changes.fold(0, u64::wrapping_add)
}

/// How memory's digest changes when `old` becomes `new`, both from byte `offset` of `page` on. The digest is the
/// sum of a number for each word that is not zero, so a change costs as much as it changes, and untouched memory
/// nothing.
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
        log: &DirtyLog,
        memory: &Memory,
        slot: usize,
        region: &Region,
    ) -> Result<Self, KvmError> {
        let logged = log.read(slot as u32, region.bytes)?;
        let written = memory.iter().nth(slot).map(written_pages).unwrap_or_default();
        let mut bits = logged.clone();
        for (word, more) in bits.iter_mut().zip(written) {
            *word |= more;
        }
        Ok(Self { bits, logged })
    }

    fn pages(&self) -> impl Iterator<Item = usize> {
        set_bits(&self.bits)
    }

    /// Clears KVM's bits of the pages that have not changed for long. The call flushes the guest's TLB, whatever it
    /// clears: to have that done, it is given the page that has not changed for the longest.
    fn protect(
        &self,
        log: &DirtyLog,
        slot: usize,
        region: &mut Region,
        flush: Flush,
    ) -> Result<(), KvmError> {
        let is_cold = |region: &Region, index: usize| region.idle[index] >= IDLE_LOOKS_MAX;
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

/// The pages ftvmm itself wrote since the last call.
fn written_pages(region: &GuestRegionMmap<AtomicBitmap>) -> Vec<u64> {
    let region: &MmapRegion<_> = region;
    region.bitmap().get_and_reset()
}

fn set_bits(words: &[u64]) -> impl Iterator<Item = usize> {
    words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(i, word)| {
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| i * 64 + bit)
    })
}

/// A page of guest memory.
#[expect(clippy::mut_from_ref, reason = "guest memory is shared by nature")]
fn live_page(memory: &Memory, slot: usize, index: usize) -> &mut [u8] {
    #[expect(clippy::expect_used, reason = "regions were counted when the tracker was made")]
    let region = memory.iter().nth(slot).expect("the slot is a region");
    assert!((index + 1) * PAGE_BYTES <= region.len() as usize, "the page lies in its region");
    // SAFETY: the range lies inside the region's mapping, which lives as long as `memory`; the guest stands
    // still, only the vCPU's thread calls the tracker, and no caller keeps two slices of one page.
    unsafe {
        let start = region.as_ptr().add(index * PAGE_BYTES);
        std::slice::from_raw_parts_mut(start, PAGE_BYTES)
    }
}
