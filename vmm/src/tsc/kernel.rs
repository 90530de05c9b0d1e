//! The kernel's own code, patched before it is loaded.

use std::collections::BTreeSet;
use std::ops::Range;

use super::code::{candidates, find};

/// Section flags of the ELF specification: occupies memory, is executable.
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const SHT_NOBITS: u32 = 8;
/// Replacements for alternatives are code, though their section is not marked executable in every kernel.
const ALTERNATIVES: &str = ".altinstr_replacement";

/// What is known of a kernel's code.
#[derive(Clone, Debug, Default)]
pub struct KernelCode {
    /// RDTSC and RDTSCP instructions that were replaced.
    pub rdtsc_sites: usize,
    /// Moves from and to CR4 that were replaced.
    pub cr4_sites: usize,
    pub(super) sections: Vec<Section>,
}

/// A section with code.
#[derive(Clone, Debug)]
pub(super) struct Section {
    /// Virtual addresses.
    pub addresses: Range<u64>,
    /// Offsets of what looks like a trapped instruction and is a part of another.
    pub decoys: BTreeSet<usize>,
}

/// Replaces every trapped instruction in the executable sections of the kernel `elf`, in place.
pub fn patch(elf: &mut [u8]) -> KernelCode {
    let mut kernel = KernelCode::default();
    let sections: Vec<_> = executable_sections(elf).collect();
    for (address, range) in sections {
        let Some(code) = elf.get_mut(range) else {
            continue;
        };
        for site in find(code) {
            let counter = if site.trapped.reads_counter() {
                &mut kernel.rdtsc_sites
            } else {
                &mut kernel.cr4_sites
            };
            *counter += 1;
            site.trapped.replace(&mut code[site.range]);
        }
        let addresses = address..address.saturating_add(code.len() as u64);
        kernel.sections.push(Section { addresses, decoys: candidates(code).collect() });
    }
    kernel
}

/// Address and file range of each section with code, straight from the section header table.
fn executable_sections(elf: &[u8]) -> impl Iterator<Item = (u64, Range<usize>)> {
    let u16_at = |at: usize| elf.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    let table = u64_at(elf, 0x28) as usize;
    let (entry_bytes, count) = (usize::from(u16_at(0x3a)), usize::from(u16_at(0x3c)));
    let names = table + usize::from(u16_at(0x3e)) * entry_bytes;
    let names_offset = u64_at(elf, names + 0x18) as usize;
    (0..count).filter_map(move |i| {
        let header = table + i * entry_bytes;
        let name = elf.get(names_offset + u32_at(elf, header) as usize..)?;
        let kind = u32_at(elf, header + 4);
        let flags = u64_at(elf, header + 8);
        let is_code = flags & SHF_EXECINSTR != 0 || name.starts_with(ALTERNATIVES.as_bytes());
        if kind == SHT_NOBITS || flags & SHF_ALLOC == 0 || !is_code {
            return None;
        }
        let offset = u64_at(elf, header + 0x18) as usize;
        let size = u64_at(elf, header + 0x20) as usize;
        Some((u64_at(elf, header + 0x10), offset..offset.checked_add(size)?))
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_sections_is_left_alone() {
        let kernel = patch(&mut b"\x7fELF".to_vec());
        assert_eq!((kernel.rdtsc_sites, kernel.cr4_sites, kernel.sections.len()), (0, 0, 0));
    }
}
