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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_a_panic_left_behind_is_taken_like_any_other() {
        let mutex = Mutex::new(1);
        let panicked = std::panic::catch_unwind(|| {
            let mut guard = lock(&mutex);
            *guard = 2;
            panic!("on purpose");
        });
        assert!(panicked.is_err());
        assert_eq!(*lock(&mutex), 2);
    }

    #[test]
    fn who_waits_sees_what_was_changed_before_the_notification() {
        let shared = (Mutex::new(false), Condvar::new());
        std::thread::scope(|scope| {
            let mut guard = lock(&shared.0);
            scope.spawn(|| {
                *lock(&shared.0) = true;
                shared.1.notify_one();
            });
            while !*guard {
                guard = wait(&shared.1, guard);
            }
        });
    }
}
