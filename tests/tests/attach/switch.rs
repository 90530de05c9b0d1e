//! A planned switchover: the hosts change roles, no frame is lost, and clients hardly wait.

use std::thread;
use std::time::Duration;

use ftvmm_tests::ping::Ping;

use super::*;

const PING_EVERY: Duration = Duration::from_millis(50);
const PINGS: usize = 100;
const SWITCHES: usize = 4;
const DOWNLOAD_BYTES: u64 = 48 * MIB;

/// The one that speaks for the guest and the one that follows, after a switch on the first's order.
fn switched<'a>(primary: Member<'a>, backup: Member<'a>) -> Result<[Member<'a>; 2], Failed> {
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

fn under_ping(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    let quiet = Ping::start(&site.lab, GUEST_ADDRESS, PING_EVERY, PINGS)?.finish()?;
    let ping = Ping::start(&site.lab, GUEST_ADDRESS, PING_EVERY, PINGS)?;
    let [primary, backup] = switched(primary, backup)?;
    let pinged = ping.finish()?;
    println!(
        "  longest round trip {:.0?} without a switch, {:.0?} with one",
        longest(&quiet.answered),
        longest(&pinged.answered)
    );
    equal("pings lost", pinged.lost, 0)?;
    equal("pings answered", pinged.answered.len(), PINGS)?;
    end_alike(site, &group, &primary, &backup)
}

/// There and back again under one download, and then the new primary's host dies.
fn under_download(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let mut primary = alone(site, &group)?;
    let mut backup = attached(&group, 1, &primary)?;
    let mut download = site.download(DOWNLOAD_BYTES)?;
    download.read_through(MIB, |_| ())?;
    let client = thread::spawn(move || download.finish(|_| ()));
    for _ in 0..SWITCHES {
        [primary, backup] = switched(primary, backup)?;
    }
    println!("  the download {}", if client.is_finished() { "was over" } else { "went on" });
    let downloaded = client.join().map_err(|_| "the client panicked")??;
    complete(&downloaded, DOWNLOAD_BYTES)?;
    println!("  stall {:.2} s", downloaded.longest_stall.as_secs_f64());
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
