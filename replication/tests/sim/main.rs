//! A seeded simulator: two sessions, a network, a witness and two guests in one thread.
//!
//! Safety phase: messages are delayed, connections break loudly or silently, hosts crash or pause, a
//! bit of one host's memory flips; fresh hosts take the place of those that are gone and are given
//! the guest; an operator changes the roles or lets a backup go. Liveness phase: faults stop, and
//! whoever holds the last term must go on, followed by the other if it is there. What is right is
//! judged from outside, by `checker`, which sees what the client and the witness see and both guests'
//! histories, but nothing of the sessions' insides.
//!
//! A failure names its seed; `FTVMM_SIM_SEED=<seed>` runs that one and prints its trace, and
//! `FTVMM_SIM_SEEDS=<count>` runs more of them.
#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod checker;
mod guest;
mod host;
mod turns;
mod world;

use world::{Options, World};

const SEEDS: u64 = 600;

/// SplitMix64 (Steele, Lea, Flood 2014): one number, one stream.
pub struct Random(u64);

impl Random {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        guest::mix(self.0, 0)
    }

    /// A number in `low..high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.number() % (high - low)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.number().is_multiple_of(n)
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

#[test]
fn the_pair_is_safe_under_faults_and_lives_after_them() {
    let one = variable("FTVMM_SIM_SEED");
    let count = variable("FTVMM_SIM_SEEDS").unwrap_or(SEEDS);
    let seeds = one.map_or(0..count, |seed| seed..seed + 1);
    let mut endings = std::collections::BTreeMap::<String, u64>::new();
    for seed in seeds {
        let result = std::panic::catch_unwind(|| {
            World::new(seed, Options::from_seed(seed), one.is_some()).run()
        });
        match result {
            Ok(outcome) => *endings.entry(outcome.ending).or_default() += 1,
            Err(_) => panic!("seed {seed} failed: run it alone with FTVMM_SIM_SEED={seed}"),
        }
    }
    println!("{endings:#?}");
    if one.is_none() && count >= SEEDS {
        // The schedule is worth something only while it leads everywhere.
        for ending in
            ["pair", "new pair", "primary alone", "backup live", "ended", "divergence", "nobody"]
        {
            assert!(endings.keys().any(|key| key.starts_with(ending)), "no seed ends in {ending}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..20 {
        let run = || World::new(seed, Options::from_seed(seed), false).run().trace_hash;
        assert_eq!(run(), run(), "seed {seed}");
    }
}

#[test]
fn different_seeds_give_different_traces() {
    let run = |seed| World::new(seed, Options::from_seed(seed), false).run().trace_hash;
    assert_ne!(run(1), run(2));
}

#[test]
fn without_faults_the_guest_runs_to_its_end_on_both() {
    for seed in 0..10 {
        let options = Options { faults: 0, orders: 0, diverges: false, ..Options::from_seed(seed) };
        let options = Options { ends_at: Some(300), ..options };
        assert_eq!(World::new(seed, options, false).run().ending, "ended on both");
    }
}
