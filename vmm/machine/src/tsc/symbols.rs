//! The symbol table a Linux kernel carries in its read-only data (`CONFIG_KALLSYMS`), found without
//! a header.
//!
//! Nothing points to it from outside, so it is found by its shape (Linux, `scripts/kallsyms.c`).
//! From 5.10 to 6.12:
//!
//! | table | what |
//! |---|---|
//! | `num_syms` | u32 |
//! | `names` | for each symbol its length (one byte; from 6.1 on two when the first has bit 7 set) and that many token numbers |
//! | `markers` | u32 offsets into `names` |
//! | `token_table` | 256 strings, each with a zero behind it |
//! | `token_index` | 256 u16 offsets into `token_table` |
//! | `offsets` | i32 for each symbol, ascending; up to 6.3 before `num_syms` |
//! | `relative_base` | u64, behind `offsets` |
//!
//! All are aligned to 8 bytes. The first character of a decoded name is the symbol's type as nm(1)
//! prints it. A table is believed when all its names are there and its addresses ascend. The search
//! gives up after a number of steps that no real kernel needs, whatever the bytes are.

use memchr::memmem;

/// `0` to `9` stand for themselves in every token table.
const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
const TOKENS: usize = 256;
const INDEX_BYTES: usize = 2 * TOKENS;
/// `token_index` lies so near behind the digits.
const INDEX_SEARCH_BYTES: usize = 16 << 10;
/// Names are at most so far in front of the tokens.
const NAMES_SEARCH_BYTES: usize = 32 << 20;
/// No kernel has fewer or more symbols.
const SYMBOLS: std::ops::Range<usize> = 256..2_000_000;
/// Places that may be a token table are looked at, no more.
const TOKEN_TABLES_MAX: usize = 64;
/// Names that are passed over, at all places taken for `names` together.
const SKIPPED_NAMES_MAX: usize = 1 << 24;
/// Decoded before a place is taken for `names`.
const PROBED_NAMES: usize = 16;
/// `KSYM_NAME_LEN` of 6.1, and the type.
const NAME_BYTES_MAX: usize = 513;
const TYPES: &[u8] = b"aAbBcCdDgGiInNpPrRsStTuUvVwW-?";
const TABLE_ALIGNMENT: usize = 8;
/// Kernels are linked to the last addresses (Linux, `__START_KERNEL_map`), at the start of a page.
const LINKED_FROM: u64 = 0xffff_ffff_8000_0000;
const PAGE_BYTES: u64 = 4096;

/// A kernel's symbols.
pub struct Symbols<'a> {
    bytes: &'a [u8],
    tokens: Tokens<'a>,
    count: usize,
    names: usize,
    offsets: usize,
    base: u64,
}

struct Tokens<'a> {
    table: &'a [u8],
    index: [u16; TOKENS],
    /// Where they start and where their index ends.
    start: usize,
    end: usize,
}

impl<'a> Symbols<'a> {
    /// Finds the table in the image of a kernel.
    pub fn find(bytes: &'a [u8]) -> Option<Self> {
        memmem::find_iter(bytes, DIGITS).take(TOKEN_TABLES_MAX).find_map(|digits| {
            let tokens = Tokens::around(bytes, digits)?;
            Self::in_front_of(bytes, tokens)
        })
    }

    fn in_front_of(bytes: &'a [u8], tokens: Tokens<'a>) -> Option<Self> {
        let last = tokens.start / TABLE_ALIGNMENT * TABLE_ALIGNMENT;
        let first = last.saturating_sub(NAMES_SEARCH_BYTES);
        let mut skipped = 0;
        let at = (first..last).step_by(TABLE_ALIGNMENT).rev().find(|&at| {
            let count = u32_at(bytes, at).unwrap_or(0) as usize;
            let names = at + 8;
            let is_likely = SYMBOLS.contains(&count)
                && u32_at(bytes, at + 4) == Some(0)
                && tokens.decode(bytes, names).take(PROBED_NAMES).flatten().count() == PROBED_NAMES;
            if !is_likely || skipped > SKIPPED_NAMES_MAX {
                return false;
            }
            skipped += count;
            tokens.skip(bytes, names, count).is_some_and(|end| end <= tokens.start)
        })?;
        let count = u32_at(bytes, at)? as usize;
        let offsets_bytes = (4 * count).next_multiple_of(TABLE_ALIGNMENT);
        let before =
            at.checked_sub(8).and_then(|base| Some((base.checked_sub(offsets_bytes)?, base)));
        let behind = tokens.end.next_multiple_of(TABLE_ALIGNMENT);
        [before, Some((behind, behind + offsets_bytes))].into_iter().flatten().find_map(|place| {
            let (offsets, base_at) = place;
            let base = u64_at(bytes, base_at).filter(|base| is_base(*base))?;
            let index = tokens.index;
            let tokens = Tokens { index, ..tokens };
            let symbols = Self { bytes, tokens, count, names: at + 8, offsets, base };
            symbols.is_ascending().then_some(symbols)
        })
    }

    /// Addresses are in ascending order, as the kernel's binary search needs them; per-CPU ones
    /// come first.
    fn is_ascending(&self) -> bool {
        let mut last = 0;
        (0..self.count).all(|number| {
            let Some(address) = self.address_of(number) else { return false };
            let ascends = address >= last;
            last = address;
            ascends
        })
    }

    /// Address of a symbol. With `CONFIG_KALLSYMS_ABSOLUTE_PERCPU`, which kernels for several
    /// processors have up to 6.14, an offset that is not negative is an address itself.
    fn address_of(&self, number: usize) -> Option<u64> {
        let offset = u32_at(self.bytes, self.offsets + 4 * number)? as i32;
        Some(if self.negative_offsets() && offset >= 0 {
            offset as u64
        } else if offset < 0 {
            self.base.wrapping_sub(1).wrapping_sub(i64::from(offset) as u64)
        } else {
            self.base.wrapping_add(offset as u64)
        })
    }

    fn negative_offsets(&self) -> bool {
        u32_at(self.bytes, self.offsets + 4 * (self.count - 1))
            .is_some_and(|last| (last as i32) < 0)
    }

    /// Addresses of the symbols with these names, where there is one.
    pub fn addresses<const N: usize>(&self, wanted: [&str; N]) -> [Option<u64>; N] {
        let mut found = [None; N];
        let lengths: [usize; TOKENS] =
            std::array::from_fn(|number| self.tokens.token(number as u8).len());
        let mut at = self.names;
        for number in 0..self.count {
            let Some((numbers, next)) = entry(self.bytes, at) else { break };
            let bytes: usize = numbers.iter().map(|&number| lengths[usize::from(number)]).sum();
            // To decode all names of a kernel takes a part of its boot.
            if wanted.iter().any(|wanted| wanted.len() + 1 == bytes)
                && let Some(Some(name)) = self.tokens.decode(self.bytes, at).next()
            {
                for (slot, wanted) in found.iter_mut().zip(wanted) {
                    if slot.is_none() && name[1..] == *wanted.as_bytes() {
                        *slot = self.address_of(number);
                    }
                }
            }
            at = next;
        }
        found
    }

    /// The lowest address of a symbol behind `address`.
    pub fn next_after(&self, address: u64) -> Option<u64> {
        (0..self.count).filter_map(|number| self.address_of(number)).find(|next| *next > address)
    }
}

impl<'a> Tokens<'a> {
    /// The token table whose `0` to `9` are at `digits`.
    fn around(bytes: &'a [u8], digits: usize) -> Option<Self> {
        let from = digits + DIGITS.len();
        let to = from.saturating_add(INDEX_SEARCH_BYTES);
        (from.next_multiple_of(2)..to).step_by(2).find_map(|at| {
            let raw = bytes.get(at..at + INDEX_BYTES)?;
            let zero = usize::from(b'0');
            let entry = |i: usize| u16::from_le_bytes([raw[2 * i], raw[2 * i + 1]]);
            if entry(0) != 0 || entry(zero + 1).wrapping_sub(entry(zero)) != 2 {
                return None;
            }
            let index: [u16; TOKENS] = std::array::from_fn(entry);
            let start = digits.checked_sub(index[zero].into())?;
            let table = bytes.get(start..at)?;
            let whole = index.windows(2).all(|pair| pair[0] < pair[1])
                && index[1..].iter().all(|&i| table.get(usize::from(i) - 1) == Some(&0));
            whole.then_some(Self { table, index, start, end: at + INDEX_BYTES })
        })
    }

    fn token(&self, number: u8) -> &'a [u8] {
        let rest = self.table.get(self.index[usize::from(number)].into()..).unwrap_or_default();
        &rest[..memchr::memchr(0, rest).unwrap_or(rest.len())]
    }

    /// Names from `at` on; `None` where there is none, and it ends there.
    fn decode(&self, bytes: &'a [u8], mut at: usize) -> impl Iterator<Item = Option<Vec<u8>>> {
        let mut ended = false;
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let name = entry(bytes, at).and_then(|(numbers, next)| {
                at = next;
                let mut name = Vec::new();
                for &number in numbers {
                    name.extend(self.token(number));
                    if name.len() > NAME_BYTES_MAX {
                        return None;
                    }
                }
                let printable = name.iter().all(u8::is_ascii_graphic);
                (name.len() > 1 && TYPES.contains(&name[0]) && printable).then_some(name)
            });
            ended = name.is_none();
            Some(name)
        })
    }

    /// Where the table of `count` names at `at` ends.
    fn skip(&self, bytes: &[u8], mut at: usize, count: usize) -> Option<usize> {
        for _ in 0..count {
            at = entry(bytes, at)?.1;
            if at > self.start {
                return None;
            }
        }
        Some(at)
    }
}

fn is_base(address: u64) -> bool {
    address >= LINKED_FROM && address.is_multiple_of(PAGE_BYTES)
}

/// Token numbers of the name at `at`, and where the next one is.
fn entry(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let first = *bytes.get(at)?;
    let (length, from) = if first & 0x80 == 0 {
        (usize::from(first), at + 1)
    } else {
        (usize::from(first & 0x7f) | usize::from(*bytes.get(at + 1)?) << 7, at + 2)
    };
    let to = from + length;
    Some((bytes.get(from..to).filter(|numbers| !numbers.is_empty())?, to))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|raw| u32::from_le_bytes(*raw))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|raw| u64::from_le_bytes(*raw))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub const BASE: u64 = 0xffff_ffff_8100_0000;

    /// Every character is its own token, `X` stands for `set_memory_`.
    fn tokens() -> (Vec<u8>, Vec<u8>) {
        let (mut table, mut index) = (Vec::new(), Vec::new());
        for token in 0..=255u8 {
            index.extend((table.len() as u16).to_le_bytes());
            match token {
                b'X' => table.extend(b"set_memory_"),
                b'!'..=b'~' => table.push(token),
                _ => table.extend(b"??"),
            }
            table.push(0);
        }
        (table, index)
    }

    /// Names of 600 symbols, the first of which is a processor's.
    pub fn names() -> Vec<String> {
        let mut names: Vec<String> = vec!["Acpu_debug_store".into()];
        names.extend((1..600).map(|number| format!("tfunction_{number}")));
        names[300] = "TXx".into();
        names[301] = format!("t{}", "long".repeat(40));
        names[302] = "TXrox".into();
        names
    }

    /// The tables of a kernel with 600 symbols 16 bytes apart, behind one of a processor.
    fn image(is_new: bool, wide_lengths: bool) -> Vec<u8> {
        let mut image = vec![0xcc; 0x1000];
        append_tables(&mut image, &names(), is_new, wide_lengths);
        image.extend([0xcc; 64]);
        image
    }

    /// Appends the tables of a kernel whose symbols are 16 bytes apart from [`BASE`] on.
    pub fn append_tables(image: &mut Vec<u8>, names: &[String], is_new: bool, wide_lengths: bool) {
        let mut encoded = Vec::new();
        for name in names {
            match (wide_lengths, name.len()) {
                (true, length @ 0x80..) => {
                    encoded.extend([length as u8 & 0x7f | 0x80, (length >> 7) as u8]);
                }
                // Older kernels have no longer ones.
                (false, 0x80..) => {
                    encoded.push(0x7f);
                    encoded.extend(&name.as_bytes()[..0x7f]);
                    continue;
                }
                (_, length) => encoded.push(length as u8),
            }
            encoded.extend(name.as_bytes());
        }
        let mut offsets: Vec<u8> = 0u32.to_le_bytes().into();
        offsets.extend((1..600).flat_map(|number: i32| (-1 - 16 * number).to_le_bytes()));
        let (table, index) = tokens();
        let count = (names.len() as u32).to_le_bytes().to_vec();
        let markers = vec![0; 12];
        let base = BASE.to_le_bytes().to_vec();
        let parts = if is_new {
            vec![count, encoded, markers, table, index, offsets, base]
        } else {
            vec![offsets, base, count, encoded, markers, table, index]
        };
        for part in parts {
            image.extend(part);
            image.resize(image.len().next_multiple_of(TABLE_ALIGNMENT), 0);
        }
    }

    #[test]
    fn both_orders_of_tables_are_read() {
        for (is_new, wide) in [(false, false), (false, true), (true, true)] {
            let image = image(is_new, wide);
            let symbols = Symbols::find(&image).unwrap();
            let found = symbols.addresses(["set_memory_x", "set_memory_rox", "function_599", "no"]);
            let at = |number: u64| Some(BASE + 16 * number);
            assert_eq!(found, [at(300), at(302), at(599), None], "{is_new} {wide}");
            assert_eq!(symbols.next_after(BASE + 16), at(2));
            assert_eq!(symbols.next_after(BASE + 16 * 599), None);
        }
    }

    #[test]
    fn a_damaged_table_is_none_and_ends_the_search() {
        let whole = image(true, true);
        for cut in (0..whole.len()).step_by(97) {
            // Whatever is found must be readable.
            if let Some(symbols) = Symbols::find(&whole[..cut]) {
                symbols.addresses(["set_memory_x"]);
                symbols.next_after(BASE);
            }
            let mut damaged = whole.clone();
            damaged[cut] ^= 0xff;
            if let Some(symbols) = Symbols::find(&damaged) {
                symbols.addresses(["set_memory_x"]);
            }
        }
        assert!(Symbols::find(&[]).is_none());
        assert!(Symbols::find(&vec![0; 1 << 20]).is_none());
        assert!(Symbols::find(&DIGITS.repeat(10_000)).is_none());
    }

    #[test]
    fn addresses_of_a_kernel_for_one_processor_are_counted_from_its_base() {
        let mut image = image(true, true);
        let offsets = Symbols::find(&image).unwrap().offsets;
        for number in 0..600u32 {
            let at = offsets + 4 * number as usize;
            image[at..at + 4].copy_from_slice(&(32 * number).to_le_bytes());
        }
        let symbols = Symbols::find(&image).unwrap();
        assert_eq!(symbols.addresses(["set_memory_x"]), [Some(BASE + 32 * 300)]);
        assert_eq!(symbols.next_after(0), Some(BASE));
        // Descending addresses are no table.
        image[offsets + 8] = 0;
        assert!(Symbols::find(&image).is_none());
    }
}
