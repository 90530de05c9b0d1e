//! A share of the determinism stress: new random guests at every run, and a harness that is shown
//! to notice.
//!
//! `FTVMM_SEED` sets the seed, `FTVMM_CASES` the number of cases. `cargo xtask stress` runs any
//! number.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::slice::from_ref;
use std::sync::{Arc, Mutex};

use ftvmm_tests::clock;
use ftvmm_tests::guest_run::{GuestLab, LabPool};
use ftvmm_tests::stress::bare::Features;
use ftvmm_tests::stress::{Kind, Settings, run};
use libtest_mimic::{Arguments, Failed, Trial};

const CASES: u64 = 12;
/// Flips a bit of the guest's running hash while its entry programs the devices.
const FAULT: [&str; 2] = ["--inject-fault", "mem:0x400000:0@5"];

fn number(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().unwrap())
}

fn settings(seed: u64, cases: u64, kept: PathBuf) -> Settings {
    let features = Features { kernel_rdtsc: true, user_rdtsc: true };
    Settings { seed, case: None, cases, only: None, features, parts: None, more: Vec::new(), kept }
}

fn random_guests_replay_equal(site: &GuestLab, settings: &Settings) -> Result<(), Failed> {
    let summary = run(from_ref(site), settings, |line| println!("{line}")).unwrap();
    println!("stress: {summary}");
    if summary.equal < summary.cases {
        return Err(Failed::from(summary.to_string()));
    }
    Ok(())
}

/// A bit that flips in the recorded guest only is found, and no block is to blame.
fn a_flipped_bit_is_found_and_minimised(site: &GuestLab, settings: Settings) {
    let fault = FAULT.map(str::to_owned).to_vec();
    let settings = Settings { cases: 1, only: Some(Kind::Bare), more: fault, ..settings };
    let said = Mutex::new(Vec::new());
    let say = |line: &str| said.lock().unwrap().push(line.to_owned());
    let summary = run(from_ref(site), &settings, say).unwrap();
    assert_eq!((summary.cases, summary.equal), (1, 0), "{said:?}");
    let folder = &summary.failed[0];
    let text = std::fs::read_to_string(folder.join("README")).unwrap();
    assert!(text.contains("minimised to: \n"), "{text}");
    assert!(folder.join("minimised/case-0-min.log").is_file());
    assert!(folder.join("case-0.log").is_file());
}

fn main() -> ExitCode {
    let seed = number("FTVMM_SEED").unwrap_or_else(|| clock::since_epoch().as_millis() as u64);
    let cases = number("FTVMM_CASES").unwrap_or(CASES);
    let mut arguments = Arguments::from_args();
    // Each lab has one emulated CPU.
    arguments.test_threads.get_or_insert(2);
    println!("stress: {cases} cases, FTVMM_SEED={seed}");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stress");
    let _ = std::fs::remove_dir_all(&folder);
    let pool = Arc::new(LabPool::new(folder.join("labs")));
    let (first, second) = (Arc::clone(&pool), Arc::clone(&pool));
    let guests = settings(seed, cases, folder.join("failed"));
    let faulty = settings(seed, 1, folder.join("flipped"));
    let trials = vec![
        Trial::test("random_guests_replay_equal", move || {
            first.with(|site| random_guests_replay_equal(site, &guests))?
        }),
        Trial::test("a_flipped_bit_is_found_and_minimised", move || {
            Ok(second.with(|site| a_flipped_bit_is_found_and_minimised(site, faulty))?)
        }),
    ];
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(pool);
    conclusion.exit_code()
}
