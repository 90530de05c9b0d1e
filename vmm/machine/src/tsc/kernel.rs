//! The kernel's own code, patched before it runs: in its file before it is loaded, or in memory
//! when the guest starts another kernel (kexec).
//!
//! Of a file the section headers say where code is. A kernel in memory has none any more; its
//! symbols say it.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::code::{HOOK, SITES_MAX, candidates, find};
use super::hook::{FUNCTIONS, Hook, PROLOGUE_BYTES};
use super::symbols::Symbols;

/// Section flags of the ELF specification: occupies memory, is executable.
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const SHT_NOBITS: u32 = 8;
/// Replacements for alternatives are code, though their section is not marked executable in every
/// kernel.
const ALTERNATIVES: &str = ".altinstr_replacement";
/// A kernel is the one that was patched while so small a part of its patches is in place:
/// alternatives and the end of the init sections take some away.
const KNOWN_SHARE: usize = 8;

/// What is known of a kernel's code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelCode {
    /// RDTSC and RDTSCP instructions that were replaced.
    pub rdtsc_sites: usize,
    /// Moves from and to CR4 that were replaced.
    pub cr4_sites: usize,
    pub(super) sections: Vec<Section>,
    /// The functions that make memory executable.
    pub(super) hooks: Vec<Hook>,
    /// Places where instructions were replaced that are not executed while a kernel starts, and the
    /// replacements.
    pub(super) marks: Vec<(u64, [u8; 2])>,
}

/// A section with code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Section {
    /// Virtual addresses.
    pub addresses: Range<u64>,
    /// Offsets of what looks like a trapped instruction and is a part of another.
    pub decoys: BTreeSet<usize>,
}

/// Whether an address is in the half that kernels have.
pub fn is_kernel_address(address: u64) -> bool {
    address >> 63 == 1
}

/// Replaces every trapped instruction in the executable sections of the kernel `elf`, in place, and
/// hooks the functions that make memory executable.
pub fn patch(elf: &mut [u8]) -> KernelCode {
    let sections: Vec<_> = executable_sections(elf).collect();
    let functions = Symbols::find(elf).map(|symbols| symbols.addresses(FUNCTIONS));
    patch_sections(elf, &sections, functions.as_ref().map_or(&[], |functions| functions))
}

/// Does as [`patch`] for the kernel whose `image` starts at the virtual address `base`; `None` when
/// it has no symbols.
pub fn patch_image(image: &mut [u8], base: u64) -> Option<KernelCode> {
    let symbols = Symbols::find(image)?;
    let names = ["_text", "_etext", "_sinittext", "_einittext", "__alt_instructions_end"];
    let [text, text_end, init, init_end, alternatives] = symbols.addresses(names);
    let functions = symbols.addresses(FUNCTIONS);
    // What replaces alternatives follows the list of them and has no symbol of its own.
    let alternatives_end = alternatives.and_then(|start| symbols.next_after(start));
    let ranges = [(text, text_end), (init, init_end), (alternatives, alternatives_end)];
    let sections: Vec<_> = ranges
        .into_iter()
        .filter_map(|(start, end)| {
            let (start, end) = (start?, end?);
            let offset = |address: u64| usize::try_from(address.checked_sub(base)?).ok();
            let range = offset(start)?..offset(end)?;
            (range.start < range.end && range.end <= image.len()).then_some((start, range))
        })
        .collect();
    let kernel = patch_sections(image, &sections, &functions);
    (!kernel.sections.is_empty()).then_some(kernel)
}

fn patch_sections(
    image: &mut [u8],
    sections: &[(u64, Range<usize>)],
    functions: &[Option<u64>],
) -> KernelCode {
    let mut kernel = KernelCode::default();
    for (address, range) in sections {
        let Some(code) = image.get_mut(range.clone()) else {
            continue;
        };
        for site in find(code) {
            if site.trapped.reads_counter() {
                kernel.rdtsc_sites += 1;
                let at = address.saturating_add(site.range.start as u64);
                kernel.marks.push((at, site.trapped.replacement()));
            } else {
                kernel.cr4_sites += 1;
            }
            site.trapped.replace(&mut code[site.range]);
        }
        for &function in functions.iter().flatten() {
            let at = function.checked_sub(*address).and_then(|at| usize::try_from(at).ok());
            let Some(prologue) = at.and_then(|at| code.get_mut(at..at + PROLOGUE_BYTES)) else {
                continue;
            };
            if let Some(hook) = Hook::choose(function, prologue) {
                let at = (hook.address() - function) as usize;
                prologue[at..at + HOOK.len()].copy_from_slice(&HOOK);
                kernel.marks.push((hook.address(), HOOK));
                kernel.hooks.push(hook);
            }
        }
        let addresses = *address..address.saturating_add(code.len() as u64);
        kernel
            .sections
            .push(Section { addresses, decoys: candidates(code).take(SITES_MAX).collect() });
    }
    kernel
}

impl KernelCode {
    /// Whether anything of it was patched, so that it can be told from another.
    pub fn is_marked(&self) -> bool {
        !self.marks.is_empty()
    }

    /// Whether the kernel in memory is this one: `read` gives the two bytes at an address.
    pub fn is_there(&self, read: impl Fn(u64) -> Option<[u8; 2]>) -> bool {
        let in_place = self.marks.iter().filter(|(at, bytes)| read(*at) == Some(*bytes)).count();
        in_place > self.marks.len() / KNOWN_SHARE
    }
}

/// Address and file range of each section with code, straight from the section header table.
fn executable_sections(elf: &[u8]) -> impl Iterator<Item = (u64, Range<usize>)> {
    let u16_at = |at: usize| elf.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    let table = u64_at(elf, 0x28) as usize;
    let (entry_bytes, count) = (usize::from(u16_at(0x3a)), usize::from(u16_at(0x3c)));
    // The file may say anything; a place that no number holds is outside like any other.
    let header_at = move |number: usize| {
        let place = table.saturating_add(number * entry_bytes);
        elf.get(place..).unwrap_or_default()
    };
    let names_offset = u64_at(header_at(usize::from(u16_at(0x3e))), 0x18) as usize;
    (0..count).filter_map(move |number| {
        let header = header_at(number);
        let name = elf.get(names_offset.saturating_add(u32_at(header, 0) as usize)..)?;
        let kind = u32_at(header, 4);
        let flags = u64_at(header, 8);
        let is_code = flags & SHF_EXECINSTR != 0 || name.starts_with(ALTERNATIVES.as_bytes());
        if kind == SHT_NOBITS || flags & SHF_ALLOC == 0 || !is_code {
            return None;
        }
        let offset = u64_at(header, 0x18) as usize;
        let size = u64_at(header, 0x20) as usize;
        Some((u64_at(header, 0x10), offset..offset.checked_add(size)?))
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::symbols::tests::{BASE, append_tables, names};
    use super::*;
    use crate::tests::elf_with;

    const RDTSC: [u8; 2] = [0x0f, 0x31];
    /// `set_memory_x` of Debian's 6.1, without its call of ftrace: sub rsp, 8 ; xor eax, eax.
    const SET_MEMORY_X: [u8; 6] = [0x48, 0x83, 0xec, 0x08, 0x31, 0xc0];
    /// Where it lies in [`image`].
    pub const HOOKED: usize = 0x12c0;
    /// RDTSC in the text, among the init functions, and among the alternatives.
    pub const SITES: [usize; 3] = [0x20, 0x19b0, 0x1ae0];
    /// RDTSC that nobody executes.
    const DATA: usize = 0x1950;

    /// A kernel in memory, from [`BASE`] on, and the symbols of its parts.
    pub fn image() -> Vec<u8> {
        let mut image = vec![0x90; 0x2600];
        for at in SITES.into_iter().chain([DATA]) {
            image[at..at + 2].copy_from_slice(&RDTSC);
        }
        // mov rax, cr4
        image[0x40..0x43].copy_from_slice(&[0x0f, 0x20, 0xe0]);
        image[HOOKED..HOOKED + SET_MEMORY_X.len()].copy_from_slice(&SET_MEMORY_X);
        let mut names = names();
        for (number, name) in [
            (1, "T_text"),
            (400, "T_etext"),
            (410, "T_sinittext"),
            (420, "T_einittext"),
            (430, "D__alt_instructions_end"),
        ] {
            names[number] = name.into();
        }
        append_tables(&mut image, &names, true, true);
        image
    }

    #[test]
    fn a_kernel_in_memory_is_patched_where_its_symbols_say_code_is() {
        let (before, mut after) = (image(), image());
        let kernel = patch_image(&mut after, BASE).unwrap();
        assert_eq!((kernel.rdtsc_sites, kernel.cr4_sites, kernel.hooks.len()), (3, 1, 2));
        assert_eq!(kernel.hooks[0].address(), BASE + HOOKED as u64);
        for (at, bytes) in SITES.map(|at| (at, [0xe5, 0x55])).into_iter().chain([
            (0x40, [0xe4, 0x10]),
            (HOOKED, HOOK),
            (HOOKED + 0x20, HOOK),
            (DATA, RDTSC),
        ]) {
            assert_eq!(after[at..at + 2], bytes, "{at:#x}");
        }
        let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert_eq!(changed, 3 * 2 + 3 + 2 * 2);
        assert!(kernel.is_marked());
    }

    #[test]
    fn a_kernel_is_known_by_a_part_of_what_was_put_into_it() {
        let mut image = image();
        let kernel = patch_image(&mut image, BASE).unwrap();
        let there = |image: &[u8]| {
            kernel.is_there(|address| image[(address - BASE) as usize..].first_chunk().copied())
        };
        assert!(there(&image));
        // The two hooks are left, then one of them, then nothing.
        SITES.iter().for_each(|at| image[*at] = 0);
        assert!(there(&image));
        image[HOOKED] = 0;
        assert!(there(&image));
        image[HOOKED + 0x20] = 0;
        assert!(!there(&image));
        assert!(!kernel.is_there(|_| None));
        assert!(!KernelCode::default().is_marked());
    }

    #[test]
    fn symbols_that_lead_out_of_the_image_are_no_sections() {
        let mut image = image();
        // It begins higher than its symbols are, or lower by more than it is long.
        for base in [BASE + 0x10_0000, BASE - 0x10_0000] {
            assert_eq!(patch_image(&mut image, base), None);
        }
        assert_eq!(patch_image(&mut image[..0x2600], BASE), None, "no symbols");
    }

    #[test]
    fn code_is_what_the_section_headers_of_a_file_say() {
        const PROGRESS: u32 = 1;
        let code = [0x0f, 0x31, 0x0f, 0x22, 0xe3, 0xf4];
        let sites = |flags, kind| {
            let mut file = elf_with(&code, BASE, flags, kind);
            let kernel = patch(&mut file);
            (kernel.rdtsc_sites, kernel.cr4_sites)
        };
        assert_eq!(sites(SHF_ALLOC | SHF_EXECINSTR, PROGRESS), (1, 1));
        assert_eq!(sites(SHF_ALLOC, PROGRESS), (0, 0), "data");
        assert_eq!(sites(SHF_EXECINSTR, PROGRESS), (0, 0), "not in memory");
        assert_eq!(sites(SHF_ALLOC | SHF_EXECINSTR, SHT_NOBITS), (0, 0), "not in the file");
        // Alternatives are code by their name.
        let mut file = elf_with(&code, BASE, SHF_ALLOC, PROGRESS);
        let strings = u64_at(&file, 0x28) as usize + 2 * 64 + 0x18;
        let alternatives = file.len() as u64;
        file.extend(b"\0.altinstr_replacement\0");
        file[strings..strings + 8].copy_from_slice(&alternatives.to_le_bytes());
        assert_eq!(patch(&mut file).rdtsc_sites, 1);
    }

    #[test]
    fn a_damaged_header_leads_nowhere() {
        let whole = elf_with(&[0x0f, 0x31, 0xf4], BASE, 6, 1);
        let table = u64_at(&whole, 0x28) as usize;
        let fields = [0x28, 0x3a, 0x3c, 0x3e, table + 64 + 0x18, table + 64 + 0x20]
            .into_iter()
            .chain([table + 64, table + 64 + 0x10, table + 128 + 0x18]);
        for field in fields {
            for value in [u64::MAX, u64::MAX - 64, 1 << 63, 0] {
                let mut file = whole.clone();
                file[field..field + 8].copy_from_slice(&value.to_le_bytes());
                patch(&mut file);
            }
        }
    }

    #[test]
    fn a_file_without_sections_is_left_alone() {
        let kernel = patch(&mut b"\x7fELF".to_vec());
        assert_eq!((kernel.rdtsc_sites, kernel.cr4_sites, kernel.sections.len()), (0, 0, 0));
    }
}
