//! User-mode RDTSC, for VMMs that trap it.

use std::arch::x86_64::_rdtsc;

use crate::AppletError;
use crate::options::Options;
use crate::stream::mix;

const DEFAULT_COUNT: u64 = 1000;

fn counter() -> u64 {
    // SAFETY: RDTSC is part of every x86-64 processor and touches registers only; where CR4.TSD
    // forbids it, the process gets a signal.
    unsafe { _rdtsc() }
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let count = options.position(0, "a count")?.unwrap_or(DEFAULT_COUNT);
    let (mut before, mut hash) = (0, 0);
    for _ in 0..count {
        let after = counter();
        if after < before {
            return Err(AppletError::CounterWentBack { before, after });
        }
        hash = mix(hash ^ after);
        before = after;
    }
    println!("RDTSC ok {hash:016x} count={count}");
    Ok(())
}
