//! How fine the kernel's clock is, and what it says: `clockres` reads it many times in a row.
//!
//! Each reading takes time, so the steps between readings say little; the gaps between steps of
//! different length cannot be smaller than the clock's resolution. A clock of 10 ms shows steps of
//! 0 and 10 ms only, however long a reading takes.

use std::time::Duration;

use crate::AppletError;
use crate::compute::monotonic;
use crate::options::Options;

const DEFAULT_READINGS: usize = 2000;
/// Readings printed, spread over all of them.
const PRINTED: usize = 16;
/// Steps of nearly the same length differ by the rounding of the clock's conversion only.
const ROUNDING_NS: u64 = 50;

/// The smallest gap between two steps of different length; `None` when all are the same.
fn resolution_ns(readings_ns: &[u64]) -> Option<u64> {
    let mut steps: Vec<u64> = readings_ns.windows(2).map(|pair| pair[1] - pair[0]).collect();
    steps.sort_unstable();
    steps.windows(2).map(|pair| pair[1] - pair[0]).filter(|&gap| gap > ROUNDING_NS).min()
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let count = options.position(0, "a number of readings")?.unwrap_or(DEFAULT_READINGS);
    let mut readings_ns: Vec<u64> = Vec::with_capacity(count);
    for _ in 0..count {
        let now_ns = nanoseconds(monotonic()?);
        if let Some(&before) = readings_ns.last()
            && now_ns < before
        {
            return Err(AppletError::CounterWentBack { before, after: now_ns });
        }
        readings_ns.push(now_ns);
    }
    let shown = readings_ns.iter().step_by(count.div_ceil(PRINTED).max(1));
    let shown: Vec<String> = shown.map(u64::to_string).collect();
    println!("CLOCK readings {}", shown.join(" "));
    println!("CLOCK resolution {}", resolution_ns(&readings_ns).unwrap_or(u64::MAX));
    Ok(())
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coarse_clock_is_told_from_a_fine_one_however_slow_the_readings() {
        let clock = |tick_ns: u64| {
            let times = (0..2000u64).map(|i| i * 70_000 + i * i % 9973);
            let shown: Vec<u64> = times.map(|time| time / tick_ns * tick_ns).collect();
            resolution_ns(&shown)
        };
        assert_eq!(clock(10_000_000), Some(10_000_000));
        assert_eq!(clock(838), Some(838));
        assert!(clock(279).is_some_and(|found| found <= 279 * 3));
        assert_eq!(resolution_ns(&[1, 2, 3, 4]), None);
    }
}
