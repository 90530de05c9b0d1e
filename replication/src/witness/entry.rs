//! What a witness remembers, as one line of text.
//!
//! Why a line: a person reads it with `cat` or `etcdctl get` on the day both hosts are down. Why so
//! strict: a store compares entries as bytes, so one entry must have one spelling.

use core::fmt;

use crate::record::Term;

/// No entry's line is longer, in bytes, with its line feed.
pub const ENTRY_BYTES_MAX: usize = 512;
/// Longest [`Holder`], in bytes.
const HOLDER_BYTES_MAX: usize = 160;
/// Longest [`Entry::seen`], in bytes.
const SEEN_BYTES_MAX: usize = 40;
/// Most characters of what is no entry that a person is shown.
const SHOWN_CHARS_MAX: usize = 80;
/// What every line begins with. Another layout gets another number.
const MAGIC: &str = "ftvmm-witness-2";

/// A guest's identity: made at random when it first starts, the same on every host it moves to.
/// Written as a UUID (RFC 9562).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestId(pub [u8; 16]);

impl GuestId {
    /// The identity made of these random bytes: a UUID of version 4.
    #[must_use]
    pub fn from_random(mut bytes: [u8; 16]) -> Self {
        bytes[6] = (bytes[6] & 0x0f) | 0x40;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Self(bytes)
    }

    /// Reads an identity as [`fmt::Display`] writes it; `None` for another spelling.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let digits: String = text.split('-').collect();
        let mut bytes = [0; 16];
        if digits.len() != 32 || !digits.is_ascii() {
            return None;
        }
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
        }
        let guest = Self(bytes);
        (guest.to_string() == text).then_some(guest)
    }
}

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// A process that asks for terms. No two processes have the same name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Holder(String);

impl Holder {
    /// The name of a process: its host's name for people, and something that no other has.
    /// What the line cannot hold of the host's name is replaced by `_`.
    #[must_use]
    pub fn new(host: &str, unique: GuestId) -> Self {
        let shown = host.chars().map(|c| if may_stand(c) && c != '/' { c } else { '_' }).take(64);
        Self(format!("{}/{unique}", shown.collect::<String>()))
    }

    /// Reads a stored name; `None` for what is none.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let fits = (1..=HOLDER_BYTES_MAX).contains(&text.len()) && text.chars().all(may_stand);
        fits.then(|| Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn may_stand(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._:@/".contains(c)
}

/// What the holder of a term does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Doing {
    /// It waits for a backup; the guest has not run in this term, and does not before the entry
    /// says [`Self::Live`].
    Waiting,
    /// The guest runs, or is about to.
    Live,
    /// The guest has ended and does not run again in this term.
    Ended,
}

impl Doing {
    const ALL: [Self; 3] = [Self::Waiting, Self::Live, Self::Ended];

    fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Live => "live",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a witness remembers: the last term given away.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The term.
    pub term: Term,
    /// The guest it is for.
    pub guest: GuestId,
    /// Who got it.
    pub holder: Holder,
    /// What the holder does.
    pub doing: Doing,
    /// The last term in which a guest of this witness may have run: it is written before the guest
    /// runs, and kept by terms in which none does. `None` in an entry that an ftvmm has written
    /// which did not note it; such an entry keeps its spelling.
    pub ran: Option<Term>,
    /// When the holder last wrote the entry, by its own wall clock: `2026-11-28T11:02:42Z`. For
    /// people; no decision is made of it.
    pub seen: String,
}

impl Entry {
    /// The entry as the witness stores it, with its line feed.
    #[must_use]
    pub fn to_line(&self) -> String {
        let Self { term, guest, holder, doing, ran, seen } = self;
        let ran = ran.map_or_else(String::new, |ran| format!(" ran={ran}"));
        format!(
            "{MAGIC} term={term} guest={guest} holder={holder} doing={doing}{ran} seen={seen}\n"
        )
    }

    /// The last term in which a guest may have run; 0 when none has.
    #[must_use]
    pub fn last_ran(&self) -> Term {
        // Who only waits in its term runs nothing in it.
        let waits = u64::from(self.doing == Doing::Waiting);
        self.ran.unwrap_or(Term(self.term.0.saturating_sub(waits)))
    }

    /// Whether the holder may run the guest, as far as the witness knows. One that holds the term
    /// and has not written that the guest runs in it starts nothing before it has, and cannot write
    /// that once another has the next term.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.doing == Doing::Live && self.last_ran() == self.term
    }

    /// Reads what a store holds.
    ///
    /// # Errors
    /// When it is no entry: its beginning, as it can be shown to a person.
    pub fn from_stored(stored: &[u8]) -> Result<Self, String> {
        let entry = core::str::from_utf8(stored).ok().and_then(Self::from_line);
        entry.ok_or_else(|| {
            let shown = String::from_utf8_lossy(&stored[..stored.len().min(ENTRY_BYTES_MAX)]);
            let shown: String = shown.trim_end().escape_debug().take(SHOWN_CHARS_MAX).collect();
            format!("\"{shown}\"")
        })
    }

    /// Reads a stored entry; `None` when it is none.
    #[must_use]
    pub fn from_line(line: &str) -> Option<Self> {
        if line.len() > ENTRY_BYTES_MAX {
            return None;
        }
        let mut words = line.strip_suffix('\n')?.split(' ');
        if words.next()? != MAGIC {
            return None;
        }
        let has_ran = line.contains(" ran=");
        let mut field = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=');
        let term = super::stored_term(field("term")?).ok()??;
        let guest = GuestId::from_text(field("guest")?)?;
        let holder = Holder::from_text(field("holder")?)?;
        let doing = field("doing")?;
        let doing = Doing::ALL.into_iter().find(|known| known.name() == doing)?;
        let ran = match has_ran {
            true => Some(super::stored_term(field("ran")?).ok()??),
            false => None,
        };
        if ran.is_some_and(|ran| ran > term) {
            return None;
        }
        let seen = field("seen")?.to_owned();
        let is_time = seen.len() <= SEEN_BYTES_MAX && seen.chars().all(may_stand);
        let entry = Self { term, guest, holder, doing, ran, seen };
        (is_time && term > Term(0) && entry.to_line() == line).then_some(entry)
    }
}

/// The moment `unix_s`, in seconds since 1970, as an entry shows it (RFC 3339, UTC).
#[must_use]
pub fn moment(unix_s: u64) -> String {
    // From days to a date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms",
    // civil_from_days, for days from 1970 on.
    let (days, second) = (unix_s / 86_400 + 719_468, unix_s % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn guest(number: u8) -> GuestId {
        GuestId::from_random([number; 16])
    }

    pub fn entry(term: u64, of: u8, holder: &str, doing: Doing) -> Entry {
        let holder = Holder::from_text(holder).unwrap();
        let ran = Some(Term(if doing == Doing::Live { term } else { 0 }));
        Entry { term: Term(term), guest: guest(of), holder, doing, ran, seen: moment(0) }
    }

    #[test]
    fn entries_survive_storage_and_have_one_spelling() {
        let stored = entry(12, 7, "host-a/4711", Doing::Live);
        let line = stored.to_line();
        assert_eq!(
            line,
            "ftvmm-witness-2 term=12 guest=07070707-0707-4707-8707-070707070707 \
             holder=host-a/4711 doing=live ran=12 seen=1970-01-01T00:00:00Z\n"
        );
        assert_eq!(Entry::from_line(&line), Some(stored));
        for (from, to) in [
            ("\n", ""),
            ("\n", "\n\n"),
            ("\n", " \n"),
            ("term=12", "term=012"),
            ("term=12", "term=0"),
            ("term=12", "term=+12"),
            ("term=12", "term=18446744073709551615"),
            (" term", "  term"),
            ("witness-2", "witness-3"),
            ("0707-4707", "07074707"),
            ("guest=07", "guest=0x"),
            ("host-a/4711", ""),
            ("host-a/4711", "host\ta"),
            ("host-a/4711", "höst"),
            ("live", "LIVE"),
            ("live", "gone"),
            ("ran=12", "ran=13"),
            ("ran=12", "ran=012"),
            ("ran=12", "ran="),
            ("ran=12", "ran=12 ran=12"),
            ("doing=live ran=12", "ran=12 doing=live"),
            ("1970-01-01T00:00:00Z", "yesterday at noon"),
        ] {
            let wrong = line.replacen(from, to, 1);
            assert_ne!(wrong, line);
            assert_eq!(Entry::from_line(&wrong), None, "{wrong:?}");
        }
        for wrong in [String::new(), "hi".into(), "x".repeat(600), "12 host\n".into()] {
            assert_eq!(Entry::from_line(&wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn an_entry_that_notes_no_last_run_keeps_its_spelling_and_says_the_most_that_may_be() {
        for (doing, ran, may_run) in
            [(Doing::Live, 4, true), (Doing::Ended, 4, false), (Doing::Waiting, 3, false)]
        {
            let old = Entry { ran: None, ..entry(4, 1, "a", doing) };
            let line = old.to_line();
            assert!(!line.contains("ran"), "{line}");
            assert_eq!(Entry::from_line(&line), Some(old.clone()));
            assert_eq!((old.last_ran(), old.may_run()), (Term(ran), may_run), "{doing}");
        }
        let held = Entry { ran: Some(Term(2)), ..entry(4, 1, "a", Doing::Live) };
        assert!(!held.may_run() && held.last_ran() == Term(2));
    }

    #[test]
    fn the_longest_entry_fits_its_bound() {
        let longest = Entry {
            term: Term(crate::record::COUNTER_MAX),
            ran: Some(Term(crate::record::COUNTER_MAX)),
            holder: Holder::from_text(&"h".repeat(HOLDER_BYTES_MAX)).unwrap(),
            seen: "9".repeat(SEEN_BYTES_MAX),
            ..entry(1, 1, "a", Doing::Waiting)
        };
        assert!(longest.to_line().len() <= ENTRY_BYTES_MAX);
        assert_eq!(Entry::from_line(&longest.to_line()), Some(longest));
    }

    #[test]
    fn a_holder_is_named_after_its_host_whatever_that_is_called() {
        let odd = Holder::new(&format!("a b/c\n{}", "d".repeat(300)), guest(1));
        assert!(odd.as_str().starts_with("a_b_c_dddd"), "{odd}");
        assert_eq!(Holder::from_text(odd.as_str()), Some(odd));
    }

    #[test]
    fn moments_are_dates() {
        for (unix_s, shown) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_863_762, "2026-11-28T11:02:42Z"),
        ] {
            assert_eq!(moment(unix_s), shown);
        }
    }
}
