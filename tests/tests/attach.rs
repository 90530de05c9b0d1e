//! Redundancy that comes and goes: a backup attached to a guest that runs, lost, attached again;
//! roles changed on purpose; and the control socket by which an operator does it.
//!
//! Every case runs in one lab of two hosts. `FTVMM_SEED` decides who dies when;
//! `FTVMM_ATTACH_CYCLES` sets how often a backup is attached and the primary lost in one run.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use fastrand::Rng;
use ftvmm_tests::clock;
use ftvmm_tests::group::{Group, Member};
use ftvmm_tests::guest_run::SECOND_TAP;
use ftvmm_tests::lab::Ended;
use ftvmm_tests::pair::{GUEST_ADDRESS, RunOptions};
use ftvmm_tests::site::{
    Case, Site, Stage, complete, ends_with, equal, options, require, run_cases, running, said,
    setting,
};
use libtest_mimic::Failed;
use nix::libc::SIGTERM;

#[path = "attach/authority.rs"]
mod authority;
#[path = "attach/certificates.rs"]
mod certificates;
#[path = "attach/commands.rs"]
mod commands;
#[path = "attach/contained.rs"]
mod contained;
#[path = "attach/cycles.rs"]
mod cycles;
#[path = "attach/etcd.rs"]
mod etcd;
#[path = "attach/hang.rs"]
mod hang;
#[path = "attach/links.rs"]
mod links;
#[path = "attach/live.rs"]
mod live;
#[path = "attach/network.rs"]
mod network;
#[path = "attach/other_user.rs"]
mod other_user;
#[path = "attach/resets.rs"]
mod resets;
#[path = "attach/resumed.rs"]
mod resumed;
#[path = "attach/switch.rs"]
mod switch;
#[path = "attach/visitors.rs"]
mod visitors;
#[path = "attach/witness_folder.rs"]
mod witness_folder;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Exit statuses (decision 0024).
const GOOD: Ended = Ended::Status(0);
const FAILED: Ended = Ended::Status(1);
const BAD_USAGE: Ended = Ended::Status(2);

fn group(site: &Site, options: RunOptions) -> Result<Group<'_>, Failed> {
    Ok(Group::new(&site.lab, &site.files, options)?)
}

/// A guest alone on the first host, its servers up.
fn alone<'a>(site: &Site, group: &Group<'a>) -> Result<Member<'a>, Failed> {
    let member = group.start_alone(0, &[])?;
    site.answers(&member.process)?;
    require(!member.wait_alone()?.protected, "nobody can follow yet")?;
    Ok(member)
}

/// A backup on `host` that follows `of`.
fn attached<'a>(group: &Group<'a>, host: usize, of: &Member<'_>) -> Result<Member<'a>, Failed> {
    let backup = group.join(host, of.host, &[])?;
    let protected = of.wait_followed_by(&backup, |_| ());
    let protected = protected.map_err(|e| format!("{e}\nprimary:\n{}", said(&of.process)))?;
    equal("the primary's role", protected.role.as_str(), "primary")?;
    equal("the backup's role", backup.wait_protected()?.role.as_str(), "backup")?;
    let last = protected.last_attach.ok_or("the status tells nothing of the attach")?;
    println!(
        "  attached in {} ms, the guest stood still for {:.1} ms; {} bytes in {} rounds",
        last.duration_ms,
        last.stopped_us as f64 / 1e3,
        last.bytes,
        last.rounds
    );
    require(last.bytes > 0 && last.rounds > 0, format!("nothing was sent: {last:?}"))?;
    Ok(backup)
}

/// Waits until the member has said this.
fn wait_said(member: &Member<'_>, line: &str) -> Result<(), Failed> {
    let process = &member.process;
    require(process.wait_for_stderr(line)?, format!("no {line:?} in:\n{}", said(process)))
}

/// How many of the lines that the member has said have this.
fn lines_with(member: &Member<'_>, part: &str) -> usize {
    said(&member.process).lines().filter(|line| line.contains(part)).count()
}

/// A visitor that cannot prove to be the other host ends; both sides say why in one line.
fn not_accepted(primary: &Member<'_>, visitor: &Member<'_>) -> Result<(), Failed> {
    ends_with("the visitor", &visitor.process, BAD_USAGE)?;
    wait_said(primary, "a connection was refused")?;
    for (member, begins) in [(primary, "a connection was refused"), (visitor, "ftvmm: the peer")] {
        let told = said(&member.process);
        let reason = "the two hosts do not accept each other's key or certificate";
        equal(&format!("refusals in\n{told}"), lines_with(member, begins), 1)?;
        equal(&format!("reasons in\n{told}"), lines_with(member, reason), 1)?;
        println!("  {}", told.lines().find(|line| line.contains(reason)).unwrap_or_default());
    }
    Ok(())
}

/// Nobody in the group has found a difference.
fn no_divergence(site: &Site, group: &Group<'_>) -> Result<(), Failed> {
    let folder = site.lab.share().join(group.incidents());
    let incidents: Vec<_> = fs::read_dir(folder)?.map(|e| e.map(|e| e.file_name())).collect();
    equal("incidents", incidents.len(), 0)
}

/// Ends a guest on both hosts: both must have come to the same state.
fn end_alike(
    site: &Site,
    group: &Group<'_>,
    primary: &Member<'_>,
    backup: &Member<'_>,
) -> Result<(), Failed> {
    primary.process.signal(SIGTERM);
    ends_with("primary", &primary.process, GOOD)?;
    ends_with("backup", &backup.process, GOOD)?;
    let [primary, backup] = [site.report(&primary.report)?, site.report(&backup.report)?];
    require(primary.state_digest.is_some(), "the primary's report has no digest")?;
    equal("backup's state digest", backup.state_digest, primary.state_digest)?;
    equal("backup's exits", backup.exits, primary.exits)?;
    equal("divergences", (primary.divergences, backup.divergences), (0, 0))?;
    no_divergence(site, group)?;
    println!("  alike after {} exits", primary.exits);
    Ok(())
}

fn main() -> ExitCode {
    let seed = setting("FTVMM_SEED").unwrap_or_else(|| clock::since_epoch().as_millis() as u64);
    println!("attach: FTVMM_SEED={seed}");
    let cases = [
        commands::cases(),
        contained::cases(),
        hang::cases(),
        links::cases(),
        live::cases(seed),
        cycles::cases(seed),
        resets::cases(),
        resumed::cases(),
        switch::cases(),
        network::cases(),
        visitors::cases(),
        certificates::cases(),
        other_user::cases(),
        etcd::cases(),
        witness_folder::cases(),
    ];
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("attach");
    run_cases(&folder, cases.into_iter().flatten().collect())
}
