//! The locks of this crate.
//!
//! A panic ends the process (`abort_on_panic` in `cli/mod.rs`), so nobody can find a poisoned lock.
//! Only a test that panics on purpose leaves one behind, and it is taken like any other.

use std::sync::PoisonError;
use std::time::Duration;

/// Re-exports the primitives of a library and defines how they are used here; tests do so with a
/// checker's (`interleavings`).
macro_rules! locks {
    ($($library:ident)::+) => {
        pub use $($library)::+::atomic;
        pub use $($library)::+::{Condvar, Mutex, MutexGuard};

        /// Takes a lock.
        pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
            mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }

        /// Waits for a notification, or for none: the caller looks again at what it waits for.
        pub fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
            changed.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    };
}
#[cfg(test)]
pub(crate) use locks;

locks!(std::sync);

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
