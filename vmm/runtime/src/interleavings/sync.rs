//! [`ftvmm_host::sync`] with the primitives of the checker.

use std::time::Duration;

use shuttle::rand::Rng;

ftvmm_machine::locks!(shuttle::sync);

/// Times from here on never pass in a test; shorter ones may at any moment.
pub const FOREVER: Duration = Duration::from_secs(60);

/// As the product's.
pub fn wait_timeout<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    longest: Duration,
) -> MutexGuard<'a, T> {
    if longest < FOREVER && shuttle::rand::thread_rng().gen_bool(0.5) {
        return guard;
    }
    wait(changed, guard)
}

/// As the product's. Whoever has a time to wait looks again and again, until it is over.
pub fn wait_timeout_while<'a, T>(
    changed: &Condvar,
    mut guard: MutexGuard<'a, T>,
    longest: Duration,
    mut condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    while condition(&mut guard) {
        if longest >= FOREVER {
            guard = wait(changed, guard);
        } else if shuttle::rand::thread_rng().gen_bool(0.25) {
            break;
        }
    }
    guard
}
