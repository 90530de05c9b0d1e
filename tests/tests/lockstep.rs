//! A guest on two hosts: what a client, and the operator, see of failures.
//!
//! Every case runs in one lab of two hosts; a host that a case has killed is started again before
//! the next case. What is done to a pair, and when, follows from a seed: `FTVMM_SEED` sets it,
//! `FTVMM_ROUNDS` the number of fail-over rounds. One difference the handshake refuses cannot be
//! brought about from the command line: the protocol's version. It is tested where the fingerprint
//! is, in `ftvmm-replication`. So is a peer of the same role: a primary cannot connect, a backup
//! cannot listen.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use fastrand::Rng;
use ftvmm_guest_images::GuestKernel;
use ftvmm_tests::clock;
use ftvmm_tests::lab::{Ended, LabProcess};
use ftvmm_tests::pair::{GUEST_ADDRESS, GuestFiles, Pair, READY, RunOptions};
use ftvmm_tests::site::{
    Case, Site, complete, ends_with, equal, options, require, run_cases, running, said, setting,
    wait_for,
};
use libtest_mimic::Failed;
use nix::libc::SIGTERM;

#[path = "lockstep/computing.rs"]
mod computing;
#[path = "lockstep/failover.rs"]
mod failover;
#[path = "lockstep/faults.rs"]
mod faults;
#[path = "lockstep/mixed.rs"]
mod mixed;
#[path = "lockstep/peers.rs"]
mod peers;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What a kernel that is not quiet prints first.
const FIRST_LINE: &str = "Linux version";
/// Exit statuses (decision 0024).
const BAD_USAGE: Ended = Ended::Status(2);
const DIVERGENCE: Ended = Ended::Status(3);
const LOST_WITNESS: Ended = Ended::Status(4);
const GOOD: Ended = Ended::Status(0);

/// The one line for the user among what is logged.
fn one_line(who: &str, process: &LabProcess, words: &[&str]) -> Result<(), Failed> {
    let said = said(process);
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("ftvmm: ")).collect();
    println!("  {who}: {}", lines.join("\n  "));
    let good = matches!(lines[..], [line] if words.iter().all(|word| line.contains(word)));
    require(good, format!("{who} does not say {words:?} in one line:\n{said}"))
}

/// Ends a pair whose guest was not disturbed: both sides must have come to the same.
fn end_alike(site: &Site, pair: &Pair) -> Result<(), Failed> {
    ends_with("primary", &pair.primary, GOOD)?;
    ends_with("backup", &pair.backup, GOOD)?;
    let [primary, backup] = [site.report(&pair.primary_report)?, site.report(&pair.backup_report)?];
    require(primary.state_digest.is_some(), "the primary's report has no digest")?;
    equal("backup's state digest", backup.state_digest, primary.state_digest)?;
    equal("backup's exits", backup.exits, primary.exits)?;
    equal("backup's frames", backup.outputs, primary.outputs)?;
    require(primary.outputs > 0, "the guest sent nothing")?;
    equal("frames compared", primary.frames_compared, primary.outputs)?;
    equal("divergences", (primary.divergences, backup.divergences), (0, 0))?;
    equal("take-overs", (primary.takeovers, backup.takeovers), (0, 0))?;
    println!("  {} exits, {} frames compared", primary.exits, primary.frames_compared);
    Ok(())
}

fn stopped_by_the_host(site: &Site) -> Result<(), Failed> {
    let pair = site.ready_pair(&options(&["--release", "compare"]))?;
    site.download_all(256 * KIB)?;
    pair.primary.signal(SIGTERM);
    end_alike(site, &pair)
}

fn ended_by_the_guest(site: &Site) -> Result<(), Failed> {
    let pair = site.ready_pair(&options(&["--release", "ack"]))?;
    site.download_all(256 * KIB)?;
    pair.primary.write_stdin(b"reboot -f\n");
    end_alike(site, &pair)
}

fn cases(seed: u64, rounds: u64) -> Vec<(String, Case)> {
    let mut cases: Vec<(String, Case)> = vec![
        ("stopped_by_the_host".into(), Box::new(stopped_by_the_host)),
        ("ended_by_the_guest".into(), Box::new(ended_by_the_guest)),
    ];
    cases.extend(peers::cases(seed));
    cases.extend(faults::cases(seed));
    cases.extend(computing::cases());
    cases.extend(mixed::cases());
    cases.extend(failover::cases(seed, rounds));
    cases
}

fn main() -> ExitCode {
    let seed = setting("FTVMM_SEED").unwrap_or_else(|| clock::since_epoch().as_millis() as u64);
    let rounds = setting("FTVMM_ROUNDS").unwrap_or(failover::ROUNDS);
    println!("lockstep: FTVMM_SEED={seed}");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lockstep");
    run_cases(&folder, cases(seed, rounds))
}
