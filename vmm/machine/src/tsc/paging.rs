//! Guest memory by virtual address: the walk through the guest's own page tables (AMD APM vol. 2,
//! 5.3).
//!
//! KVM_TRANSLATE would do, but it costs a system call, tells nothing of the no-execute bit and
//! cannot list what is mapped. A walk changes nothing: accessed and dirty bits stay as they are.

use std::collections::BTreeSet;

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::Memory;

const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const CR4_LA57: u64 = 1 << 12;
const PAGE_BITS: u32 = 12;
const INDEX_BITS: u32 = 9;
const ENTRIES: u64 = 1 << INDEX_BITS;
const TABLE_BYTES: usize = 8 * ENTRIES as usize;

/// A mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Its first virtual address.
    pub address: u64,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// 4 KiB, 2 MiB or 1 GiB.
    pub bytes: u64,
    /// Every level allows user mode.
    pub user: bool,
    /// No level forbids execution.
    pub executable: bool,
}

/// The address space in CR3 of a guest in long mode.
#[derive(Clone, Copy)]
pub struct AddressSpace<'a> {
    memory: &'a Memory,
    root: u64,
    levels: u32,
}

impl<'a> AddressSpace<'a> {
    /// The address space `sregs` names.
    pub fn new(memory: &'a Memory, sregs: &kvm_sregs) -> Self {
        let levels = if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
        Self { memory, root: sregs.cr3 & ADDRESS, levels }
    }

    fn entry(&self, table: u64, index: u64) -> u64 {
        self.memory.read_obj(GuestAddress(table + 8 * index)).unwrap_or(0)
    }

    fn canonical(&self, address: u64) -> bool {
        let unused = 64 - (PAGE_BITS + INDEX_BITS * self.levels);
        (address << unused) as i64 >> unused == address as i64
    }

    /// The page `address` lies in, if it is mapped.
    pub fn page(&self, address: u64) -> Option<Page> {
        if !self.canonical(address) {
            return None;
        }
        let (mut table, mut user, mut executable) = (self.root, true, true);
        for level in (1..=self.levels).rev() {
            let shift = PAGE_BITS + INDEX_BITS * (level - 1);
            let entry = self.entry(table, address >> shift & (ENTRIES - 1));
            if entry & PRESENT == 0 {
                return None;
            }
            user &= entry & USER != 0;
            executable &= entry & NO_EXECUTE == 0;
            if let Some(gpa) = leaf(entry, level) {
                let address = address >> shift << shift;
                return Some(Page { address, gpa, bytes: 1 << shift, user, executable });
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Guest-physical address of one byte.
    pub fn translate(&self, address: u64) -> Option<u64> {
        self.page(address).map(|page| page.gpa + (address - page.address))
    }

    /// Reads as many bytes as pages are mapped that `allowed` lets pass, at most `buffer` holds.
    pub fn read_where(
        &self,
        address: u64,
        buffer: &mut [u8],
        allowed: impl Fn(&Page) -> bool,
    ) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let at = address.wrapping_add(done as u64);
            let Some(page) = self.page(at).filter(|page| allowed(page)) else { break };
            let offset = at - page.address;
            let length = ((page.bytes - offset) as usize).min(buffer.len() - done);
            let part = &mut buffer[done..done + length];
            if self.memory.read_slice(part, GuestAddress(page.gpa + offset)).is_err() {
                break;
            }
            done += length;
        }
        done
    }

    /// Reads all of an array; `None` when a part is not mapped.
    pub fn read<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read_where(address, &mut bytes, |_| true) == N).then_some(bytes)
    }

    /// Whether user mode may have memory here: the lower half of the top-level table has an entry
    /// for it.
    pub fn has_user_half(&self) -> bool {
        let mut half = [0; ENTRIES as usize * 4];
        let readable = self.memory.read_slice(&mut half, GuestAddress(self.root)).is_ok();
        let flags = (PRESENT | USER) as u8;
        readable && half.chunks_exact(8).any(|entry| entry[0] & flags == flags)
    }

    /// Every page of the upper half the supervisor may execute, in ascending order; of several
    /// mappings of the same memory in pages of one size only the highest, which for Linux is
    /// where its code was linked to run.
    ///
    /// A guest can make any number of mappings of the little memory it has, so the search is
    /// bounded by that memory: a table is visited once at each level, and a table or page that
    /// lies outside is none.
    pub fn kernel_code(&self) -> Vec<Page> {
        let top = PAGE_BITS + INDEX_BITS * (self.levels - 1);
        let sign = u64::MAX << (top + INDEX_BITS - 1);
        let mut search = Search {
            memory: self.memory,
            tables: BTreeSet::new(),
            pages: BTreeSet::new(),
            found: Vec::new(),
        };
        search.table(self.root, self.levels, sign, ENTRIES as usize / 2);
        search.found.reverse();
        search.found
    }
}

/// So many pages of kernel code are looked at, from the highest address down: modules and the
/// kernel lie there. Linux has some thousands; a guest that makes more of its memory executable
/// bounds itself.
const KERNEL_PAGES_MAX: usize = 65_536;

/// A walk through tables that may lead anywhere, to themselves too, from the highest address down.
struct Search<'a> {
    memory: &'a Memory,
    /// Tables that were visited, with their level.
    tables: BTreeSet<(u32, u64)>,
    /// Pages that were found, with the level of their entry.
    pages: BTreeSet<(u32, u64)>,
    found: Vec<Page>,
}

impl Search<'_> {
    /// Visits the entries of a table from `first` on; its first address is `base`.
    fn table(&mut self, table: u64, level: u32, base: u64, first: usize) {
        let mut entries = [0; TABLE_BYTES];
        if self.memory.read_slice(&mut entries, GuestAddress(table)).is_err() {
            return;
        }
        let shift = PAGE_BITS + INDEX_BITS * (level - 1);
        for (index, bytes) in entries.as_chunks().0.iter().enumerate().skip(first).rev() {
            let entry = u64::from_le_bytes(*bytes);
            if entry & PRESENT == 0 || entry & NO_EXECUTE != 0 {
                continue;
            }
            let address = base | ((index as u64) << shift);
            match leaf(entry, level) {
                // A page user mode may execute is none the kernel does (SMEP, and there is none up
                // here).
                Some(_) if entry & USER != 0 => {}
                Some(gpa) => self.page(address, gpa, level),
                None => {
                    let below = (level - 1, entry & ADDRESS);
                    if self.tables.insert(below) {
                        self.table(below.1, below.0, address, 0);
                    }
                }
            }
        }
    }

    fn page(&mut self, address: u64, gpa: u64, level: u32) {
        let bytes = 1 << (PAGE_BITS + INDEX_BITS * (level - 1));
        if self.found.len() == KERNEL_PAGES_MAX {
            return;
        }
        let is_memory = self.memory.check_range(GuestAddress(gpa), bytes as usize);
        if is_memory && self.pages.insert((level, gpa)) {
            self.found.push(Page { address, gpa, bytes, user: false, executable: true });
        }
    }
}

/// Where the page lies that `entry` of a table of this level maps, unless it leads to another
/// table.
fn leaf(entry: u64, level: u32) -> Option<u64> {
    let shift = PAGE_BITS + INDEX_BITS * (level - 1);
    match level {
        1 => Some(entry & ADDRESS),
        2 | 3 if entry & LARGE != 0 => Some(entry & ADDRESS & (u64::MAX << shift)),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Where [`map`] puts its tables.
    const TABLES: u64 = 0x10_0000;

    /// Memory with an empty top-level table, and the registers that name it.
    pub fn guest() -> (Memory, kvm_sregs) {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        memory.write_obj(TABLES + 0x1000, GuestAddress(0)).unwrap();
        (memory, kvm_sregs { cr3: TABLES, cr4: 0x20, ..Default::default() })
    }

    /// Maps the 4 KiB page at `address` to `gpa` with these flags in the last entry; the upper
    /// levels allow everything. The next free table is noted at guest-physical 0.
    pub fn map(memory: &Memory, address: u64, gpa: u64, flags: u64) {
        let mut table = TABLES;
        for level in (2..=4).rev() {
            let place = table + 8 * (address >> (3 + 9 * level) & 511);
            let entry: u64 = memory.read_obj(GuestAddress(place)).unwrap();
            table = entry & ADDRESS;
            if table == 0 {
                table = memory.read_obj(GuestAddress(0)).unwrap();
                memory.write_obj(table + 0x1000, GuestAddress(0)).unwrap();
                memory.write_obj(table | 7, GuestAddress(place)).unwrap();
            }
        }
        memory.write_obj(gpa | flags, GuestAddress(table + 8 * (address >> 12 & 511))).unwrap();
    }

    const KERNEL: u64 = 0xffff_ffff_8100_0000;

    #[test]
    fn a_walk_finds_the_page_and_what_it_allows() {
        let (memory, sregs) = guest();
        map(&memory, 0x40_0000, 0x5000, PRESENT | USER);
        map(&memory, KERNEL, 0x6000, PRESENT);
        map(&memory, KERNEL + 0x1000, 0x7000, PRESENT | NO_EXECUTE);
        let space = AddressSpace::new(&memory, &sregs);
        assert_eq!(space.translate(0x40_0123), Some(0x5123));
        let page = space.page(0x40_0fff).unwrap();
        assert!(page.user && page.executable && page.bytes == 4096);
        let page = space.page(KERNEL + 0x1008).unwrap();
        assert!(!page.user && !page.executable);
        assert_eq!(space.page(0x40_1000), None);
        assert_eq!(space.page(0x0000_8000_0040_0000), None, "not canonical");
        assert!(space.has_user_half());
        let code: Vec<u64> = space.kernel_code().iter().map(|page| page.address).collect();
        assert_eq!(code, [KERNEL]);
    }

    #[test]
    fn large_pages_keep_the_low_bits_of_the_address() {
        let (memory, sregs) = guest();
        map(&memory, KERNEL, 0, PRESENT);
        // The entry of level 2 now maps 2 MiB itself; bit 12 is the PAT bit, no address.
        memory
            .write_obj(
                0x20_0000u64 | 1 << 12 | LARGE | PRESENT,
                GuestAddress(TABLES + 0x2000 + 8 * 8),
            )
            .unwrap();
        let space = AddressSpace::new(&memory, &sregs);
        assert_eq!(space.translate(KERNEL + 0x12_3456), Some(0x32_3456));
        assert_eq!(space.kernel_code()[0].bytes, 2 << 20);
        assert!(!space.has_user_half());
    }

    #[test]
    fn tables_that_lead_to_themselves_are_searched_once() {
        let (memory, sregs) = guest();
        map(&memory, KERNEL, 0x6000, PRESENT);
        // Every entry of the upper half leads back to the table it is in.
        for index in 256..511 {
            memory.write_obj(TABLES | 3, GuestAddress(TABLES + 8 * index)).unwrap();
        }
        let code = AddressSpace::new(&memory, &sregs).kernel_code();
        let frames: BTreeSet<u64> = code.iter().map(|page| page.gpa).collect();
        assert_eq!(code.len(), frames.len(), "no frame twice");
        assert!(frames.contains(&0x6000) && code.len() <= 1024, "{}", code.len());
        assert!(code.is_sorted_by_key(|page| page.address));
    }

    #[test]
    fn memory_that_is_mapped_many_times_is_found_once() {
        let (memory, sregs) = guest();
        map(&memory, KERNEL, 0x6000, PRESENT);
        // 512 mappings of the first 2 MiB, and as many of memory that is not there.
        for index in 0..512 {
            memory.write_obj(LARGE | 3, GuestAddress(0x30_0000 + 8 * index)).unwrap();
            memory.write_obj(1 << 40 | LARGE | 3, GuestAddress(0x30_1000 + 8 * index)).unwrap();
        }
        for (index, table) in [(300, 0x30_0000u64), (301, 0x30_1000)] {
            memory.write_obj(table | 3, GuestAddress(TABLES + 0x1000 + 8 * (index - 256))).unwrap();
        }
        let large: Vec<Page> = AddressSpace::new(&memory, &sregs)
            .kernel_code()
            .into_iter()
            .filter(|page| page.bytes == 2 << 20)
            .collect();
        assert_eq!(large.len(), 1, "{large:x?}");
    }

    #[test]
    fn a_guest_with_more_pages_than_a_kernel_has_is_not_remembered_whole() {
        const FRAMES: u64 = KERNEL_PAGES_MAX as u64 + 512;
        let (top, second, third, last) = (FRAMES, FRAMES + 1, FRAMES + 2, FRAMES + 3);
        let frames = last + FRAMES / 512;
        let memory = Memory::from_ranges(&[(GuestAddress(0), (frames << PAGE_BITS) as usize)]);
        let memory = memory.unwrap();
        let link = |table: u64, index: u64, frame: u64| {
            let place = GuestAddress((table << PAGE_BITS) + 8 * index);
            memory.write_obj(frame << PAGE_BITS | 3, place).unwrap();
        };
        link(top, 511, second);
        link(second, 0, third);
        (0..FRAMES / 512).for_each(|index| link(third, index, last + index));
        (0..FRAMES).for_each(|frame| link(last + frame / 512, frame % 512, frame));
        let sregs = kvm_sregs { cr3: top << PAGE_BITS, cr4: 0x20, ..Default::default() };
        let code = AddressSpace::new(&memory, &sregs).kernel_code();
        assert_eq!(code.len(), KERNEL_PAGES_MAX);
        // From the highest address down, which is where kernels are.
        assert_eq!(code.last().unwrap().gpa, (FRAMES - 1) << PAGE_BITS);
    }

    #[test]
    fn a_read_stops_where_the_mapping_ends() {
        let (memory, sregs) = guest();
        map(&memory, 0x1000, 0x5000, PRESENT | USER);
        map(&memory, 0x2000, 0x9000, PRESENT);
        memory.write_slice(&[1, 2], GuestAddress(0x5ffe)).unwrap();
        memory.write_slice(&[3, 4], GuestAddress(0x9000)).unwrap();
        let space = AddressSpace::new(&memory, &sregs);
        assert_eq!(space.read(0x1ffe), Some([1, 2, 3, 4]));
        assert_eq!(space.read::<4>(0x2ffe), None);
        let mut bytes = [0; 4];
        assert_eq!(space.read_where(0x1ffe, &mut bytes, |page| page.user), 2);
    }

    #[test]
    fn five_levels_are_walked_where_the_guest_has_them() {
        let (memory, mut sregs) = guest();
        map(&memory, KERNEL, 0x6000, PRESENT);
        // A table above the four: its last entry leads to them.
        const TOP: u64 = 0x20_0000;
        memory.write_obj(TABLES | PRESENT, GuestAddress(TOP + 8 * 511)).unwrap();
        sregs.cr3 = TOP;
        sregs.cr4 |= CR4_LA57;
        let space = AddressSpace::new(&memory, &sregs);
        assert_eq!(space.translate(KERNEL + 5), Some(0x6005));
        assert_eq!(space.translate(KERNEL & ((1 << 57) - 1)), None, "not canonical");
        assert_eq!(space.translate(0x40_0000), None);
        assert_eq!(space.kernel_code()[0].address, KERNEL);
    }

    #[test]
    fn tables_and_pages_that_lie_outside_of_memory_are_none() {
        let (memory, sregs) = guest();
        map(&memory, KERNEL, 0x6000, PRESENT);
        map(&memory, KERNEL + 0x1000, 1 << 40, PRESENT);
        let space = AddressSpace::new(&memory, &sregs);
        assert_eq!(space.read::<2>(KERNEL + 0xffe), Some([0, 0]));
        assert_eq!(space.read::<2>(KERNEL + 0xfff), None);
        assert_eq!(space.kernel_code().len(), 1);
        let nowhere = AddressSpace::new(&memory, &kvm_sregs { cr3: 1 << 40, ..sregs });
        assert_eq!((nowhere.page(KERNEL), nowhere.kernel_code().len()), (None, 0));
        assert!(!nowhere.has_user_half());
    }
}
