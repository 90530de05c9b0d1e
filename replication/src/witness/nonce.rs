//! The number with which two hosts find out whether they see the same witness.

use core::fmt;

use serde::{Deserialize, Serialize};

/// A random number that one host writes into its witness and the other must find in its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Nonce(pub [u8; 16]);

/// 32 digits, which may stand in a file's name and in a key.
impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
