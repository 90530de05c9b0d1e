//! The locks of the program, and waiting for them no longer than some time.

use std::sync::PoisonError;
use std::time::Duration;

pub use ftvmm_machine::sync::*;

/// As [`wait`], at most for `longest`.
pub fn wait_timeout<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    longest: Duration,
) -> MutexGuard<'a, T> {
    changed.wait_timeout(guard, longest).unwrap_or_else(PoisonError::into_inner).0
}

/// Waits while `condition` holds, at most for `longest`.
pub fn wait_timeout_while<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    longest: Duration,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    let waited = changed.wait_timeout_while(guard, longest, condition);
    waited.unwrap_or_else(PoisonError::into_inner).0
}
