//! Debian's releases: some packages are named after what is new in one.

use std::fs;

/// A release of Debian that the tooling runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Release {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
}

impl Release {
    /// All of them, the oldest first.
    pub const ALL: [Self; 2] = [Self::Bookworm, Self::Trixie];

    /// The name apt knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// The release with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|release| release.name() == name)
    }

    /// That of this machine. One that is not known counts as the newest: names change more seldom
    /// than releases come.
    pub fn of_this_machine() -> Self {
        let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self::of_os_release(&text)
    }

    /// `VERSION_CODENAME` of os-release(5).
    fn of_os_release(text: &str) -> Self {
        let codename = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        codename.and_then(|name| Self::named(name.trim_matches('"'))).unwrap_or(Self::Trixie)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_told_by_its_codename() {
        let of = Release::of_os_release;
        assert_eq!(of("ID=debian\nVERSION_CODENAME=bookworm\n"), Release::Bookworm);
        assert_eq!(of("VERSION_CODENAME=\"trixie\"\n"), Release::Trixie);
        assert_eq!(of("VERSION_CODENAME=duke\n"), Release::Trixie);
        assert_eq!(of(""), Release::Trixie);
    }
}
