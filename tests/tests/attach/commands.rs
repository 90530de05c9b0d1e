//! The control socket and the commands that use it.

use ftvmm_tests::group::Status;

use super::*;

/// What a refused command prints, and that its status is the right one.
fn refused(member: &Member<'_>, words: &[&str], wanted: Ended, why: &str) -> Result<(), Failed> {
    let answer = member.ask(words)?;
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    equal(&format!("{words:?} ({said})"), answer.ended, wanted)?;
    require(said.starts_with("ftvmm: ") && said.contains(why), format!("{words:?}: {said}"))
}

fn obeyed(member: &Member<'_>, words: &[&str]) -> Result<String, Failed> {
    let answer = member.ask(words)?;
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    equal(&format!("{words:?} ({said})"), answer.ended, GOOD)?;
    Ok(answer.text())
}

fn status(member: &Member<'_>) -> Result<Status, Failed> {
    Ok(member.status()?.ok_or_else(|| format!("no status:\n{}", said(&member.process)))?)
}

/// A guest without a pair can be looked at and stopped; the rest is refused and does no harm.
fn solo(site: &Site) -> Result<(), Failed> {
    let group = group(site, RunOptions::default())?;
    let solo = group.launch(0, &["--role", "solo"])?;
    site.answers(&solo.process)?;
    let before = status(&solo)?;
    equal("role and state", (before.role.as_str(), before.state.as_str()), ("solo", "Running"))?;
    site.download_all(KIB)?;
    let after = status(&solo)?;
    require(after.exit > before.exit, "the guest answered a client without an exit")?;
    let told = obeyed(&solo, &["status"])?;
    require(told.starts_with("solo, not protected"), told)?;
    refused(&solo, &["detach"], FAILED, "not possible now")?;
    refused(&solo, &["switch"], FAILED, "not possible now")?;
    refused(&solo, &["attach", "--listen", "nowhere"], BAD_USAGE, "nowhere")?;
    refused(&solo, &["attach"], BAD_USAGE, "--listen")?;
    site.download_all(KIB)?;

    // The same socket for a second one: refused, and the first goes on being served.
    let kernel = site.files.kernel.display().to_string();
    refused(&solo, &["--kernel", &kernel], BAD_USAGE, "another ftvmm serves it")?;
    equal("role", status(&solo)?.role.as_str(), "solo")?;
    obeyed(&solo, &["stop"])?;
    ends_with("the guest", &solo.process, GOOD)?;
    refused(&solo, &["status"], FAILED, "no ftvmm answers")
}

/// A primary that waits can be asked before there is a guest; a pair tells of both its sides and is
/// stopped as one.
fn pair(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let primary = group.start_primary(0, &[])?;
    let waits = primary.wait_until("waiting for a status", |_| true)?;
    equal("role and state", (waits.role.as_str(), waits.protected), ("primary", false))?;
    let backup = group.join(1, 0, &[])?;
    site.answers(&primary.process)?;
    let [first, second] = [primary.wait_protected()?, backup.wait_protected()?];
    equal("roles", (first.role.as_str(), second.role.as_str()), ("primary", "backup"))?;
    site.download_all(KIB)?;
    let told = obeyed(&primary, &["status"])?;
    require(told.starts_with("primary, protected") && told.contains("exits behind"), told)?;
    // TEST-NET-3: no host has it.
    let nobodys = ["attach", "--listen", "203.0.113.1:7700"];
    refused(&primary, &nobodys, BAD_USAGE, "203.0.113.1:7700")?;
    refused(&backup, &["switch"], FAILED, "not possible now")?;
    refused(&backup, &["detach"], FAILED, "not possible now")?;
    obeyed(&primary, &["stop"])?;
    ends_with("primary", &primary.process, GOOD)?;
    ends_with("backup", &backup.process, GOOD)?;
    no_divergence(site, &group)
}

/// An operator lets the backup go and takes it back.
fn detach_and_attach(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    refused(&primary, &["detach"], FAILED, "not possible now")?;
    let backup = attached(&group, 1, &primary)?;
    obeyed(&primary, &["detach"])?;
    equal("protected after detach", status(&primary)?.protected, false)?;
    ends_with("the backup that was let go", &backup.process, GOOD)?;
    site.download_all(MIB)?;
    let address = group.address(0);
    obeyed(&primary, &["attach", "--listen", &address])?;
    let backup = attached(&group, 1, &primary)?;
    site.download_all(MIB)?;
    end_alike(site, &group, &primary, &backup)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![
        ("commands-solo".into(), Box::new(solo)),
        ("commands-pair".into(), Box::new(pair)),
        ("commands-detach-and-attach".into(), Box::new(detach_and_attach)),
    ]
}
