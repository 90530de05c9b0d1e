//! The hosts' ways to the guest's clients break and come back.

use ftvmm_tests::guest_run::TAP;

use super::*;

const DOWNLOAD_BYTES: u64 = 64 * MIB;

fn ip(site: &Site, host: usize, words: &[&str]) -> Result<(), Failed> {
    let answer = site.lab.host(host).run(&[&["busybox", "ip", "link"], words].concat())?;
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    equal(&format!("ip link {words:?} ({said})"), answer.ended, GOOD)
}

/// This member is active, followed by the other.
fn speaks(member: &Member<'_>) -> Result<(), Failed> {
    member
        .wait_until("a change of roles", |status| status.role == "primary" && status.protected)?;
    Ok(())
}

/// Under one download the primary's tap goes down and the roles change; it comes back and they
/// stay; the new primary's is deleted and they change back; then both are gone and nothing moves.
fn under_download(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let [first, second] = [group.start_primary(0, &[])?, group.join(1, 0, &[])?];
    site.answers(&first.process)?;
    let download = site.download(DOWNLOAD_BYTES)?.in_background();
    download.wait_for_bytes(4 * MIB);
    ip(site, 0, &["set", TAP, "down"])?;
    speaks(&second)?;
    let status = second.status()?.ok_or("no status")?;
    equal("what the other says", status.peer_link_up, Some(false))?;
    ip(site, 0, &["set", TAP, "up"])?;
    second.wait_until("the other's link", |status| status.peer_link_up == Some(true))?;
    ip(site, 1, &["del", TAP])?;
    speaks(&first)?;
    let gone = second.status()?.ok_or("no status")?.link;
    equal("the deleted tap", gone, Some(format!("tap '{TAP}' is gone")))?;
    let downloaded = download.finish()?;
    complete(&downloaded, DOWNLOAD_BYTES)?;
    println!("  longest stall {:.2} s", downloaded.longest_stall.as_secs_f64());
    // Both broken.
    ip(site, 0, &["set", TAP, "down"])?;
    first.wait_until("its own link", |status| status.link.as_deref() != Some("up"))?;
    // It comes back under the old name, and is opened again.
    site.lab.host(1).tap(TAP)?;
    speaks(&second)?;
    site.download_all(MIB)?;
    ip(site, 0, &["set", TAP, "up"])?;
    end_alike(site, &group, &second, &first)
}

/// A guest alone outlives its tap and answers again on the next.
fn solo(site: &Site) -> Result<(), Failed> {
    let group = group(site, RunOptions::default())?;
    let solo = group.launch(0, &["--role", "solo"])?;
    site.answers(&solo.process)?;
    ip(site, 0, &["del", TAP])?;
    let gone = format!("tap '{TAP}' is gone");
    solo.wait_until("the loss of the tap", |status| status.link.as_ref() == Some(&gone))?;
    // What it sends now is lost.
    solo.process.write_stdin(b"busybox ping -c 1 -W 1 10.78.0.1\n");
    site.lab.host(0).tap(TAP)?;
    solo.wait_until("the next tap", |status| status.link.as_deref() == Some("up"))?;
    site.download_all(MIB)?;
    solo.process.signal(SIGTERM);
    ends_with("the guest", &solo.process, GOOD)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![
        ("link-under-download".into(), Box::new(under_download)),
        ("link-solo".into(), Box::new(solo)),
    ]
}
