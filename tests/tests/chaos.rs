//! A share of the chaos: a pair in trouble, other trouble at every run, under clients that number
//! every byte. And a primary that was away, which must not be heard again.
//!
//! `FTVMM_SEED` decides the faults, `FTVMM_CHAOS_ROUNDS` their number. `cargo xtask chaos` does any
//! number.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ftvmm_tests::chaos::{Chaos, Fault, Kind, Settings, Victim, run};
use ftvmm_tests::clock;
use ftvmm_tests::site::{Case, Site, require, run_cases, setting};
use libtest_mimic::Failed;

const ROUNDS: u64 = 10;

/// Digests wait in its socket, the backup has taken over, and it learns that last. The round's
/// verdict has the frames it must not send.
fn a_primary_that_was_away_is_not_heard_again(site: &Site) -> Result<(), Failed> {
    let mut chaos = Chaos::start(site)?;
    let fault = Fault {
        kind: Kind::PauseProcess,
        victim: Victim::Active,
        after: Duration::from_millis(500),
        lasts: Duration::from_secs(7),
    };
    let round = chaos.round(fault)?;
    println!("chaos: {round}");
    chaos.end();
    require(round.takeovers == 1, format!("{} take-overs", round.takeovers))
}

fn nothing_is_lost(site: &Site, seed: u64) -> Result<(), Failed> {
    // Kinds of faults take turns by number: begin anywhere.
    let rounds = setting("FTVMM_CHAOS_ROUNDS").unwrap_or(ROUNDS);
    let settings = Settings { rounds, seed, first: seed % 1000 };
    println!("chaos: FTVMM_SEED={seed} FTVMM_CHAOS_ROUNDS={rounds}");
    let mut said = Vec::new();
    let wrong = run(site, settings, |line| {
        println!("chaos: {line}");
        said.push(line.to_owned());
    })?;
    require(wrong.is_empty(), format!("wrong: rounds {wrong:?}\n{}", said.join("\n")))
}

fn main() -> ExitCode {
    let seed = setting("FTVMM_SEED").unwrap_or_else(|| clock::since_epoch().as_millis() as u64);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chaos");
    let cases: Vec<(String, Case)> = vec![
        ("was_away".into(), Box::new(a_primary_that_was_away_is_not_heard_again)),
        ("rounds".into(), Box::new(move |site: &Site| nothing_is_lost(site, seed))),
    ];
    run_cases(&folder, cases)
}
