//! Which program made a file, or is at the other end of the channel.
//!
//! Why: two programs with the same versions of every format may still have device models that
//! behave differently, and then they compute different things from the same inputs. Two hosts of a
//! pair therefore run the same build; a recording names the build that made it.

use core::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest name, in bytes. It comes from files and peers and goes into messages to people.
pub const BUILD_ID_BYTES_MAX: usize = 64;

/// Name of a build of the program: equal for the same sources, different for others. How it is made
/// is the program's affair (`vmm/runtime/build.rs`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BuildId(Box<str>);

/// A name that no build has.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BuildIdError {
    /// It is empty or longer than [`BUILD_ID_BYTES_MAX`].
    #[error("a build's name has 1 to {} bytes, not {got_bytes}", BUILD_ID_BYTES_MAX)]
    Length {
        /// Its length.
        got_bytes: u64,
    },
    /// It has something else in it than visible ASCII characters.
    #[error("a build's name has visible ASCII characters only")]
    Character,
}

impl TryFrom<String> for BuildId {
    type Error = BuildIdError;

    fn try_from(name: String) -> Result<Self, BuildIdError> {
        if name.is_empty() || name.len() > BUILD_ID_BYTES_MAX {
            return Err(BuildIdError::Length { got_bytes: name.len() as u64 });
        }
        if !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BuildIdError::Character);
        }
        Ok(Self(name.into()))
    }
}

impl TryFrom<&str> for BuildId {
    type Error = BuildIdError;

    fn try_from(name: &str) -> Result<Self, BuildIdError> {
        name.to_owned().try_into()
    }
}

impl From<BuildId> for String {
    fn from(build: BuildId) -> Self {
        build.0.into()
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::encoding::{EncodingError, decode, encode};

    pub(crate) fn example() -> BuildId {
        "0.1.0+0123456789abcdef".try_into().unwrap()
    }

    #[test]
    fn a_name_is_short_and_visible() {
        let name = |name: &str| BuildId::try_from(name);
        assert_eq!(name("").unwrap_err(), BuildIdError::Length { got_bytes: 0 });
        assert_eq!(name(&"x".repeat(65)).unwrap_err(), BuildIdError::Length { got_bytes: 65 });
        assert!(name(&"x".repeat(64)).is_ok());
        for bad in ["a b", "a\n", "\u{1b}[31m", "é"] {
            assert_eq!(name(bad).unwrap_err(), BuildIdError::Character, "{bad:?}");
        }
    }

    #[test]
    fn a_name_that_is_none_is_not_decoded() {
        assert_eq!(decode(&encode(&example())), Ok(example()));
        for bad in ["", "a b"] {
            assert_eq!(decode::<BuildId>(&encode(bad)), Err(EncodingError::Malformed));
        }
    }
}
