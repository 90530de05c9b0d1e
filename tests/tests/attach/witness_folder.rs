//! A witness whose folder takes nothing: its file system is full, or mounted for reading only.

use std::thread;
use std::time::Duration;

use ftvmm_tests::lab::Host;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// A small file system in the shared directory.
const SMALL: &str = "small";
const SMALL_BYTES: &str = "size=256k";
/// Tries to fill it: a host may remove a file of its own meanwhile.
const FILLS: u32 = 240;
const FILL_EVERY: Duration = Duration::from_millis(500);
/// A reason that goes on is said again after so long, and then ever more seldom. The first line may
/// be older than the look at the clock.
const SAID_AGAIN_S: u64 = 10;
const LINES_AT_ONCE: u64 = 2;
const FULL: &str = "No space left on device";
const READ_ONLY: &str = "Read-only file system";

/// Gives both hosts, which are started anew for that, the small file system. It is mounted where
/// only they see it, and goes with them.
fn make_small(site: &Site) -> Result<(), Failed> {
    let folder = site.lab.share().join(SMALL);
    fs::create_dir_all(&folder)?;
    let restart = || {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some(SMALL_BYTES))?;
        for host in [site.lab.host(0), site.lab.host(1)] {
            host.restart()?;
        }
        Ok(())
    };
    thread::scope(|scope| scope.spawn(restart).join()).map_err(|_| "the thread panicked")?
}

fn run(host: &Host, script: &str) -> Result<bool, Failed> {
    let small = host.share().join(SMALL).display().to_string();
    Ok(host.run(&["sh", "-c", &format!("cd / && SMALL={small}; {script}")])?.ended == GOOD)
}

fn must(host: &Host, script: &str) -> Result<(), Failed> {
    require(run(host, script)?, format!("host {}: {script}", host.letter()))
}

/// Fills the file system until `is_felt`.
fn fill(host: &Host, is_felt: impl Fn() -> bool) -> Result<(), Failed> {
    for _ in 0..FILLS {
        // It ends when nothing more goes in.
        run(host, "cat /dev/zero >> $SMALL/fill")?;
        if is_felt() {
            return Ok(());
        }
        thread::sleep(FILL_EVERY);
    }
    Err("nobody says that the file system is full".into())
}

/// A witness of its own in the small file system.
fn group_in<'a>(site: &'a Site, name: &str) -> Result<Group<'a>, Failed> {
    must(site.lab.host(0), &format!("mkdir -p $SMALL/{name}"))?;
    let mut group = group(site, options(&[]))?;
    group.keep_witness_in(&format!("{SMALL}/{name}"))?;
    Ok(group)
}

/// A start ends with this reason and this remedy, once.
fn is_refused(group: &Group<'_>, reason: &str, remedy: &str) -> Result<(), Failed> {
    let start = group.start_primary(0, &[])?;
    ends_with("the start", &start.process, BAD_USAGE)?;
    equal(&format!("lines: {}", said(&start.process)), lines_with(&start, "ftvmm: "), 1)?;
    equal(&format!("lines: {}", said(&start.process)), lines_with(&start, reason), 1)?;
    equal(&said(&start.process), lines_with(&start, remedy), 1)
}

/// Starts are refused. A pair goes on and says why nobody may take over; who has lost its primary
/// waits for room, and then takes over.
fn takes_nothing(site: &Site) -> Result<(), Failed> {
    make_small(site)?;
    let (a, b) = (site.lab.host(0), site.lab.host(1));
    let starts = group_in(site, "starts")?;
    fill(b, || true)?;
    is_refused(&starts, FULL, "make room on its file system")?;
    must(b, "rm $SMALL/fill")?;
    must(a, "mount -o bind $SMALL $SMALL; mount -o remount,ro,bind $SMALL")?;
    is_refused(&starts, READ_ONLY, "mount its file system for writing")?;
    must(a, "umount $SMALL")?;

    let group = group_in(site, "pair")?;
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    fill(b, || lines_with(&primary, FULL) > 0)?;
    site.download_all(MIB)?;
    require(primary.wait_protected()?.protected, "a pair that is whole asks nobody")?;
    primary.process.kill();
    wait_said(&backup, "the witness grants nothing; asking again")?;
    let began = clock::now();
    let waits = backup.wait_until("asking the witness", |_| began.elapsed().as_secs() >= 3)?;
    equal("role without a witness", (waits.role.as_str(), waits.takeovers), ("backup", 0))?;
    let most = LINES_AT_ONCE + began.elapsed().as_secs() / SAID_AGAIN_S;
    let lines = lines_with(&backup, "the witness grants nothing");
    require(lines as u64 <= most, said(&backup.process))?;
    must(b, "rm $SMALL/fill")?;
    backup.wait_alone()?;
    site.download_all(MIB)?;
    backup.process.signal(SIGTERM);
    ends_with("the survivor", &backup.process, GOOD)?;
    no_divergence(site, &group)
}

/// A primary that waits when its witness is taken from it says why no backup is taken, not ten
/// times a second, and ends when it is told to.
fn is_taken_away(site: &Site) -> Result<(), Failed> {
    let (a, folder) = (site.lab.host(0), "taken");
    let mut group = group(site, options(&[]))?;
    group.keep_witness_in(folder)?;
    let folder = a.share().join(folder).display().to_string();
    must(a, &format!("mount -o bind {folder} {folder}"))?;
    let primary = group.start_primary(0, &[])?;
    primary.wait_until("waiting for a backup", |_| true)?;
    must(a, &format!("mount -o remount,ro,bind {folder}"))?;
    let began = clock::now();
    let backup = group.join(1, 0, &[])?;
    wait_said(&primary, READ_ONLY)?;
    ends_with("the backup", &backup.process, BAD_USAGE)?;
    wait_said(&backup, "is an ftvmm primary listening there? If so, it says why")?;
    let most = LINES_AT_ONCE + began.elapsed().as_secs() / SAID_AGAIN_S;
    require(lines_with(&primary, READ_ONLY) as u64 <= most, said(&primary.process))?;
    primary.process.signal(SIGTERM);
    ends_with("the primary", &primary.process, GOOD)?;
    must(a, &format!("umount {folder}"))
}

pub fn cases() -> Vec<(String, Case)> {
    vec![
        ("witness-taken-away".into(), Box::new(is_taken_away)),
        ("witness-takes-nothing".into(), Box::new(takes_nothing)),
    ]
}
