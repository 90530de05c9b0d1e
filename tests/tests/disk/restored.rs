//! A snapshot of a guest whose database is at work: its disk is in it.

use super::*;

/// On a host: sockets cannot lie in the shared folder.
const SOCKET: &str = "/tmp/disk-control.sock";

/// The guest goes on from the snapshot on a new disk, a replay from it needs none, and a file that
/// is there is not overwritten.
pub fn restored_with_its_disk(site: &Site) -> Result<(), Failed> {
    site.make_disk("disk-0.img")?;
    let host = site.lab.lab.host(0);
    let [log, snapshot] = ["saved.log", "saved.snapshot"].map(|name| site.lab.inside(name));
    let _ = fs::remove_file(site.lab.outside("saved.snapshot"));
    let into = site.lab.inside("");
    let served = ["--control", SOCKET, "--snapshot-dir", &into, "--record", &log];
    let run = site.solo("saved", LEDGER, &served)?;
    wait_for(&run, "LEDGER committed 5\r")?;
    let taken = host.run(&["ftvmm", "snapshot", &snapshot, "--control", SOCKET])?;
    let said = String::from_utf8_lossy(&taken.stderr).into_owned();
    require(taken.ended == GOOD, format!("snapshot: {said}"))?;
    let before = committed(&run);
    wait_for(&run, &format!("LEDGER committed {}\r", before + 5))?;
    run.signal(SIGTERM);
    ends_with("recorded", &run, GOOD)?;

    let exits = site.reported("saved.json", "/exits")?.to_string();
    let report = site.lab.inside("again.json");
    let replay = host.run(&["ftvmm", "replay", &log, "--from", &exits, "--report", &report])?;
    equal("replay from the snapshot", replay.ended, GOOD)?;
    let digest = |report: &str| site.reported(report, "/state_digest");
    equal("state digest", digest("again.json")?, digest("saved.json")?)?;

    let onto = |name: &str| format!("path={}", site.lab.inside(name));
    let there = host.spawn(&["ftvmm", "--restore", &snapshot, "--disk", &onto("disk-0.img")])?;
    ends_with("onto a disk that is there", &there, BAD_USAGE)?;
    says(&there, &["disk-0.img", "there already", "new file"])?;
    let _ = fs::remove_file(site.lab.outside("disk-new.img"));
    let again = host.spawn(&["ftvmm", "--restore", &snapshot, "--disk", &onto("disk-new.img")])?;
    wait_for(&again, &format!("LEDGER committed {}\r", before + 5))?;
    again.signal(SIGTERM);
    ends_with("restored", &again, GOOD)?;
    let last = committed(&again);
    let found = site.ledger_on("disk-new.img")?;
    println!(
        "  {before} transactions at the snapshot, {last} committed since, {found} on the disk"
    );
    require(found >= last, format!("{found} transactions on the disk, {last} were committed"))
}
