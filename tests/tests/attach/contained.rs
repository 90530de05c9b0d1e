//! A pair whose threads have their filters and whose files are confined does what a pair does.

use super::*;

/// Status of a process that made a call it may not make (docs/options.md).
const VIOLATION: i32 = 148;

/// Attach, snapshot, switch, loss of a host, attach again, end: no thread misses a call.
fn pair(site: &Site) -> Result<(), Failed> {
    let folder = site.lab.host(0).share().display().to_string();
    let contained = ["--seccomp", "on", "--landlock", "on", "--snapshot-dir", &folder];
    let group = group(site, options(&contained))?;
    let primary = alone(site, &group)?;
    site.download_all(MIB)?;
    let backup = attached(&group, 1, &primary)?;
    site.download_all(MIB)?;

    let snapshot = format!("{folder}/contained.snapshot");
    let answer = primary.ask(&["snapshot", &snapshot])?;
    let told = String::from_utf8_lossy(&answer.stderr).into_owned();
    equal(&format!("the snapshot ({told})"), answer.ended, GOOD)?;
    let mode = site.lab.host(0).run(&["stat", "-c", "%a", &snapshot])?;
    equal("mode of the snapshot", mode.text().trim(), "600")?;
    let elsewhere = primary.ask(&["snapshot", "/tmp/contained.snapshot"])?;
    let told = String::from_utf8_lossy(&elsewhere.stderr).into_owned();
    equal(&format!("a snapshot elsewhere ({told})"), elsewhere.ended, BAD_USAGE)?;

    let answer = primary.ask(&["switch"])?;
    equal("the switch", answer.ended, GOOD)?;
    site.download_all(MIB)?;
    backup.process.signal(nix::libc::SIGKILL);
    primary.wait_alone()?;
    site.download_all(MIB)?;
    require(!said(&primary.process).contains("made system call"), said(&primary.process))?;

    let backup = attached(&group, 1, &primary)?;
    require(!matches!(backup.process.ended(), Some(Ended::Status(VIOLATION))), "a violation")?;
    end_alike(site, &group, &primary, &backup)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("contained-pair".into(), Box::new(pair))]
}
