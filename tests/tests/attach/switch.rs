//! A planned switchover: the hosts change roles, no frame is lost, and clients hardly wait.

use std::time::Duration;

use ftvmm_tests::lab::LabProcess;
use ftvmm_tests::ping::{Ping, Pinged};
use ftvmm_tests::site;

use super::*;

const PING_EVERY: Duration = Duration::from_millis(50);
const PINGS: usize = 100;
/// An even number: in the end the roles are as in the beginning.
const SWITCHES: u64 = 4;
const DOWNLOAD_BYTES: u64 = 48 * MIB;

/// The one that is active and the one that follows, after a switch on the first's order.
pub fn switched<'a>(primary: Member<'a>, backup: Member<'a>) -> Result<[Member<'a>; 2], Failed> {
    let began = clock::now();
    let answer = primary.ask(&["switch"])?;
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    equal(&format!("switch ({said})"), answer.ended, GOOD)?;
    println!("  switched, the command took {:.0?}", began.elapsed());
    // They have changed when the command returns; nothing is to be waited for.
    let status = |member: &Member<'_>| member.status()?.ok_or_else(|| Failed::from("no status"));
    let [old, new] = [status(&primary)?, status(&backup)?];
    equal("roles", (old.role.as_str(), new.role.as_str()), ("backup", "primary"))?;
    backup.wait_protected()?;
    Ok([backup, primary])
}

fn longest(times: &[Duration]) -> Duration {
    times.iter().copied().max().unwrap_or_default()
}

/// Orders a switch through a client that is connected already, its `nth`.
fn order(client: &LabProcess, nth: u64) -> Result<(), Failed> {
    client.write_stdin(b"/switch\n");
    site::wait_for(client, &format!("{nth}: HTTP/1.1 204"))
}

fn under_ping(site: &Site) -> Result<(), Failed> {
    site.lab.install(Path::new(env!("CARGO_BIN_EXE_control-client")))?;
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    let clients = [primary.connected_client()?, backup.connected_client()?];
    let ping = || Ping::start(&site.lab, GUEST_ADDRESS, PING_EVERY, PINGS);
    let quiet = ping()?.finish()?;
    println!("  longest round trip {:.0?} without a switch", longest(&quiet.answered));
    let pinged = |doing: &str, pinged: Pinged| {
        println!("  {:.0?} with {doing}", longest(&pinged.answered));
        equal("pings lost", pinged.lost, 0)?;
        equal("answers repeated", pinged.repeated, 0)?;
        equal("pings answered", pinged.answered.len(), PINGS)
    };
    // There and back again, by who only asks; then by a program that has to start first.
    for client in &clients {
        let running = ping()?;
        order(client, 1)?;
        pinged("a switch", running.finish()?)?;
    }
    let running = ping()?;
    let status = primary.ask(&["status"])?;
    equal("status", status.ended, GOOD)?;
    pinged("`ftvmm status`, which the guest has no part in", running.finish()?)?;
    let running = ping()?;
    let [primary, backup] = switched(primary, backup)?;
    pinged("`ftvmm switch` and two of `ftvmm status`", running.finish()?)?;
    end_alike(site, &group, &primary, &backup)
}

/// There and back again under one download, and then the new primary's host dies.
fn under_download(site: &Site) -> Result<(), Failed> {
    site.lab.install(Path::new(env!("CARGO_BIN_EXE_control-client")))?;
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    let undisturbed = site.download(DOWNLOAD_BYTES)?.finish(|_| ())?;
    complete(&undisturbed, DOWNLOAD_BYTES)?;
    let clients = [primary.connected_client()?, backup.connected_client()?];
    let download = site.download(DOWNLOAD_BYTES)?.in_background();
    for (number, asked) in (0..SWITCHES).zip(clients.iter().cycle()) {
        let wanted = DOWNLOAD_BYTES / (SWITCHES + 1) * (number + 1);
        download.wait_for_bytes(wanted);
        order(asked, number / 2 + 1)?;
    }
    println!("  the download {}", if download.is_over() { "was over" } else { "went on" });
    let downloaded = download.finish()?;
    complete(&downloaded, DOWNLOAD_BYTES)?;
    println!(
        "  stall {:.0?} in a download without a switch, {:.0?} in one with {SWITCHES}",
        undisturbed.longest_stall, downloaded.longest_stall
    );
    let statuses = [primary.status()?, backup.status()?].map(Option::unwrap_or_default);
    equal("roles", statuses.each_ref().map(|s| s.role.as_str()), ["primary", "backup"])?;
    no_divergence(site, &group)?;
    site.lab.host(primary.host).kill();
    backup.wait_alone()?;
    site.download_all(MIB)?;
    no_divergence(site, &group)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![
        ("switch-under-ping".into(), Box::new(under_ping)),
        ("switch-under-download".into(), Box::new(under_download)),
    ]
}
