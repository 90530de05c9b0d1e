//! Slices: the guest's state itself, where no exit names the point (decision 0008).
//!
//! A guest that computes makes no exits, so an input would have no ordinal to be applied at. The
//! recorder then stops it anywhere, makes that point an exit ordinal of its own, and writes down
//! the state: the processor, and every page that changed since the last copy both sides have. Such
//! a copy is taken at every slice and at every memory check, from equal memory.
//!
//! Pages are written as runs of the 8-byte words that differ from the copy:
//!
//! | field | type | meaning |
//! | --- | --- | --- |
//! | page | varint | distance from the page before (from page 0: the first) |
//! | runs | varint | number of runs |
//! | | | for each run: |
//! | skip | varint | words since the end of the run before |
//! | length | varint | words in the run |
//! | words | bytes | their new content |

use core::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bounded::COUNTER_MAX;
use crate::varint::{self, VarintError};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of what pages are compared by.
pub const WORD_BYTES: usize = 8;

/// A part of a slice. A slice too big for one record is several parts at the same ordinal; only
/// together do they mean anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// Changed pages, as [`PageDeltas`] writes them.
    #[serde(with = "serde_bytes")]
    pub pages: Vec<u8>,
    /// The processor's state, in the last part only.
    #[serde(with = "serde_bytes")]
    pub cpu: Option<Vec<u8>>,
}

impl Slice {
    /// True for the part that completes the slice.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.cpu.is_some()
    }
}

/// Bytes are no list of changed pages.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SliceError {
    /// The bytes end inside a number or a run.
    #[error("a slice's pages end inside a record")]
    Cut,
    /// A number has a shorter encoding.
    #[error("a slice's pages have a number with more bytes than it needs")]
    Overlong,
    /// A run goes past the end of its page.
    #[error("a slice writes past the end of page {page:#x}")]
    PastPage {
        /// The page.
        page: u64,
    },
    /// A page lies where no guest has memory.
    #[error("a slice names page {page:#x}, which no guest has")]
    NoPage {
        /// The page.
        page: u64,
    },
}

/// Writes changed pages.
#[derive(Debug, Default)]
pub struct PageDeltas {
    bytes: Vec<u8>,
    last_page: u64,
}

impl PageDeltas {
    /// Adds a page, in rising order: its new content, [`PAGE_BYTES`] long, and what
    /// [`find_runs`] found in it.
    pub fn push(&mut self, page: u64, new: &[u8], runs: &[Range<usize>]) {
        varint::put(&mut self.bytes, page - self.last_page);
        varint::put(&mut self.bytes, runs.len() as u64);
        let mut last = 0;
        for run in runs {
            varint::put(&mut self.bytes, ((run.start - last) / WORD_BYTES) as u64);
            varint::put(&mut self.bytes, (run.len() / WORD_BYTES) as u64);
            self.bytes.extend_from_slice(&new[run.clone()]);
            last = run.end;
        }
        self.last_page = page;
    }

    /// Bytes so far.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The finished list; the next one starts empty.
    pub fn finish(&mut self) -> Vec<u8> {
        self.last_page = 0;
        core::mem::take(&mut self.bytes)
    }
}

/// Puts the runs of words in which `new` differs from `old` into `runs`, as ranges of bytes, in
/// rising order. Both contents are as long.
pub fn find_runs(old: &[u8], new: &[u8], runs: &mut Vec<Range<usize>>) {
    runs.clear();
    // Most of what is looked at has not changed, and to see that whole is a fraction of the work.
    if old == new {
        return;
    }
    for (word, (old, new)) in words(old).zip(words(new)).enumerate() {
        let start = word * WORD_BYTES;
        match runs.last_mut() {
            _ if old == new => {}
            Some(run) if run.end == start => run.end += WORD_BYTES,
            _ => runs.push(start..start + WORD_BYTES),
        }
    }
}

/// The words of `bytes`, little-endian; what is left over at the end is none.
pub fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// Hands every run of `bytes` to `write`: page, offset in the page in bytes, new content.
///
/// # Errors
/// [`SliceError`]; runs before the damage have been handed out.
pub fn for_each_run(
    mut bytes: &[u8],
    mut write: impl FnMut(u64, usize, &[u8]),
) -> Result<(), SliceError> {
    let mut page = 0u64;
    while !bytes.is_empty() {
        page = page.checked_add(number(&mut bytes)?).ok_or(SliceError::Cut)?;
        if page > COUNTER_MAX / PAGE_BYTES as u64 {
            return Err(SliceError::NoPage { page });
        }
        let mut word = 0u64;
        for _ in 0..number(&mut bytes)? {
            let past = SliceError::PastPage { page };
            word = word.checked_add(number(&mut bytes)?).ok_or(past.clone())?;
            let length = number(&mut bytes)?;
            let end = word.checked_add(length).ok_or(past.clone())?;
            if end > (PAGE_BYTES / WORD_BYTES) as u64 {
                return Err(past);
            }
            let (run, rest) =
                bytes.split_at_checked(length as usize * WORD_BYTES).ok_or(SliceError::Cut)?;
            write(page, word as usize * WORD_BYTES, run);
            bytes = rest;
            word = end;
        }
    }
    Ok(())
}

fn number(bytes: &mut &[u8]) -> Result<u64, SliceError> {
    varint::take(bytes).map_err(|error| match error {
        VarintError::Short | VarintError::Overflow => SliceError::Cut,
        VarintError::Overlong => SliceError::Overlong,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Pages = BTreeMap<u64, Vec<u8>>;

    fn changes() -> impl Strategy<Value = Vec<(u64, Vec<(usize, u8)>)>> {
        let bytes = prop::collection::vec((0..PAGE_BYTES, any::<u8>()), 0..30);
        prop::collection::btree_map(0..1u64 << 40, bytes, 0..6)
            .prop_map(|map| map.into_iter().collect())
    }

    fn written(bytes: &[u8], pages: &mut Pages) -> Result<(), SliceError> {
        for_each_run(bytes, |page, offset, data| {
            let page = pages.entry(page).or_insert_with(|| vec![0x55; PAGE_BYTES]);
            page[offset..offset + data.len()].copy_from_slice(data);
        })
    }

    proptest! {
        #[test]
        fn the_changed_pages_come_out_again(changes in changes()) {
            let mut deltas = PageDeltas::default();
            let mut wanted = Pages::new();
            let mut runs = Vec::new();
            let old = vec![0x55; PAGE_BYTES];
            for (page, bytes) in changes {
                let mut new = old.clone();
                bytes.iter().for_each(|&(at, value)| new[at] = value);
                find_runs(&old, &new, &mut runs);
                deltas.push(page, &new, &runs);
                if new != old {
                    wanted.insert(page, new);
                }
            }
            let mut got = Pages::new();
            prop_assert!(written(&deltas.finish(), &mut got).is_ok());
            prop_assert_eq!(got, wanted);
        }

        #[test]
        fn runs_are_those_of_a_look_at_each_word(
            old in prop::collection::vec(0..3u8, 0..400),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40),
        ) {
            let mut new = old.clone();
            if !new.is_empty() {
                changes.iter().for_each(|(at, value)| new[at.index(old.len())] = *value);
            }
            let mut wanted: Vec<Range<usize>> = Vec::new();
            for start in (0..old.len() / WORD_BYTES).map(|word| word * WORD_BYTES) {
                let word = start..start + WORD_BYTES;
                match wanted.last_mut() {
                    _ if old[word.clone()] == new[word.clone()] => {}
                    Some(run) if run.end == start => run.end = word.end,
                    _ => wanted.push(word),
                }
            }
            let mut runs = Vec::new();
            find_runs(&old, &new, &mut runs);
            prop_assert_eq!(runs, wanted);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = for_each_run(&bytes, |_, offset, data| {
                assert!(offset + data.len() <= PAGE_BYTES);
            });
        }
    }

    #[test]
    fn one_changed_word_takes_a_dozen_bytes() {
        let (old, mut new) = (vec![0; PAGE_BYTES], vec![0; PAGE_BYTES]);
        new[800] = 1;
        let (mut deltas, mut runs) = (PageDeltas::default(), Vec::new());
        find_runs(&old, &new, &mut runs);
        deltas.push(0x1234, &new, &runs);
        assert_eq!(deltas.len_bytes(), 2 + 1 + 1 + 1 + 8);
    }

    #[test]
    fn a_run_past_the_page_is_named() {
        let bytes = [3, 1, 0xff, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0];
        let answer = for_each_run(&bytes, |_, _, _| {});
        assert_eq!(answer, Err(SliceError::PastPage { page: 3 }));
    }

    #[test]
    fn a_page_that_no_guest_has_is_named() {
        for page in [COUNTER_MAX / PAGE_BYTES as u64 + 1, u64::MAX] {
            let mut bytes = Vec::new();
            varint::put(&mut bytes, page);
            bytes.push(0);
            let answer = for_each_run(&bytes, |_, _, _| {});
            assert_eq!(answer, Err(SliceError::NoPage { page }));
        }
    }

    #[test]
    fn a_number_with_a_shorter_encoding_is_refused() {
        let answer = for_each_run(&[0x83, 0, 0], |_, _, _| {});
        assert_eq!(answer, Err(SliceError::Overlong));
    }
}
