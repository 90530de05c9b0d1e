//! The one place of this crate that reads host time.
//!
//! The product's ban on host clocks protects the guest; here no guest is fed, time only measures
//! silence and names folders. Keeping it in one file keeps the ban meaningful everywhere else.
#![allow(clippy::disallowed_methods, reason = "measures silence outside any guest")]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A monotonic instant, to be compared with later ones.
pub fn now() -> Instant {
    Instant::now()
}

/// Time since 1970-01-01 UTC; zero on a machine whose clock lies before that.
pub fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
