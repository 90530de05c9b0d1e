//! Attach, kill, attach, kill: the guest goes from host to host and never notices.

use super::*;

/// Cycles unless `FTVMM_ATTACH_CYCLES` says otherwise.
const CYCLES: u64 = 4;
/// In one cycle of so many the whole host dies, not the process alone.
const HOST_DIES_EVERY: u64 = 4;
/// In one cycle of so many the backup dies, not the primary.
const BACKUP_DIES_EVERY: u64 = 5;
const DOWNLOAD_BYTES: u64 = 512 * KIB;

/// What the guest does all the while: the same forever, and wrong when a page or a register is.
const WORK: &str = "while :; do selfcheck 1 || echo SELFCHECK BROKEN; done";

fn cycles(site: &Site, cycles: u64, mut rng: Rng) -> Result<(), Failed> {
    let group = group(site, running(WORK))?;
    let mut primary = alone(site, &group)?;
    let mut takeovers = 0;
    for cycle in 0..cycles {
        site.mend()?;
        println!("  cycle {cycle}: the guest is on host {}", site.lab.host(primary.host).letter());
        let backup = attached(&group, 1 - primary.host, &primary)?;
        let mut download = site.download(DOWNLOAD_BYTES)?;
        download.read_through(rng.u64(1..DOWNLOAD_BYTES), |_| ())?;
        let backup_dies = rng.u64(..BACKUP_DIES_EVERY) == 0;
        let (victim, survivor) = if backup_dies { (backup, primary) } else { (primary, backup) };
        match rng.u64(..HOST_DIES_EVERY) {
            0 => site.lab.host(victim.host).kill(),
            _ => victim.process.kill(),
        }
        let status = survivor.wait_alone()?;
        equal("divergences", status.divergences, 0)?;
        takeovers += u64::from(!backup_dies);
        complete(&download.finish(|_| ())?, DOWNLOAD_BYTES)?;
        no_divergence(site, &group)?;
        let console = String::from_utf8_lossy(&survivor.process.stdout()).into_owned();
        require(
            !console.contains("SELFCHECK BROKEN"),
            format!("the guest is damaged:\n{console}"),
        )?;
        primary = survivor;
    }
    println!("  {cycles} cycles, {takeovers} take-overs");
    primary.process.signal(SIGTERM);
    ends_with("the last one", &primary.process, GOOD)
}

pub fn cases(seed: u64) -> Vec<(String, Case)> {
    let count = setting("FTVMM_ATTACH_CYCLES").unwrap_or(CYCLES);
    let again = move |why: Failed| {
        let why = why.message().unwrap_or_default().to_owned();
        Failed::from(format!("FTVMM_SEED={seed} FTVMM_ATTACH_CYCLES={count} bring it again\n{why}"))
    };
    let case: Case = Box::new(move |site| cycles(site, count, Rng::with_seed(seed)).map_err(again));
    vec![("attach-kill-attach".into(), case)]
}
