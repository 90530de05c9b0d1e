//! What is known of a disk besides its content: a few lines of text in a file beside the image.
//!
//! Why text: a person reads it with `cat` on the day a host is down. Why so strict: what a damaged
//! file says of a disk is worse than nothing.

use core::fmt;

use crate::record::Term;
use crate::witness::GuestId;

/// No label is longer, in bytes.
pub const LABEL_BYTES_MAX: usize = 512;
/// What every label begins with. Another layout gets another number.
const MAGIC: &str = "ftvmm-disk 1";
/// Longest [`DiskLabel::since`], in bytes.
const SINCE_BYTES_MAX: usize = 40;

/// What the content of a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DiskState {
    /// What the guest left when it ended in order, or what no guest has used.
    #[default]
    Clean,
    /// This host ran the guest; it has not ended in order here.
    Active,
    /// This host followed: it has every write that the guest was told is safe.
    Following,
    /// A whole state was being written over it.
    Incomplete,
}

impl DiskState {
    const ALL: [Self; 4] = [Self::Clean, Self::Active, Self::Following, Self::Incomplete];

    /// As a label names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Active => "active",
            Self::Following => "following",
            Self::Incomplete => "incomplete",
        }
    }
}

impl fmt::Display for DiskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A state, and the term in which the disk was in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DiskMark {
    /// The state.
    pub state: DiskState,
    /// The term; 0 for a guest without a witness.
    pub term: Term,
}

/// What is known of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskLabel {
    /// Whose disk it is; `None` for a guest without an identity.
    pub guest: Option<GuestId>,
    /// What its content is.
    pub mark: DiskMark,
    /// Since when, by the host's wall clock: `2026-11-28T11:02:42Z`. For people; no decision is
    /// made of it.
    pub since: String,
}

impl DiskLabel {
    /// The label as it is stored.
    #[must_use]
    pub fn to_text(&self) -> String {
        let Self { guest, mark: DiskMark { state, term }, since } = self;
        let guest = guest.map_or_else(|| "none".into(), |guest| guest.to_string());
        let said = format!("{MAGIC}\nguest {guest}\nstate {state}\nterm {term}\nsince {since}\n");
        format!("{said}crc32c {:08x}\n", crc32c::crc32c(said.as_bytes()))
    }

    /// Reads a stored label; `None` when it is none, or is damaged.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        if text.len() > LABEL_BYTES_MAX {
            return None;
        }
        let mut lines = text.lines();
        if lines.next()? != MAGIC {
            return None;
        }
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        let guest = match field("guest")? {
            "none" => None,
            guest => Some(GuestId::from_text(guest)?),
        };
        let state = field("state")?;
        let state = DiskState::ALL.into_iter().find(|known| known.name() == state)?;
        let term = crate::witness::stored_term(field("term")?).ok()??;
        let since = field("since")?.to_owned();
        let may_stand = |c: char| c.is_ascii_alphanumeric() || "-:.".contains(c);
        let is_time = since.len() <= SINCE_BYTES_MAX && since.chars().all(may_stand);
        let label = Self { guest, mark: DiskMark { state, term }, since };
        // One label has one spelling, which ends in its checksum.
        (is_time && label.to_text() == text).then_some(label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(state: DiskState, guest: Option<GuestId>) -> DiskLabel {
        let mark = DiskMark { state, term: Term(7) };
        DiskLabel { guest, mark, since: "2026-11-28T11:02:42Z".into() }
    }

    #[test]
    fn a_label_survives_storage() {
        for state in DiskState::ALL {
            for guest in [None, Some(GuestId::from_random([3; 16]))] {
                let label = label(state, guest);
                let text = label.to_text();
                assert!(text.len() <= LABEL_BYTES_MAX, "{text}");
                assert_eq!(DiskLabel::from_text(&text), Some(label));
            }
        }
    }

    #[test]
    fn a_label_with_any_byte_changed_or_missing_is_none() {
        let text = label(DiskState::Active, Some(GuestId::from_random([3; 16]))).to_text();
        for at in 0..text.len() {
            assert_eq!(DiskLabel::from_text(&text[..at]), None, "cut at {at}");
            let mut changed = text.clone().into_bytes();
            changed[at] ^= 1;
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(DiskLabel::from_text(&changed), None, "{changed}");
        }
        assert_eq!(DiskLabel::from_text(&(text.clone() + "\n")), None);
        assert_eq!(DiskLabel::from_text(&(text + &"x".repeat(LABEL_BYTES_MAX))), None);
    }
}
