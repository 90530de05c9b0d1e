//! A guest that computes makes no exits: its inputs, its clients and its fail-over go by slices.

use std::time::Duration;

use ftvmm_guest_programs::compute::{line_after, spin_line};
use ftvmm_tests::ping::Ping;

use super::*;

const SPIN_ROUNDS: u64 = 24;
const COMPUTE_ROUNDS: u64 = 600;
const PINGS: usize = 60;
const PING_EVERY: Duration = Duration::from_millis(50);

/// The client is answered while the guest computes, and both sides come to the same.
fn answers_while_computing(site: &Site) -> Result<(), Failed> {
    let pair = site.pair(&running(&format!("spin {SPIN_ROUNDS}")))?;
    wait_for(&pair.primary, READY)?;
    wait_for(&pair.primary, &format!("SPIN {SPIN_ROUNDS}"))?;
    site.answers(&pair.primary)?;
    let pinged = Ping::start(&site.lab, GUEST_ADDRESS, PING_EVERY, PINGS)?.finish()?;
    wait_for(&pair.primary, &spin_line(SPIN_ROUNDS))?;
    pair.primary.signal(SIGTERM);
    end_alike(site, &pair)?;
    let [primary, backup] = [site.report(&pair.primary_report)?, site.report(&pair.backup_report)?];
    println!(
        "  {} pings answered, {} lost, {} slices, {} bytes of log",
        pinged.answered.len(),
        pinged.lost,
        primary.slices,
        primary.log_bytes
    );
    equal("backup's slices", backup.slices, primary.slices)?;
    require(primary.slices > 0, "the guest computed without a slice")?;
    equal("pings answered", pinged.answered.len(), PINGS)?;
    equal("answers repeated", pinged.repeated, 0)?;
    equal("pings lost", pinged.lost, 0)
}

/// A backup that is in the middle of a computation goes on with it.
fn survives_while_computing(site: &Site) -> Result<(), Failed> {
    let script = format!("echo BEGIN; compute {COMPUTE_ROUNDS}");
    let pair = site.pair(&running(&script))?;
    wait_for(&pair.backup, "BEGIN")?;
    site.lab.host(0).kill();
    wait_for(&pair.backup, &line_after(COMPUTE_ROUNDS))?;
    site.answers(&pair.backup)?;
    pair.backup.signal(SIGTERM);
    ends_with("survivor", &pair.backup, GOOD)?;
    let report = site.report(&pair.backup_report)?;
    equal("take-overs", report.takeovers, 1)?;
    println!("  take-over {:.3} s", report.takeover_seconds.unwrap_or(f64::NAN));
    Ok(())
}

pub fn cases() -> Vec<(String, Case)> {
    vec![
        ("answers_while_computing".into(), Box::new(answers_while_computing)),
        ("survives_while_computing".into(), Box::new(survives_while_computing)),
    ]
}
