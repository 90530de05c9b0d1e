//! What stands at an instruction pointer: the instruction, and the function it belongs to.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use ftvmm_host::user_file;
use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};
use object::{File, Object, ObjectSection, ObjectSymbol, SectionKind};

use super::CommandError;

/// With debugging information a kernel has some hundred MiB.
const VMLINUX_BYTES_MAX: u64 = 4 << 30;

/// The functions of a kernel. Names and addresses are those it was linked with: a kernel that moves
/// itself at boot (KASLR) is not found.
#[derive(Default)]
pub struct Symbols {
    /// Name by first address; of several the file has, the first.
    functions: BTreeMap<u64, String>,
    /// Where code is.
    text: Vec<Range<u64>>,
}

impl Symbols {
    /// Reads the symbol table of an ELF file.
    ///
    /// # Errors
    /// When it is none, or has no names of functions.
    pub fn read(path: &Path) -> Result<Self, CommandError> {
        let what = "vmlinux";
        let file = |cause| CommandError::File { what, path: path.into(), cause };
        let bytes = user_file::read(what, path, VMLINUX_BYTES_MAX, "no kernel is so long")?;
        let parsed = File::parse(&*bytes).map_err(|e| file(std::io::Error::other(e)))?;
        let symbols = Self::of(&parsed);
        if symbols.functions.is_empty() {
            let none = "it has no symbols of functions; a stripped kernel has none";
            return Err(file(std::io::Error::other(none)));
        }
        Ok(symbols)
    }

    fn of(file: &File<'_>) -> Self {
        let mut found = Self::default();
        let sections = file.sections().filter(|section| section.kind() == SectionKind::Text);
        let sections: Vec<_> = sections.collect();
        found.text = sections.iter().map(|s| s.address()..s.address() + s.size()).collect();
        for symbol in file.symbols() {
            let is_code = sections.iter().any(|s| Some(s.index()) == symbol.section_index());
            let name = symbol.name().unwrap_or_default();
            if is_code && symbol.is_definition() && !name.is_empty() {
                found.functions.entry(symbol.address()).or_insert_with(|| name.to_owned());
            }
        }
        found
    }

    /// `name+0x12`, if the address lies in the kernel's code.
    fn name(&self, address: u64) -> Option<String> {
        self.text.iter().find(|range| range.contains(&address))?;
        let (start, name) = self.functions.range(..=address).next_back()?;
        Some(format!("{name}+{:#x}", address - start))
    }

    /// One line: address, name, and the instruction that begins with `code`. Decoded as 64-bit
    /// code, which all of the kernel is.
    pub fn place(&self, rip: u64, code: &[u8]) -> String {
        let name = self.name(rip).map_or_else(String::new, |name| format!(" <{name}>"));
        format!("{rip:#x}{name}: {}", instruction(rip, code))
    }
}

fn instruction(rip: u64, code: &[u8]) -> String {
    let decoded = Decoder::with_ip(64, code, rip, DecoderOptions::NONE).decode();
    if decoded.is_invalid() {
        let bytes: Vec<_> = code.iter().map(|byte| format!("{byte:02x}")).collect();
        return format!("no instruction ({})", bytes.join(" "));
    }
    let mut formatter = NasmFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_space_after_operand_separator(true);
    let mut text = String::new();
    formatter.format(&decoded, &mut text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols() -> Symbols {
        let functions = [(0x1000, "start"), (0x1040, "idle")].map(|(at, n)| (at, n.to_owned()));
        let text = 0x1000..0x1080;
        Symbols { functions: functions.into(), text: vec![text] }
    }

    #[test]
    fn a_place_has_address_name_and_instruction() {
        let cases: [(u64, &[u8], &str); 5] = [
            (0x1000, &[0xec, 0x90], "0x1000 <start+0x0>: in al, dx"),
            (0x1044, &[0xf4], "0x1044 <idle+0x4>: hlt"),
            (0x1080, &[0x48, 0x8b, 0x43, 0x10], "0x1080: mov rax, [rbx+0x10]"),
            (0xfff, &[0x48], "0xfff: no instruction (48)"),
            (0xfff, &[], "0xfff: no instruction ()"),
        ];
        for (rip, code, expected) in cases {
            assert_eq!(symbols().place(rip, code), expected);
        }
        assert_eq!(Symbols::default().place(0x1000, &[0x90]), "0x1000: nop");
    }

    #[test]
    fn a_program_with_symbols_is_read_and_what_is_none_refused() {
        let own = std::env::current_exe().unwrap();
        let symbols = Symbols::read(&own).unwrap();
        let (&at, name) = symbols.functions.iter().find(|(_, name)| *name == "main").unwrap();
        assert_eq!(symbols.name(at + 3).unwrap(), format!("{name}+0x3"));
        assert_eq!(symbols.name(0), None);

        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("vmlinux");
        std::fs::write(&text, "no ELF file").unwrap();
        for path in [text, folder.path().join("absent")] {
            let error = Symbols::read(&path).err().unwrap().to_string();
            assert!(error.starts_with("vmlinux '") && error.lines().count() == 1, "{error}");
        }
    }
}
