//! A guest that resets stays one guest: alone, in lockstep, and after its host has died.

use std::thread;
use std::time::Duration;

use ftvmm_tests::pair::READY;
use ftvmm_tests::site::wait_for;

use super::*;

const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A guest that does not listen to the power button needs none of it.
const GRACE_S: &str = "86400";

/// Waits until the guest has booted so many times, as this member's console shows it.
fn booted(member: &Member<'_>, times: usize) -> Result<(), Failed> {
    wait_for(&member.process, READY)?;
    let count = || String::from_utf8_lossy(&member.process.stdout()).matches(READY).count();
    while count() < times {
        require(member.process.ended().is_none(), said(&member.process))?;
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Resets alone, gets a backup, resets with it, loses its host, resets alone again, and is told to
/// end: with what a user gets who names no option.
fn everywhere(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&["--on-reset", "restart", "--stop-grace", GRACE_S]))?;
    let primary = alone(site, &group)?;
    primary.process.write_stdin(b"reboot -f\n");
    booted(&primary, 2)?;
    let backup = attached(&group, 1, &primary)?;
    site.download_all(MIB)?;
    primary.process.write_stdin(b"echo triple > /sys/kernel/reboot/type; reboot -f\n");
    booted(&primary, 3)?;
    booted(&backup, 1)?;
    site.download_all(MIB)?;
    equal("protected", backup.status()?.ok_or("no status")?.protected, true)?;
    site.lab.host(0).kill();
    equal("take-overs", backup.wait_alone()?.takeovers, 1)?;
    site.download_all(MIB)?;
    backup.process.write_stdin(b"reboot -f\n");
    booted(&backup, 2)?;
    site.download_all(MIB)?;
    backup.process.signal(SIGTERM);
    ends_with("the survivor", &backup.process, GOOD)?;
    equal("resets", site.report(&backup.report)?.resets, 3)?;
    no_divergence(site, &group)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("resets".into(), Box::new(everywhere))]
}
