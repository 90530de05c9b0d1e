//! The key file that both hosts share, made by `ftvmm keygen`: one line, [`HEAD`] and 32 random
//! bytes in hexadecimal, which are an Ed25519 private key (RFC 8032 section 5.1.5).

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::user_file::{self, FileError};

/// Begins a key file.
const HEAD: &str = "ftvmm-channel-key-1 ";
/// Bytes of an Ed25519 private key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a whole file.
const FILE_BYTES_MAX: u64 = 128;
const WHAT: &str = "channel key";

/// Why there is no key.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// The file cannot be had.
    #[error(transparent)]
    File(#[from] FileError),
    /// Other users of the host may read it.
    #[error(
        "channel key '{path}' has mode {mode:04o}, so others may read it; make it its owner's \
         alone: chmod 600 '{path}'",
        path = path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It is no key.
    #[error("'{path}' is no channel key; make one with: ftvmm keygen FILE", path = path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// There is a file of that name.
    #[error(
        "'{path}' is there already and stays as it is; if it is the key of this pair, copy it to \
         the other host; for another key name a new file",
        path = path.display()
    )]
    There {
        /// The file.
        path: PathBuf,
    },
    /// The host has no random numbers.
    #[error("the host gives no random numbers for a key: {0}")]
    Random(getrandom::Error),
}

/// Makes a key file for both hosts, which only its owner may read.
///
/// # Errors
/// When the file is there already or cannot be written.
pub fn make(path: &Path) -> Result<(), KeyFileError> {
    let mut secret = [0; KEY_BYTES];
    getrandom::fill(&mut secret).map_err(KeyFileError::Random)?;
    let mut line = HEAD.to_owned();
    for byte in secret {
        let _ = write!(line, "{byte:02x}");
    }
    line.push('\n');
    let mut file = user_file::create(WHAT, path, false).map_err(|error| match error {
        FileError::Exists { path, .. } => KeyFileError::There { path },
        error => error.into(),
    })?;
    let refused = |cause| FileError::Host { what: WHAT, path: path.into(), cause };
    file.write_all(line.as_bytes()).map_err(refused)?;
    Ok(())
}

/// The key in a file that nobody else may read.
///
/// # Errors
/// When it is not so.
pub fn read(path: &Path) -> Result<[u8; KEY_BYTES], KeyFileError> {
    let facts = user_file::open(WHAT, path)?.metadata();
    let refused = |cause| FileError::Host { what: WHAT, path: path.into(), cause };
    let mode = facts.map_err(refused)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Open { path: path.into(), mode });
    }
    let text = user_file::read(WHAT, path, FILE_BYTES_MAX, "a key file is one line")?;
    parse(&text).ok_or_else(|| KeyFileError::NoKey { path: path.into() })
}

/// The key in the content of a file; `None` when it is no key file.
#[must_use]
pub fn parse(text: &[u8]) -> Option<[u8; KEY_BYTES]> {
    let digits = std::str::from_utf8(text).ok()?.strip_prefix(HEAD)?.trim_end();
    if digits.len() != 2 * KEY_BYTES || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut key = [0; KEY_BYTES];
    for (byte, at) in key.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_nobody_elses_to_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        make(&path).unwrap();
        let key = read(&path).unwrap();
        assert_ne!(key, [0; KEY_BYTES]);
        let again = make(&path).unwrap_err().to_string();
        assert!(again.contains("copy it to the other host"), "{again}");
        assert!(!again.contains("overwrite"), "there is no such option: {again}");
        assert_eq!(read(&path).unwrap(), key);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("chmod 600"));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let good = format!("{HEAD}{}\n", "0f".repeat(KEY_BYTES));
        assert_eq!(parse(good.as_bytes()), Some([15; KEY_BYTES]));
        for bad in ["", "hi", &good[1..], &good[..good.len() - 2], &good.replace('f', "g")] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(parse(&[0xff; 80]), None);
    }
}
