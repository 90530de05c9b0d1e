//! A backup is attached to a guest that runs, whatever the guest does; one that dies on the way
//! costs the guest nothing.

use std::thread;

use super::*;

/// Rounds of `spin`: some minutes of computation in registers, in which the attach takes place.
const SPIN: &str = "while :; do spin 24; compute 100; done";
const DOWNLOAD_BYTES: u64 = 24 * MIB;
/// Backups that are killed while they attach.
const DEATHS: u64 = 3;
/// The part of the transfer after which the last of them is killed; the looks at the primary are
/// some time apart.
const LATEST_DEATH: f64 = 0.7;

fn idle(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    site.download_all(MIB)?;
    end_alike(site, &group, &primary, &backup)
}

/// With how long the guest stands still, and how that compares with one copy of its memory.
fn computing(site: &Site) -> Result<(), Failed> {
    let group = group(site, running(SPIN))?;
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    let stopped_us = primary.wait_protected()?.last_attach.unwrap_or_default().stopped_us;
    // The backup's host has nothing else to do for a moment; both are emulated alike.
    let memory = format!("bs=1M count={}", RunOptions::default().memory_mib);
    let script = format!(
        "cd /dev/shm && dd if=/dev/zero of=image {memory} 2>/dev/null; \
         t=$(cut -d ' ' -f 1 /proc/uptime); dd if=image of=/dev/null {memory} 2>/dev/null; \
         u=$(cut -d ' ' -f 1 /proc/uptime); rm image; echo $t $u"
    );
    let timed = site.lab.host(1).run(&["sh", "-c", &script])?.text();
    let times: Vec<f64> = timed.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [before, after] = times[..] else { return Err(format!("no times: {timed}").into()) };
    let (stopped_s, copy_s) = (stopped_us as f64 / 1e6, after - before);
    println!(
        "  stopped {:.1} ms; one copy of the memory takes {:.0} ms; ratio {:.2}",
        stopped_s * 1e3,
        copy_s * 1e3,
        stopped_s / copy_s
    );
    site.download_all(MIB)?;
    end_alike(site, &group, &primary, &backup)
}

/// The client of a download sees nothing of the attach, nor of the loss of the first primary after
/// it.
fn downloading(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    let mut download = site.download(DOWNLOAD_BYTES)?;
    download.read_through(MIB, |_| ())?;
    let client = thread::spawn(move || download.finish(|_| ()));
    let backup = attached(&group, 1, &primary)?;
    println!("  the download {}", if client.is_finished() { "was over" } else { "went on" });
    site.lab.host(0).kill();
    equal("take-overs", backup.wait_alone()?.takeovers, 1)?;
    let downloaded = client.join().map_err(|_| "the client panicked")??;
    complete(&downloaded, DOWNLOAD_BYTES)?;
    println!("  stall {:.2} s", downloaded.longest_stall.as_secs_f64());
    site.download_all(MIB)?;
    no_divergence(site, &group)
}

/// How often an attach ended early.
fn interrupted(primary: &Member<'_>) -> usize {
    said(&primary.process).matches("does not have the guest's state").count()
}

/// Backups die at any moment of the attach, as a process and as a host: the guest goes on, its
/// client sees nothing, and the next one is attached.
fn backup_dies_while_attaching(site: &Site, mut rng: Rng) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    for death in 0..DEATHS {
        let mut download = site.download(DOWNLOAD_BYTES)?;
        download.read_through(KIB, |_| ())?;
        let client = thread::spawn(move || download.finish(|_| ()));
        let backup = group.join(1, 0, &[])?;
        let share = rng.f64() * LATEST_DEATH;
        primary.wait_until("part of the transfer", |status| {
            let part = status.attach.as_ref().map(|a| a.bytes as f64 / a.total_bytes as f64);
            status.protected || part.is_some_and(|part| part >= share)
        })?;
        let whole_host = death % 2 == 1;
        let interrupted_before = interrupted(&primary);
        match whole_host {
            true => site.lab.host(1).kill(),
            false => backup.process.kill(),
        }
        let settled = primary.wait_until("being alone again", |status| {
            !status.protected && status.attach.is_none() && status.role == "primary"
        })?;
        equal("divergences", settled.divergences, 0)?;
        println!(
            "  {} died after {:.0} % of the transfer, {}",
            if whole_host { "host" } else { "process" },
            share * 100.0,
            if interrupted(&primary) > interrupted_before {
                "attaching"
            } else {
                "attached by then"
            }
        );
        let downloaded = client.join().map_err(|_| "the client panicked")??;
        complete(&downloaded, DOWNLOAD_BYTES)?;
        site.mend()?;
    }
    require(interrupted(&primary) > 0, "no backup died while it was being attached")?;
    let backup = attached(&group, 1, &primary)?;
    site.download_all(MIB)?;
    end_alike(site, &group, &primary, &backup)
}

pub fn cases(seed: u64) -> Vec<(String, Case)> {
    vec![
        ("attach-idle".into(), Box::new(idle)),
        ("attach-computing".into(), Box::new(computing)),
        ("attach-downloading".into(), Box::new(downloading)),
        (
            "attach-backup-dies".into(),
            Box::new(move |site| backup_dies_while_attaching(site, Rng::with_seed(seed))),
        ),
    ]
}
