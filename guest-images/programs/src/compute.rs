//! Pure computation: `compute ROUNDS` never leaves user mode between its first and its last line,
//! which is what it takes to test inputs for a guest that does not exit. `compute 5s` sleeps for a
//! moment after every round: without a time stamp counter the clock stands still until a tick gets
//! in, and it gets in at an exit.

use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::AppletError;
use crate::options::Options;
use crate::stream::mix;

const TABLE_WORDS: usize = 4096;
const STEPS_PER_ROUND: u64 = 1 << 18;
const PAUSE: Duration = Duration::from_millis(1);
const DEFAULT_ROUNDS: &str = "100";

/// A generator that reads and writes all over a 32 KiB table.
pub struct Computation {
    table: Vec<u64>,
    state: u64,
    rounds: u64,
}

impl Default for Computation {
    fn default() -> Self {
        Self { table: (0..TABLE_WORDS as u64).map(mix).collect(), state: 1, rounds: 0 }
    }
}

impl Computation {
    /// Does one round of 2^18 steps.
    pub fn round(&mut self) {
        for _ in 0..STEPS_PER_ROUND {
            let cell = &mut self.table[self.state as usize % TABLE_WORDS];
            self.state = mix(self.state ^ *cell);
            *cell = cell.wrapping_add(self.state);
        }
        self.rounds += 1;
    }

    /// A function of all that was computed.
    pub fn checksum(&self) -> u64 {
        self.table.iter().fold(self.state, |sum, &word| mix(sum ^ word))
    }

    /// The line that `compute` prints, the same on every machine for the same number of rounds.
    pub fn line(&self) -> String {
        format!("COMPUTE {:016x} rounds={}", self.checksum(), self.rounds)
    }
}

/// Steps in a round of `spin`.
const SPIN_STEPS: u64 = 1 << 24;

/// The line `spin ROUNDS` ends with, the same on every machine.
pub fn spin_line(rounds: u64) -> String {
    let steps = rounds * SPIN_STEPS;
    format!("SPUN {:016x} rounds={rounds}", (0..steps).fold(1, |state, step| mix(state ^ step)))
}

/// `spin ROUNDS`: a loop that touches nothing but registers, from one line to the next.
pub(crate) fn spin(options: &Options) -> Result<(), AppletError> {
    let rounds: u64 = options.position(0, "a number of rounds")?.unwrap_or(1);
    println!("SPIN {rounds}");
    println!("{}", spin_line(rounds));
    Ok(())
}

/// What `compute ROUNDS` prints.
pub fn line_after(rounds: u64) -> String {
    let mut computation = Computation::default();
    (0..rounds).for_each(|_| computation.round());
    computation.line()
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    const WANTED: &str = "a number of rounds, or of seconds as in 5s";
    let amount: String = options.position(0, WANTED)?.unwrap_or(DEFAULT_ROUNDS.to_owned());
    let (number, timed) = match amount.strip_suffix('s') {
        Some(seconds) => (seconds, true),
        None => (amount.as_str(), false),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| AppletError::Usage { argument: amount.clone(), wanted: WANTED })?;
    if !timed {
        println!("{}", line_after(number));
        return Ok(());
    }
    let mut computation = Computation::default();
    let end = monotonic()? + Duration::from_secs(number);
    while monotonic()? < end {
        computation.round();
        thread::sleep(PAUSE);
    }
    println!("{}", computation.line());
    Ok(())
}

/// Time since boot.
pub(crate) fn monotonic() -> Result<Duration, AppletError> {
    clock(ClockId::CLOCK_MONOTONIC)
}

/// Reads one of the kernel's clocks.
#[allow(clippy::disallowed_methods, reason = "a guest's own clock")]
pub(crate) fn clock(id: ClockId) -> Result<Duration, AppletError> {
    let now = clock_gettime(id).map_err(|errno| AppletError::io("clock_gettime")(errno.into()))?;
    Ok(now.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_the_same_every_time_and_depends_on_the_rounds() {
        assert_eq!(line_after(2), line_after(2));
        assert_ne!(line_after(2), line_after(3));
        assert!(line_after(2).ends_with(" rounds=2"));
    }

    #[test]
    fn the_checksum_covers_every_word_of_the_table() {
        let whole = Computation::default().checksum();
        for at in [0, 1, TABLE_WORDS / 2, TABLE_WORDS - 1] {
            let mut other = Computation::default();
            other.table[at] ^= 1;
            assert_ne!(other.checksum(), whole, "word {at}");
        }
    }
}
