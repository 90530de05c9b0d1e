//! What hangs does not take the guest along, and never the operator's means to end it.

use super::*;

/// Longer than the failure timeout and twice that again, in which the backup may take over.
const HELD_MS: u64 = 12_000;
/// In the middle of the download.
const HELD_AT_EXIT: u64 = 15_000;
const DOWNLOAD_BYTES: u64 = 96 * MIB;
const LOST_WITNESS: Ended = Ended::Status(4);

/// Nobody reads what the guest prints nor what the hosts say: the guest boots, serves its clients,
/// and is stopped as ever.
fn nobody_reads(site: &Site) -> Result<(), Failed> {
    site.lab.install(Path::new(env!("CARGO_BIN_EXE_unread")))?;
    let mut options = options(&[]);
    options.cmdline = "loglevel=7".to_owned();
    options.under = vec![site.lab.host(0).share().join("bin/unread").display().to_string()];
    let group = group(site, options)?;
    let primary = group.start_primary(0, &[])?;
    let backup = group.join(1, 0, &[])?;
    primary.wait_protected()?;
    require(site.asking()?.status()?.success(), "the guest does not answer")?;
    site.download_all(MIB)?;
    equal("protected", primary.status()?.ok_or("no status")?.protected, true)?;
    primary.process.signal(SIGTERM);
    ends_with("primary", &primary.process, GOOD)?;
    ends_with("backup", &backup.process, GOOD)?;
    for member in [&primary, &backup] {
        let dropped = site.report(&member.report)?.console_dropped_bytes;
        println!("  {dropped} bytes of console were for nobody");
        require(dropped > 0, "the report does not say what was dropped")?;
    }
    no_divergence(site, &group)
}

/// The thread that runs the primary's guest is held in the middle of a download while its host goes
/// on: the backup takes over, the client gets every byte, and the old primary stops when the thread
/// is let go of, having said nothing more.
fn processor_held(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let hang = format!("hang:{HELD_MS}@{HELD_AT_EXIT}");
    let primary = group.start_primary(0, &["--inject-fault", &hang])?;
    let backup = group.join(1, 0, &[])?;
    site.answers(&primary.process)?;
    let downloaded = site.download(DOWNLOAD_BYTES)?.finish(|_| ())?;
    let status = backup.status()?.ok_or_else(|| said(&backup.process))?;
    equal("the backup's take-overs", status.takeovers, 1)?;
    complete(&downloaded, DOWNLOAD_BYTES)?;
    println!("  longest stall {:.2} s", downloaded.longest_stall.as_secs_f64());
    ends_with("the primary", &primary.process, LOST_WITNESS)?;
    let told = said(&primary.process);
    for wanted in [
        "this host holds the guest's processor",
        "when the host hangs up, the backup takes over",
        "the backup took over and sends every gated frame",
    ] {
        require(told.contains(wanted), format!("no {wanted:?} in\n{told}"))?;
    }
    site.download_all(MIB)?;
    backup.process.signal(SIGTERM);
    ends_with("the backup", &backup.process, GOOD)?;
    no_divergence(site, &group)
}

/// Nothing but the end of the process is left when the guest's thread is held for good: the second
/// SIGTERM does that.
fn stopped_at_once(site: &Site) -> Result<(), Failed> {
    let group = group(site, RunOptions::default())?;
    let solo = group.launch(0, &["--role", "solo", "--inject-fault", "hang:600000@1000"])?;
    solo.process.wait_for_stderr("injecting a fault")?;
    solo.wait_until("waiting for a status", |_| true)?;
    solo.process.signal(SIGTERM);
    solo.process.wait_for_stderr("the run is told to end")?;
    solo.process.signal(SIGTERM);
    ends_with("the guest", &solo.process, FAILED)?;
    let told = said(&solo.process);
    require(told.contains("ftvmm: ended at once: SIGTERM came once more"), told)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![
        ("hang-nobody-reads".into(), Box::new(nobody_reads)),
        ("hang-processor-held".into(), Box::new(processor_held)),
        ("hang-stopped-at-once".into(), Box::new(stopped_at_once)),
    ]
}
