//! Kernel code that was not in the kernel's file: modules, alternatives applied at boot, another
//! kernel.
//!
//! What is about to become executable is searched before it runs ([`search`], [`patch_kernel`]).
//! The rest of this module searches later, for kernels whose functions are not known and for code
//! that comes in another way.
//!
//! When the guest starts its first user program, and every [`LOOK_EVERY_EXITS`] exits from then on,
//! the guest's page tables are searched for kernel pages that may be executed and were not seen
//! before. What is still to be trapped in them is patched, counted and reported: it may have run
//! unpatched until then.
//!
//! A section of the kernel's file is decoded again only when bytes have come into it that look like
//! a trapped instruction. Pages elsewhere are decoded from the start of each contiguous run of new
//! ones, which is where a module's text starts, and a site is believed only when the decoding is in
//! step ([`super::code::find`]). A page elsewhere counts as seen by its content.
//! What remains: code that comes and goes between two looks, a section whose pages were only in
//! part executable, and data in executable memory that decodes into a trapped instruction after
//! sixteen others.

use std::collections::BTreeMap;

use ftvmm_replication::Ordinal;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use xxhash_rust::xxh3::Xxh3;

use super::code::{Site, candidates, find};
use super::hook::NewCode;
use super::kernel::{self, KernelCode, Section};
use super::paging::{AddressSpace, Page};
use crate::memory::Memory;

/// How often to look for new code.
const LOOK_EVERY_EXITS: u64 = 4096;
/// How often to look whether there is a user program.
const USER_EVERY_EXITS: u64 = 16;
/// A look decodes at most so much code, so that a guest that makes all its memory executable does
/// not stop its host for the time that takes; the rest waits for the next look. Of a page that is
/// larger only so much is decoded at all.
const DECODED_BYTES_MAX: u64 = 64 << 20;
/// Kernels map their text in pages of this size; what shares one with a section is no module.
const KERNEL_PAGE_BYTES: u64 = 2 << 20;

/// The largest image of a kernel that is looked at in memory.
const IMAGE_BYTES_MAX: usize = 256 << 20;
/// What is written back of an image at once.
const PART_BYTES: usize = 4096;

/// Kernel pages seen before, by address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pages: Option<BTreeMap<u64, SeenPage>>,
}

/// Where a page was, how long, and what it held; the last is 0 for the kernel's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SeenPage {
    gpa: u64,
    bytes: u64,
    hash: u64,
}

impl Seen {
    /// Whether it is time to look.
    pub fn due(&self, at: Ordinal, space: &AddressSpace<'_>) -> bool {
        match self.pages {
            Some(_) => at.0.is_multiple_of(LOOK_EVERY_EXITS),
            None => at.0.is_multiple_of(USER_EVERY_EXITS) && space.has_user_half(),
        }
    }

    /// Looks and patches; returns the addresses of what was patched.
    pub fn look(
        &mut self,
        space: &AddressSpace<'_>,
        memory: &Memory,
        kernel: &KernelCode,
    ) -> Vec<u64> {
        let pages = space.kernel_code();
        let in_kernel = |page: &Page| {
            kernel.sections.iter().any(|section| {
                let start = section.addresses.start / KERNEL_PAGE_BYTES * KERNEL_PAGE_BYTES;
                let end = section.addresses.end.checked_next_multiple_of(KERNEL_PAGE_BYTES);
                let end = end.unwrap_or(u64::MAX);
                overlaps(page, &(start..end))
            })
        };
        let seen = |page: &Page| {
            let hash = if in_kernel(page) { 0 } else { content(space, page) };
            SeenPage { gpa: page.gpa, bytes: page.bytes, hash }
        };
        let now: BTreeMap<u64, SeenPage> =
            pages.iter().map(|page| (page.address, seen(page))).collect();
        let before = self.pages.take().unwrap_or_default();
        let fresh: Vec<Page> = pages
            .into_iter()
            .filter(|page| before.get(&page.address) != now.get(&page.address))
            .collect();
        let pages = self.pages.insert(now);
        if fresh.is_empty() {
            return Vec::new();
        }
        let mut patched = Vec::new();
        for section in &kernel.sections {
            let addresses = &section.addresses;
            if fresh.iter().any(|page| overlaps(page, addresses)) {
                patched.extend(patch_section(space, memory, section));
            }
        }
        let elsewhere: Vec<Page> = fresh.into_iter().filter(|page| !in_kernel(page)).collect();
        let mut left_bytes = DECODED_BYTES_MAX;
        for run in elsewhere.chunk_by(|a, b| a.address + a.bytes == b.address) {
            let start = run[0].address;
            let bytes = run.iter().map(|page| page.bytes).sum::<u64>().min(left_bytes);
            left_bytes -= bytes;
            let mut code = vec![0; bytes as usize];
            let got = space.read_where(start, &mut code, |page| page.executable);
            let found = patch_sites(space, memory, start, &code[..got]);
            let is_done = |page: &Page| {
                bytes > 0 && page.bytes > DECODED_BYTES_MAX
                    || page.address - start + page.bytes <= bytes
            };
            for page in run {
                if !is_done(page) {
                    // Left for the next look.
                    pages.remove(&page.address);
                } else if !found.is_empty() {
                    pages.insert(page.address, seen(page));
                }
            }
            patched.extend(found);
        }
        patched
    }
}

/// Patches what the guest is about to make executable; returns the addresses of what was patched.
pub fn search(space: &AddressSpace<'_>, memory: &Memory, new: NewCode) -> Vec<u64> {
    if !kernel::is_kernel_address(new.address) {
        return Vec::new();
    }
    let mut code = Vec::new();
    while (code.len() as u64) < new.bytes {
        let Some(address) = new.address.checked_add(code.len() as u64) else { break };
        let Some(page) = space.page(address) else { break };
        let left = (page.bytes - (address - page.address)).min(new.bytes - code.len() as u64);
        let start = code.len();
        code.resize(start + left as usize, 0);
        if space.read_where(address, &mut code[start..], |_| true) as u64 != left {
            code.truncate(start);
            break;
        }
    }
    patch_sites(space, memory, new.address, &code)
}

/// Patches the kernel that is executed at `rip` and starts: all of its image may be executed then.
/// `None` when it has no symbols.
pub fn patch_kernel(space: &AddressSpace<'_>, memory: &Memory, rip: u64) -> Option<KernelCode> {
    let pages = space.kernel_code();
    let mut runs = pages.chunk_by(|a, b| a.address + a.bytes == b.address);
    let run = runs.find(|run| {
        let (first, last) = (&run[0], &run[run.len() - 1]);
        (first.address..=last.address + (last.bytes - 1)).contains(&rip)
    })?;
    let base = run[0].address;
    let bytes = run.iter().map(|page| page.bytes as usize).sum::<usize>().min(IMAGE_BYTES_MAX);
    let mut image = vec![0; bytes];
    let got = space.read_where(base, &mut image, |page| page.executable);
    image.truncate(got);
    let before = image.clone();
    let kernel = kernel::patch_image(&mut image, base)?;
    for (number, (new, old)) in image.chunks(PART_BYTES).zip(before.chunks(PART_BYTES)).enumerate()
    {
        if new != old
            && let Some(gpa) = space.translate(base + (number * PART_BYTES) as u64)
        {
            // It was read from there.
            let _ = memory.write_slice(new, GuestAddress(gpa));
        }
    }
    Some(kernel)
}

/// A hash of what is on a page.
fn content(space: &AddressSpace<'_>, page: &Page) -> u64 {
    let mut hash = Xxh3::new();
    let mut part = [0; PART_BYTES];
    for address in (page.address..page.address.saturating_add(page.bytes)).step_by(PART_BYTES) {
        let got = space.read_where(address, &mut part, |_| true);
        hash.update(&part[..got]);
    }
    hash.digest()
}

fn overlaps(page: &Page, addresses: &std::ops::Range<u64>) -> bool {
    page.address < addresses.end && addresses.start <= page.address + (page.bytes - 1)
}

fn patch_section(space: &AddressSpace<'_>, memory: &Memory, section: &Section) -> Vec<u64> {
    let start = section.addresses.start;
    let mut code = vec![0; (section.addresses.end - start) as usize];
    let got = space.read_where(start, &mut code, |page| page.executable);
    if got < code.len() || candidates(&code).all(|at| section.decoys.contains(&at)) {
        return Vec::new();
    }
    patch_sites(space, memory, start, &code)
}

fn patch_sites(space: &AddressSpace<'_>, memory: &Memory, start: u64, code: &[u8]) -> Vec<u64> {
    let mut patched = Vec::new();
    for Site { range, trapped } in find(code) {
        let mut instruction = code[range.clone()].to_vec();
        trapped.replace(&mut instruction);
        let address = start + range.start as u64;
        for (number, byte) in instruction.into_iter().enumerate() {
            // The last instruction of all ends where no address follows.
            if let Some(gpa) = space.translate(address + number as u64) {
                // It was read from there.
                let _ = memory.write_obj(byte, GuestAddress(gpa));
            }
        }
        patched.push(address);
    }
    patched
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::{guest, map};
    use super::*;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const MODULES: u64 = 0xffff_ffff_a000_0000;
    const RDTSC: [u8; 2] = [0x0f, 0x31];

    #[test]
    fn new_code_is_patched_once_and_reported() {
        let (memory, sregs) = guest();
        let write = |gpa, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
        let read = |gpa| memory.read_obj::<[u8; 2]>(GuestAddress(gpa)).unwrap();
        [0x6000, 0x7000, 0x9000, 0xb000].iter().for_each(|&gpa| write(gpa, &[0x90; 0x1000]));
        map(&memory, TEXT, 0x6000, 1);
        map(&memory, TEXT + 0x1000, 0x7000, 1);
        let addresses = TEXT..TEXT + 0x1800;
        // mov eax, 0x310f at the start: it was there when the kernel was loaded.
        write(0x6000, &[0xb8, 0x0f, 0x31, 0, 0]);
        let section = Section { addresses, decoys: [1].into() };
        let kernel = KernelCode { sections: vec![section], ..Default::default() };
        let space = AddressSpace::new(&memory, &sregs);
        let mut seen = Seen::default();
        assert!(!seen.due(Ordinal(4096), &space), "no user yet");
        map(&memory, 0x40_0000, 0x9000, 7);
        assert!(seen.due(Ordinal(16), &space) && !seen.due(Ordinal(17), &space));

        write(0x6fff, &[0x0f]);
        write(0x7000, &[0x31]);
        // Behind the section's end; and in data a module would not have as code.
        write(0x7900, &RDTSC);
        assert_eq!(seen.look(&space, &memory, &kernel), [TEXT + 0xfff]);
        assert_eq!((read(0x6fff)[0], read(0x7000)[0], read(0x7900)), (0xe5, 0x55, RDTSC));
        assert_eq!(read(0x6001), RDTSC, "an operand stays");
        assert!(!seen.due(Ordinal(16), &space) && seen.due(Ordinal(8192), &space));

        write(0xb100, &RDTSC);
        write(0xb200, &[0xb8, 0x0f, 0x31, 0, 0]);
        map(&memory, MODULES, 0xb000, 1);
        assert_eq!(seen.look(&space, &memory, &kernel), [MODULES + 0x100]);
        assert_eq!((read(0xb100), read(0xb201)), ([0xe5, 0x55], RDTSC));
        assert_eq!(seen.look(&space, &memory, &kernel), [0; 0]);
        // Another module at the same address.
        write(0x9000, &RDTSC);
        map(&memory, MODULES, 0x9000, 1);
        assert_eq!(seen.look(&space, &memory, &kernel), [MODULES]);
    }

    #[test]
    fn more_code_than_a_look_decodes_waits_for_the_next_one() {
        const LARGE_BYTES: u64 = 2 << 20;
        const PAGES: u64 = DECODED_BYTES_MAX / LARGE_BYTES + 2;
        let (_, sregs) = guest();
        let bytes = (PAGES as usize + 1) * LARGE_BYTES as usize;
        let memory = Memory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        memory.write_obj(sregs.cr3 + 0x1000, GuestAddress(0)).unwrap();
        map(&memory, MODULES, 0, 1);
        let mut table = sregs.cr3;
        for level in [4, 3] {
            let place = table + 8 * (MODULES >> (3 + 9 * level) & 511);
            table = memory.read_obj::<u64>(GuestAddress(place)).unwrap() & !0xfff;
        }
        let first = MODULES >> 21 & 511;
        // Two runs: what the first takes of a look, the second has not.
        for page in (0..PAGES).filter(|page| *page != 1) {
            let entry = ((page + 1) * LARGE_BYTES) | 0x83;
            memory.write_obj(entry, GuestAddress(table + 8 * (first + page))).unwrap();
        }
        // No code at all, but for two sites: in the first page that is decoded, and in the last.
        let filler = vec![0x06; bytes - LARGE_BYTES as usize];
        memory.write_slice(&filler, GuestAddress(LARGE_BYTES)).unwrap();
        let site = [&[0x90; 30][..], &RDTSC].concat();
        let (one, two) = (0x1000, (PAGES - 1) * LARGE_BYTES + 0x1000);
        for at in [one, two] {
            memory.write_slice(&site, GuestAddress(LARGE_BYTES + at)).unwrap();
        }
        let space = AddressSpace::new(&memory, &sregs);
        let (mut seen, kernel) = (Seen::default(), KernelCode::default());
        let mut look = || seen.look(&space, &memory, &kernel);
        assert_eq!(look(), [MODULES + one + 30]);
        assert_eq!(look(), [MODULES + two + 30]);
        assert_eq!(look(), [0; 0]);
    }
}
