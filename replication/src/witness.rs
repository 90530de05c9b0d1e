//! The witness: who may be active in a term.
//!
//! Why: when the channel breaks, each side sees only silence and cannot tell a dead peer from a cut
//! cable. Both then ask for the same next term, and a compare-and-swap on a third place gives it to
//! one of them. The I/O lives in `ftvmm-host`; the rule lives here, once, as [`claim()`].

pub mod claim;
mod entry;
mod nonce;

use core::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use claim::{Claim, Purpose, claim};
pub use entry::{Doing, ENTRY_BYTES_MAX, Entry, GuestId, Holder, moment};
pub use nonce::Nonce;

use crate::bounded;
use crate::record::Term;

/// Why a witness gave no answer. The claim may or may not have been recorded; asking again is safe
/// because a term is granted to its holder any number of times.
#[derive(Debug, Error)]
pub enum WitnessError {
    /// It holds something that is no entry.
    #[error("witness {place} holds {found}, which is no entry; if no guest uses it, remove that")]
    Malformed {
        /// Its address or path.
        place: String,
        /// Its content.
        found: String,
    },
    /// It gave no answer.
    #[error("witness {place} cannot be used: {reason}; {remedy}")]
    Unusable {
        /// Its address or path.
        place: String,
        /// What the access said, with the file or member that said it.
        reason: String,
        /// What a person can do about it.
        remedy: String,
    },
    /// It does not hold the term before the one that is claimed.
    #[error(
        "witness {place} holds {}, but term {} was given away: it is another one, or was emptied; \
         nothing is granted before it is put back",
        if *held == Term(0) { "no term".to_owned() } else { format!("term {held}") },
        wanted.0 - 1
    )]
    Forgotten {
        /// Its address or path.
        place: String,
        /// The term claimed.
        wanted: Term,
        /// The term it holds; 0 for none.
        held: Term,
    },
}

/// Longest name of a witness that is sent to the other host, in bytes.
pub const PLACE_BYTES_MAX: usize = 600;

/// Where a host's witness is, as its user named it; at most [`PLACE_BYTES_MAX`] bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place(#[serde(deserialize_with = "bounded::text::<_, PLACE_BYTES_MAX>")] pub String);

impl From<String> for Place {
    fn from(place: String) -> Self {
        Self(bounded::clip(place, PLACE_BYTES_MAX))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What came of [`WitnessStore::replace`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replaced {
    /// The new entry is stored, and safe from a loss of power.
    Stored,
    /// The store held this instead of what was expected, and holds it still.
    Conflict(Option<Entry>),
}

/// A place that survives either host, holds one [`Entry`], and compares and swaps.
///
/// It decides nothing: [`claim::claim`] does. Its methods may wait for seconds, so they are called
/// on a thread of their own; they must return in the end.
pub trait WitnessStore {
    /// Where it is, as the user named it.
    fn place(&self) -> String;

    /// The entry as of now: one that a finished `replace` stored, on whichever host, is seen.
    ///
    /// # Errors
    /// [`WitnessError`] when there is no answer, or what is held is no entry.
    fn read(&mut self) -> Result<Option<Entry>, WitnessError>;

    /// Puts `new` in the place of exactly `expected`, in one step; `None` for a store that was
    /// never used.
    ///
    /// # Errors
    /// [`WitnessError`] when there is no answer. `new` may be stored all the same.
    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError>;

    /// Writes `nonce` for the other host to see. It takes the place of the last one this process
    /// wrote.
    ///
    /// # Errors
    /// [`WitnessError`] when it may not be written.
    fn prove(&mut self, nonce: Nonce) -> Result<(), WitnessError>;

    /// Whether a host has written `nonce` here.
    ///
    /// # Errors
    /// [`WitnessError`] when there is no answer.
    fn sees(&mut self, nonce: Nonce) -> Result<bool, WitnessError>;
}

/// A number that no host can have won as a term: terms are claimed one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no term is so high")]
pub struct TermTooHigh;

/// The term that a witness stored in decimal digits; `None` when the text is no number as a term is
/// written.
///
/// # Errors
/// [`TermTooHigh`] for a number that is no term's.
pub fn stored_term(digits: &str) -> Result<Option<Term>, TermTooHigh> {
    let is_number = digits.bytes().all(|digit| digit.is_ascii_digit())
        && !digits.is_empty()
        && (digits == "0" || !digits.starts_with('0'));
    if !is_number {
        return Ok(None);
    }
    let term = digits.parse().ok().and_then(Term::from_outside);
    term.map(Some).ok_or(TermTooHigh)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::COUNTER_MAX;

    #[test]
    fn a_stored_number_is_a_term_or_is_said_to_be_none() {
        assert_eq!(stored_term("0"), Ok(Some(Term(0))));
        assert_eq!(stored_term("12"), Ok(Some(Term(12))));
        for text in ["", "x", "+7", "-7", "007", "7.bak", " 7"] {
            assert_eq!(stored_term(text), Ok(None), "{text:?}");
        }
        let high = COUNTER_MAX + 1;
        for text in [high.to_string(), u64::MAX.to_string(), "9".repeat(23)] {
            assert_eq!(stored_term(&text), Err(TermTooHigh), "{text}");
        }
    }
}
