//! The locks of the program.
//!
//! A panic ends the process (`abort_on_panic` in `vmm/cli/src/lib.rs`), so no thread can find a
//! poisoned lock. Only a test that panics on purpose leaves one behind, which is taken like any
//! other.

/// Re-exports the primitives of a library and defines how they are used here; tests do so with a
/// checker's (`interleavings` in `ftvmm-runtime`).
#[doc(hidden)]
#[macro_export]
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
locks!(std::sync);
