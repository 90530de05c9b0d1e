//! A bit flips in the backup. Whatever differs afterwards is found before a client can see it.

use super::*;

const DOWNLOAD_BYTES: u64 = MIB;
/// Kernel text that is sure to be there: 16 MiB is where an x86-64 kernel lies unless told
/// otherwise.
const KERNEL_TEXT: u64 = 16 << 20;
const KERNEL_TEXT_BYTES: u64 = 4 * MIB;
const PAGE_BYTES: u64 = 4096;
/// The guest's server sends this with every answer; it is in the initramfs, which is not
/// compressed.
const IN_EVERY_ANSWER: &[u8] = b"application/octet-stream";

/// What must come of a flip.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wanted {
    /// It shows in a frame.
    OtherFrame,
    /// It shows somehow.
    Caught,
    /// If it changes anything, that shows.
    CaughtOrHarmless,
}
use Wanted::{Caught, CaughtOrHarmless, OtherFrame};

/// Where `text` of the initramfs lies in the guest's memory: it ends with the last page
/// (`vmm/machine/src/boot/load.rs`).
fn address_in_initramfs(site: &Site, text: &[u8]) -> Result<u64, Failed> {
    let initramfs = fs::read(&site.initramfs)?;
    let offset = initramfs.windows(text.len()).position(|window| window == text);
    let offset = offset.ok_or("the initramfs does not contain the text")? as u64;
    let end = u64::from(RunOptions::default().memory_mib) * MIB;
    Ok(((end - initramfs.len() as u64) & !(PAGE_BYTES - 1)) + offset)
}

/// A slice puts the backup into the primary's state and so mends it: none is to come here.
const NO_SLICES: [&str; 2] = ["--max-input-delay", "10000"];
/// What differs is to show in frames and registers alone.
const NO_MEMORY_CHECKS: [&str; 2] = ["--check-memory-every", "0"];

fn flipped(site: &Site, fault: &str, policy: &str) -> Result<Pair, Failed> {
    flipped_with(site, fault, policy, NO_MEMORY_CHECKS)
}

fn flipped_with(site: &Site, fault: &str, policy: &str, checks: [&str; 2]) -> Result<Pair, Failed> {
    let mut options = options(&[&["--on-divergence", policy], &NO_SLICES[..], &checks].concat());
    options.backup_arguments = vec!["--inject-fault".into(), fault.into()];
    println!("  --inject-fault {fault} --on-divergence {policy}");
    site.pair(&options)
}

/// Both hosts keep a report, and it tells what both saw.
fn incidents(site: &Site, pair: &Pair, wanted: Wanted) -> Result<(), Failed> {
    for reporter in ["primary", "backup"] {
        let name = format!("{}/ftvmm-incident-{reporter}-term-1.txt", pair.incidents);
        let path = site.lab.share().join(&name);
        let text = fs::read_to_string(&path).map_err(|error| format!("{name}: {error}"))?;
        let cause = text.lines().next().unwrap_or_default();
        println!("  {reporter}: {cause}");
        require(cause.starts_with("divergence in term 1: "), format!("no cause in\n{text}"))?;
        if wanted == OtherFrame {
            let digest = |line: &str| line.trim().strip_prefix("digest ").map(str::to_owned);
            let digests: Vec<String> = text.lines().filter_map(digest).collect();
            let differ = matches!(&digests[..], [a, b] if a != b);
            require(cause.contains("output") && differ, format!("not two digests in\n{text}"))?;
        }
    }
    Ok(())
}

/// The primary is believed, goes on alone, and its client gets every byte.
fn fails_over(site: &Site, fault: &str, wanted: Wanted) -> Result<(), Failed> {
    let pair = flipped(site, fault, "failover")?;
    site.answers(&pair.primary)?;
    site.download_all(DOWNLOAD_BYTES)?;
    pair.primary.signal(SIGTERM);
    if wanted == CaughtOrHarmless && pair.backup.wait()? == GOOD {
        println!("  harmless");
        return end_alike(site, &pair);
    }
    if wanted == CaughtOrHarmless && pair.backup.wait()? == LOST_WITNESS {
        println!("  the backup's guest ran in a circle and was given up");
        return ends_with("primary", &pair.primary, GOOD);
    }
    ends_with("primary", &pair.primary, GOOD)?;
    ends_with("backup", &pair.backup, DIVERGENCE)?;
    let report = site.report(&pair.primary_report)?;
    require(report.divergences > 0, "the primary reports no divergence")?;
    incidents(site, &pair, wanted)
}

/// A bit flips where nothing looks: only memory itself shows it.
fn memory_check_finds(site: &Site, fault: &str) -> Result<(), Failed> {
    let pair = flipped_with(site, fault, "halt", ["--check-memory-every", "1000"])?;
    pair.primary.wait()?;
    ends_with("primary", &pair.primary, DIVERGENCE)?;
    ends_with("backup", &pair.backup, DIVERGENCE)?;
    let said = String::from_utf8_lossy(&pair.backup.stderr()).into_owned();
    require(said.contains("1 pages of memory differ"), format!("no page is named in\n{said}"))
}

/// The state of the side that is believed replaces the other's; the client waits and gets every
/// byte, and the two end alike.
fn resyncs(site: &Site, fault: &str, believe: &str, checks: [&str; 2]) -> Result<(), Failed> {
    let policy = ["--on-divergence", "resync", "--believe", believe];
    let mut options = options(&[&policy, &NO_SLICES[..], &checks].concat());
    options.backup_arguments = vec!["--inject-fault".into(), fault.into()];
    println!("  --inject-fault {fault} {}", policy.join(" "));
    let pair = site.pair(&options)?;
    let speaks = if believe == "primary" { &pair.primary } else { &pair.backup };
    // What the guest prints while the other is given the state, the other does not print.
    site.answers(speaks)?;
    site.download_all(DOWNLOAD_BYTES)?;
    let given = "the guest's state is with the backup";
    require(said(speaks).contains(given), format!("no {given:?} in\n{}", said(speaks)))?;
    speaks.signal(SIGTERM);
    ends_with("primary", &pair.primary, GOOD)?;
    ends_with("backup", &pair.backup, GOOD)?;
    let [primary, backup] = [site.report(&pair.primary_report)?, site.report(&pair.backup_report)?];
    equal("divergences", (primary.divergences, backup.divergences), (1, 1))?;
    require(primary.state_digest.is_some(), "the primary's report has no digest")?;
    equal("backup's state digest", backup.state_digest, primary.state_digest)?;
    equal("take-overs", backup.takeovers, u64::from(believe == "backup"))?;
    incidents(site, &pair, Caught)
}

/// No side goes on.
fn halts(site: &Site, fault: &str, wanted: Wanted) -> Result<(), Failed> {
    let pair = flipped(site, fault, "halt")?;
    // A frame that shows the flip leaves only when it is asked for.
    let asking = match pair.primary.wait_for_stdout(READY)? {
        true => Some(site.asking()?.spawn()?),
        false => None,
    };
    let ended = [pair.primary.wait(), pair.backup.wait()];
    if let Some(mut client) = asking {
        client.kill()?;
        client.wait()?;
    }
    ended.into_iter().collect::<Result<Vec<_>, _>>()?;
    ends_with("primary", &pair.primary, DIVERGENCE)?;
    ends_with("backup", &pair.backup, DIVERGENCE)?;
    one_line("primary", &pair.primary, &["diverged"])?;
    incidents(site, &pair, wanted)
}

pub fn cases(seed: u64) -> Vec<(String, Case)> {
    let in_answer = |site: &Site| -> Result<String, Failed> {
        Ok(format!("mem:{:#x}:0@1", address_in_initramfs(site, IN_EVERY_ANSWER)?))
    };
    let mut cases: Vec<(String, Case)> = vec![
        (
            "flip_in_answer".into(),
            Box::new(move |site| fails_over(site, &in_answer(site)?, OtherFrame)),
        ),
        (
            "flip_in_answer_halt".into(),
            Box::new(move |site| halts(site, &in_answer(site)?, OtherFrame)),
        ),
    ];
    cases.push((
        "flip_in_answer_resync".into(),
        Box::new(move |site| resyncs(site, &in_answer(site)?, "primary", NO_MEMORY_CHECKS)),
    ));
    for believe in ["primary", "backup"] {
        let checks = ["--check-memory-every", "1000"];
        let name = format!("flip_in_unused_memory_resync_{believe}");
        let fault = "mem:0x7ffffff:3@1500";
        cases.push((name, Box::new(move |site| resyncs(site, fault, believe, checks))));
    }
    for (register, fault) in [("rip", "reg:rip:4@500"), ("rsp", "reg:rsp:40@1000")] {
        let name = format!("flip_in_{register}_halt");
        cases.push((name, Box::new(|site| halts(site, fault, Caught))));
    }
    cases
        .push(("flip_in_rsp".into(), Box::new(|site| fails_over(site, "reg:rsp:40@2000", Caught))));
    // The last byte of the initramfs lies behind its end mark.
    cases.push((
        "flip_in_unused_memory".into(),
        Box::new(|site| memory_check_finds(site, "mem:0x7ffffff:3@1500")),
    ));
    let mut rng = Rng::with_seed(seed);
    let text = KERNEL_TEXT + rng.u64(..KERNEL_TEXT_BYTES);
    for (what, place) in [
        ("rax", format!("reg:rax:{}", rng.u32(..64))),
        // At four exits of eleven in a row what it held was written over before it was used.
        ("rbp", "reg:rbp:62".into()),
        ("kernel_text", format!("mem:{text:#x}:{}", rng.u32(..8))),
    ] {
        let fault = format!("{place}@{}", rng.u64(1..4_000));
        let name = format!("flip_in_{what}_at_random");
        cases.push((name, Box::new(move |site| fails_over(site, &fault, CaughtOrHarmless))));
    }
    cases
}
