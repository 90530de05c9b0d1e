//! Kernel RDTSC and RDTSCP become port reads, which every KVM hands to us (design.md section 2):
//! `RDTSC` (0F 31) turns into `IN EAX, imm8` (E5 ib), `RDTSCP` (0F 01 F9) into the same and a NOP.

use iced_x86::{Code, Decoder, DecoderOptions};

/// A 4-byte read here was `RDTSC`.
pub const RDTSC_PORT: u16 = 0x55;
/// A 4-byte read here was `RDTSCP`.
pub const RDTSCP_PORT: u16 = 0x56;

/// IN EAX, imm8 (AMD APM vol. 3, IN).
const IN_EAX_IMM8: u8 = 0xe5;
const NOP: u8 = 0x90;

/// Section flags of the ELF specification: occupies memory, is executable.
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const SHT_NOBITS: u32 = 8;
/// Replacements for alternatives are code, though their section is not marked executable in every kernel.
const ALTERNATIVES: &str = ".altinstr_replacement";

/// Patches every RDTSC and RDTSCP in the executable sections of the kernel `elf`, in place, and returns how
/// many there were.
pub fn patch(elf: &mut [u8]) -> usize {
    let sections: Vec<_> = executable_sections(elf).collect();
    let mut patched = 0;
    for (address, range) in sections {
        let Some(code) = elf.get_mut(range) else {
            continue;
        };
        patched += patch_section(address, code);
    }
    patched
}

fn patch_section(address: u64, code: &mut [u8]) -> usize {
    let mut sites = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    while decoder.can_decode() {
        let at = decoder.position();
        let port = match decoder.decode().code() {
            Code::Rdtsc => RDTSC_PORT,
            Code::Rdtscp => RDTSCP_PORT,
            _ => continue,
        };
        sites.push((at..decoder.position(), port));
    }
    for (range, port) in &sites {
        // Prefixes, if any, stay in front: only the opcode bytes at the end are replaced.
        let length = if *port == RDTSC_PORT { 2 } else { 3 };
        let bytes = &mut code[range.end - length..range.end];
        bytes.fill(NOP);
        bytes[0] = IN_EAX_IMM8;
        bytes[1] = *port as u8;
    }
    sites.len()
}

/// Address and file range of each section with code, straight from the section header table.
fn executable_sections(elf: &[u8]) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
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
    fn patches_instructions_and_nothing_that_only_looks_like_one() {
        // mov eax,0x310f ; rdtsc ; lfence ; rdtscp ; ret
        let mut code =
            vec![0xb8, 0x0f, 0x31, 0, 0, 0x0f, 0x31, 0x0f, 0xae, 0xe8, 0x0f, 0x01, 0xf9, 0xc3];
        assert_eq!(patch_section(0, &mut code), 2);
        let wanted = [0xb8, 0x0f, 0x31, 0, 0, 0xe5, 0x55, 0x0f, 0xae, 0xe8, 0xe5, 0x56, 0x90, 0xc3];
        assert_eq!(code, wanted);
    }

    #[test]
    fn a_file_without_sections_is_left_alone() {
        assert_eq!(patch(&mut b"\x7fELF".to_vec()), 0);
    }
}
