//! What a disk is, and whether it may be used: half copied, left behind, of a host that died.

use super::*;

/// More than is copied in the time that a look at it takes.
const SLOW_DISK_BYTES: usize = 128 << 20;

/// Waits until the label says so: the disk's worker writes it, and may come later than what the
/// hosts say of themselves.
fn is_labelled(site: &Site, disk: &str, state: &str) -> Result<(), Failed> {
    let label = site.lab.outside(format!("{disk}.ftvmm"));
    let begun = ftvmm_tests::clock::now();
    loop {
        // A disk that was never used has none.
        let said = fs::read_to_string(&label).unwrap_or_default();
        if said.contains(&format!("state {state}\n")) {
            return Ok(());
        }
        require(begun.elapsed().as_secs() < 60, format!("{disk}, not {state}: {said}"))?;
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn options(site: &Site, disk: &str, more: &str) -> [String; 2] {
    ["--disk".into(), format!("path={}{more}", site.lab.inside(disk))]
}

/// Starts a member with its disk.
fn with_disk(words: &[String; 2]) -> [&str; 2] {
    [&words[0], &words[1]]
}

/// A backup is killed while it attaches. Its disk boots no guest, alone or in a pair, unless the
/// user says so; it is good for another attach.
pub fn a_half_copied_disk_is_refused(site: &Site) -> Result<(), Failed> {
    site.make_disks()?;
    // Content that takes time to send.
    let mut noise = vec![0; SLOW_DISK_BYTES];
    Rng::with_seed(1).fill(&mut noise);
    fs::write(site.lab.outside("disk-0.img"), noise)?;
    let image = fs::File::options().write(true).open(site.lab.outside("disk-1.img"))?;
    image.set_len(SLOW_DISK_BYTES as u64)?;
    let group = Group::new(&site.lab.lab, &site.files, running("sleep 1000"))?;
    let (first, second) = (options(site, "disk-0.img", ""), options(site, "disk-1.img", ""));
    let primary = group.start_alone(0, &with_disk(&first))?;
    wait_for(&primary.process, "FTGUEST READY")?;
    is_labelled(site, "disk-0.img", "active")?;
    let backup = group.join(1, 0, &with_disk(&second))?;
    is_labelled(site, "disk-1.img", "incomplete")?;
    site.lab.lab.host(1).kill();
    let _ = backup.process.wait();
    site.mend()?;
    is_labelled(site, "disk-1.img", "incomplete")?;

    let host = site.lab.lab.host(1);
    let boot = |more: &str| {
        let disk = options(site, "disk-1.img", more);
        let script = cmdline("poweroff -f");
        host.spawn(&site.lab.boot(&[&["--cmdline", &script][..], &with_disk(&disk)].concat()))
    };
    let refused = boot("")?;
    ends_with("half a disk", &refused, BAD_USAGE)?;
    says(&refused, &["disk-1.img", "incomplete: since 20", "force=incomplete"])?;
    let wrong = boot(",force=outdated")?;
    ends_with("another force", &wrong, BAD_USAGE)?;
    ends_with("forced", &boot(",force=incomplete")?, GOOD)?;

    // Whatever was forced: another attach makes it whole.
    let again = group.join(1, 0, &with_disk(&second))?;
    primary.wait_followed_by(&again, |_| ())?;
    is_labelled(site, "disk-1.img", "following")?;
    primary.process.signal(SIGTERM);
    ends_with("primary", &primary.process, GOOD)?;
    ends_with("backup", &again.process, GOOD)?;
    is_labelled(site, "disk-0.img", "clean")
}

/// The primary's host dies, the backup takes over and goes on; hours later somebody starts the old
/// disk.
pub fn the_dead_hosts_disk_is_refused(site: &Site) -> Result<(), Failed> {
    site.make_disks()?;
    let group = Group::new(&site.lab.lab, &site.files, running(LEDGER))?;
    let (first, second) = (options(site, "disk-0.img", ""), options(site, "disk-1.img", ""));
    let primary = group.start_primary(0, &with_disk(&first))?;
    let backup = group.join(1, 0, &with_disk(&second))?;
    primary.wait_protected()?;
    wait_for(&primary.process, "LEDGER committed 3\r\n")?;
    is_labelled(site, "disk-0.img", "active")?;
    is_labelled(site, "disk-1.img", "following")?;
    site.lab.lab.host(0).kill();
    let _ = primary.process.wait();
    let last = committed(&primary.process) + 5;
    wait_for(&backup.process, &format!("LEDGER committed {last}\r\n"))?;
    is_labelled(site, "disk-1.img", "active")?;
    backup.process.signal(SIGTERM);
    ends_with("survivor", &backup.process, GOOD)?;
    is_labelled(site, "disk-1.img", "clean")?;
    site.mend()?;

    let old = group.start_alone(0, &with_disk(&first))?;
    ends_with("the old disk", &old.process, BAD_USAGE)?;
    says(&old.process, &["disk-0.img", "outdated: it was active in term 1", "force=outdated"])?;
    let solo = site.solo("old", LEDGER, &[])?;
    ends_with("the old disk, alone", &solo, BAD_USAGE)?;
    says(&solo, &["disk-0.img", "may be outdated", "force=outdated"])?;

    let new = group.start_alone(1, &with_disk(&second))?;
    wait_for(&new.process, "LEDGER found ")?;
    let joined = group.join(0, 1, &with_disk(&first))?;
    new.wait_followed_by(&joined, |_| ())?;
    is_labelled(site, "disk-0.img", "following")?;
    new.process.signal(SIGTERM);
    ends_with("new primary", &new.process, GOOD)?;
    ends_with("new backup", &joined.process, GOOD)
}
