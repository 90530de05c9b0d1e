//! Pieces of code at fixed addresses, and the ELF they become.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, CodeLabel};

use super::layout::{STATE, STREAMS, TEXT, USER, tables};

/// Code that grows at its end.
pub struct Section {
    base: u64,
    bytes: Vec<u8>,
}

impl Section {
    fn new(base: u64) -> Self {
        Self { base, bytes: Vec::new() }
    }

    /// The address of what is added next.
    pub fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Adds bytes as they are.
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Adds what `write` assembles; returns its address.
    ///
    /// # Errors
    /// What cannot be encoded.
    pub fn assemble(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<u64, IcedError> {
        let address = self.here();
        let mut assembler = CodeAssembler::new(64)?;
        write(&mut assembler)?;
        self.bytes.extend(assembler.assemble(address)?);
        Ok(address)
    }
}

/// A guest under construction.
pub struct Code {
    /// Ring 0, run from its start to its end.
    pub text: Section,
    /// Ring-0 streams.
    pub streams: Section,
    /// Ring-3 streams.
    pub user: Section,
}

impl Code {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { text: Section::new(TEXT), streams: Section::new(STREAMS), user: Section::new(USER) }
    }

    /// The ELF that `ftvmm --kernel` takes. Ring-0 code has executable sections, in which ftvmm
    /// looks for RDTSC; ring-3 code lies in one that is not marked so, as a program's text
    /// would for a real kernel.
    pub fn into_elf(self, entry: u64, vectors: &[u64; 256]) -> Vec<u8> {
        let data = tables(vectors);
        let parts = [
            Part { name: ".text", address: TEXT, bytes: self.text.bytes, executable: true },
            Part {
                name: ".streams",
                address: STREAMS,
                bytes: self.streams.bytes,
                executable: true,
            },
            Part { name: ".user", address: USER, bytes: self.user.bytes, executable: false },
            Part { name: ".data", address: STATE, bytes: data, executable: false },
        ];
        elf(entry, &parts)
    }
}

/// A label at the place where it is made.
///
/// # Errors
/// None in practice: a label is set once.
pub fn label_here(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut label = a.create_label();
    a.set_label(&mut label)?;
    Ok(label)
}

struct Part {
    name: &'static str,
    address: u64,
    bytes: Vec<u8>,
    executable: bool,
}

const HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const SECTION_HEADER_BYTES: u64 = 64;
const NAMES: &str = ".shstrtab";

/// Lays a static x86-64 ELF out: header, program headers, contents, names, section headers (ELF-64
/// Object File Format, version 1.5).
fn elf(entry: u64, parts: &[Part]) -> Vec<u8> {
    const SHF_ALLOC: u64 = 2;
    const SHF_EXECINSTR: u64 = 4;
    let count = parts.len() as u64;
    let mut offset = HEADER_BYTES + count * PROGRAM_HEADER_BYTES;
    let mut programs = Vec::new();
    let mut contents = Vec::new();
    let mut names = vec![0];
    let mut sections = vec![0; SECTION_HEADER_BYTES as usize];
    let section = |name: usize, kind: u32, fields: [u64; 4]| {
        let mut header = Vec::from((name as u32).to_le_bytes());
        header.extend(kind.to_le_bytes());
        header.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        header.extend([0; 8]);
        header.extend([1_u64, 0].iter().flat_map(|field| field.to_le_bytes()));
        header
    };
    for part in parts {
        let length = part.bytes.len() as u64;
        programs.extend([1_u32, 7].iter().flat_map(|field| field.to_le_bytes()));
        let fields = [offset, part.address, part.address, length, length, 1];
        programs.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        let flags = SHF_ALLOC | if part.executable { SHF_EXECINSTR } else { 0 };
        sections.extend(section(names.len(), 1, [flags, part.address, offset, length]));
        names.extend(part.name.bytes().chain([0]));
        contents.extend(&part.bytes);
        offset += length;
    }
    let own_name = names.len();
    names.extend(NAMES.bytes().chain([0]));
    sections.extend(section(own_name, 3, [0, 0, offset, names.len() as u64]));
    let section_table = offset + names.len() as u64;

    let mut file = Vec::from(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([entry, HEADER_BYTES, section_table].iter().flat_map(|f| f.to_le_bytes()));
    file.extend([0; 4]);
    let sizes =
        [HEADER_BYTES, PROGRAM_HEADER_BYTES, count, SECTION_HEADER_BYTES, count + 2, count + 1];
    file.extend(sizes.iter().flat_map(|&size| (size as u16).to_le_bytes()));
    for part in [programs, contents, names, sections] {
        file.extend(part);
    }
    file
}
