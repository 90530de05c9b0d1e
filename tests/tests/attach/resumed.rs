//! The network ends the connection between two hosts that live: they make it again, and nobody
//! takes over.

use std::thread;
use std::time::Duration;

use ftvmm_tests::pair::PORT;
use ftvmm_tests::stranger::forge_reset;

use super::*;

const DOWNLOAD_BYTES: u64 = 64 * MIB;
/// A forged reset fails where more has come in the meantime.
const ATTEMPTS: usize = 100;
/// Looks after each whether it has come through.
const LOOKS: u32 = 20;
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What a host says of a connection that stands again.
const AGAIN: &str = "the channel stands again";

fn times(member: &Member<'_>) -> usize {
    String::from_utf8_lossy(&member.process.stderr()).matches(AGAIN).count()
}

/// Resets the connection under this member until it has been made again.
fn reset(site: &Site, member: &Member<'_>, host: &str, all: &[&Member<'_>]) -> Result<(), Failed> {
    let before = times(member);
    for _ in 0..ATTEMPTS {
        forge_reset(&site.lab, host, PORT)?;
        // The next one would strike the connection that is made after this one.
        for _ in 0..LOOKS {
            if times(member) > before {
                return Ok(());
            }
            thread::sleep(LOOK_EVERY);
        }
        for member in all {
            require(member.process.ended().is_none(), said(&member.process))?;
        }
    }
    Err(format!("no reset has come through: {}", said(&member.process)).into())
}

/// Under one download, on either side, and once more when nothing moves.
fn under_download(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let [first, second] = [group.start_primary(0, &[])?, group.join(1, 0, &[])?];
    site.answers(&first.process)?;
    let download = site.download(DOWNLOAD_BYTES)?.in_background();
    for (member, host) in [(&first, "a"), (&second, "b"), (&first, "a")] {
        download.wait_for_bytes(download.arrived_bytes() + MIB);
        reset(site, member, host, &[&first, &second])?;
    }
    let downloaded = download.finish()?;
    complete(&downloaded, DOWNLOAD_BYTES)?;
    println!("  longest stall {:.2} s", downloaded.longest_stall.as_secs_f64());
    reset(site, &second, "b", &[&first, &second])?;
    let status = first.wait_protected()?;
    equal("take-overs", status.takeovers, 0)?;
    require(status.last_attach.is_none(), "the state was sent")?;
    site.download_all(MIB)?;
    end_alike(site, &group, &first, &second)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("connection-reset".into(), Box::new(under_download))]
}
