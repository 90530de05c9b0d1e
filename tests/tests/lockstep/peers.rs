//! Who may be a peer, and what happens when the two lose each other.

use ftvmm_replication::Term;
use ftvmm_replication::witness::{Doing, Entry, GuestId, Holder, moment};
use ftvmm_tests::pair::{PORT, PairNames};
use nix::libc::SIGKILL;

use super::*;

/// Pause between two looks whether a host has ended.
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_millis(5);

/// Starts `sh` on the primary's host with something that holds the port, and waits until it does.
fn occupy(site: &Site, server: &str) -> Result<LabProcess, Failed> {
    let script = format!(
        "{server} & while ! busybox netstat -ltn | grep -q :{PORT}; do sleep 0.1; done; \
         echo listening; wait"
    );
    let process = site.lab.host(0).spawn(&["sh", "-c", &script])?;
    wait_for(&process, "listening")?;
    Ok(process)
}

/// The backup is given something else than the primary; both must name it and stop.
fn differs(
    site: &Site,
    fact: &str,
    backup_files: &GuestFiles,
    change: impl FnOnce(&mut RunOptions),
) -> Result<(), Failed> {
    let names = PairNames::new(&site.lab)?;
    let same = options(&[]);
    let mut other = options(&[]);
    change(&mut other);
    let primary = names.start_primary(&site.lab, &site.files, &same)?;
    let backup = names.start_backup(&site.lab, backup_files, &other)?;
    for (who, process) in [("primary", &primary), ("backup", &backup)] {
        ends_with(who, process, BAD_USAGE)?;
        one_line(who, process, &[fact, "differs", "ours is", "theirs is"])?;
    }
    Ok(())
}

fn other_kernel(site: &Site) -> Result<(), Failed> {
    let other = GuestFiles { kernel: site.cloud.kernel.clone(), ..site.files.clone() };
    differs(site, "kernel", &other, |_| ())
}

fn other_initramfs(site: &Site) -> Result<(), Failed> {
    let mut bytes = fs::read(&site.initramfs)?;
    bytes.push(0);
    fs::write(site.lab.share().join("other.cpio"), bytes)?;
    let initramfs = site.lab.host(1).share().join("other.cpio");
    differs(site, "initramfs", &GuestFiles { initramfs, ..site.files.clone() }, |_| ())
}

fn other_cmdline(site: &Site) -> Result<(), Failed> {
    differs(site, "command line", &site.files, |options| options.cmdline = "single".into())
}

fn other_memory(site: &Site) -> Result<(), Failed> {
    differs(site, "memory size", &site.files, |options| options.memory_mib += 32)
}

fn other_mac(site: &Site) -> Result<(), Failed> {
    let mac = Some("52:54:00:00:00:99".into());
    differs(site, "network card", &site.files, |options| options.mac = mac)
}

fn other_template(site: &Site) -> Result<(), Failed> {
    differs(site, "CPU template", &site.files, |options| {
        options.arguments.extend(["--cpu-template", "sse4"].map(str::to_owned));
    })
}

/// Each host has a witness of its own, of which the backup's knows a guest.
fn other_witness(site: &Site) -> Result<(), Failed> {
    let names = PairNames::new(&site.lab)?;
    let other = PairNames { witness: format!("{}-other", names.witness), ..names.clone() };
    win_by_hand(site, &other.witness, 7)?;
    let primary = names.start_primary(&site.lab, &site.files, &options(&[]))?;
    let backup = other.start_backup(&site.lab, &site.files, &options(&[]))?;
    for (who, process) in [("primary", &primary), ("backup", &backup)] {
        ends_with(who, process, BAD_USAGE)?;
        let places = [names.witness.as_str(), other.witness.as_str()];
        one_line(who, process, &["do not see the same witness", places[0], places[1]])?;
    }
    let own = site.lab.share().join(format!("{}.1", names.witness));
    require(!own.exists(), "the primary has claimed a term")
}

fn port_in_use(site: &Site) -> Result<(), Failed> {
    let _other = occupy(site, &format!("busybox nc -l -p {PORT}"))?;
    let names = PairNames::new(&site.lab)?;
    let primary = names.start_primary(&site.lab, &site.files, &options(&[]))?;
    ends_with("primary", &primary, BAD_USAGE)?;
    one_line("primary", &primary, &["10.77.0.1:7700", "in use", "--listen"])
}

fn connected_to_another_service(site: &Site) -> Result<(), Failed> {
    let _other = occupy(site, &format!("echo SSH-2.0-other | busybox nc -l -p {PORT}"))?;
    let names = PairNames::new(&site.lab)?;
    let backup = names.start_backup(&site.lab, &site.files, &options(&[]))?;
    ends_with("backup", &backup, BAD_USAGE)?;
    one_line("backup", &backup, &["is an ftvmm primary listening there?"])
}

/// Something that takes connections and never says a word.
fn connected_to_a_silent_service(site: &Site) -> Result<(), Failed> {
    let _other = occupy(site, &format!("sleep 1000 | busybox nc -l -p {PORT}"))?;
    let names = PairNames::new(&site.lab)?;
    let backup = names.start_backup(&site.lab, &site.files, &options(&[]))?;
    ends_with("backup", &backup, BAD_USAGE)?;
    one_line("backup", &backup, &["10.77.0.1:7700", "is an ftvmm primary listening there?"])
}

/// A primary is not disturbed by somebody who has the wrong number.
fn reached_by_another_client(site: &Site) -> Result<(), Failed> {
    let names = PairNames::new(&site.lab)?;
    let mut loud = options(&[]);
    loud.cmdline = "loglevel=7".into();
    let primary = names.start_primary(&site.lab, &site.files, &loud)?;
    let connect = format!(
        "until printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 5 10.77.0.1 {PORT} >/dev/null \
         2>&1; \
         do sleep 0.1; done"
    );
    site.lab.host(1).run(&["sh", "-c", &connect])?;
    // What it said may still be on its way here.
    let seen = primary.wait_for_stderr("GET / HT")?;
    require(seen, format!("the primary saw no other client:\n{}", said(&primary)))?;
    let backup = names.start_backup(&site.lab, &site.files, &loud)?;
    wait_for(&primary, FIRST_LINE)?;
    primary.signal(SIGTERM);
    ends_with("primary", &primary, GOOD)?;
    ends_with("backup", &backup, GOOD)
}

/// Writes an entry as the newest: its file's number is above any that a test gets to.
fn win_by_hand(site: &Site, witness: &str, term: u64) -> Result<(), Failed> {
    let entry = Entry {
        term: Term(term),
        guest: GuestId::from_random([1; 16]),
        holder: Holder::new("somebody-else", GuestId::from_random([2; 16])),
        doing: Doing::Live,
        ran: Some(Term(term)),
        seen: moment(0),
    };
    Ok(fs::write(site.lab.share().join(format!("{witness}.{}", 1000 + term)), entry.to_line())?)
}

/// The next term is taken: neither side may speak when they lose each other.
fn lost_witness(site: &Site) -> Result<(), Failed> {
    let mut options = options(&[]);
    options.cmdline = "loglevel=7".into();
    let pair = site.pair(&options)?;
    wait_for(&pair.primary, FIRST_LINE)?;
    win_by_hand(site, &pair.witness, 2)?;
    site.lab.host(1).set_link(false)?;
    for (who, process) in [("primary", &pair.primary), ("backup", &pair.backup)] {
        ends_with(who, process, LOST_WITNESS)?;
        one_line(who, process, &["another host won term 2"])?;
    }
    Ok(())
}

/// A second start with the witness of a pair that runs, and of one whose hosts have both died.
fn start_beside_a_live_guest(site: &Site) -> Result<(), Failed> {
    let names = PairNames::new(&site.lab)?;
    let mut options_of_pair = options(&[]);
    options_of_pair.cmdline = "loglevel=7".into();
    let primary = names.start_primary(&site.lab, &site.files, &options_of_pair)?;
    let backup = names.start_backup(&site.lab, &site.files, &options_of_pair)?;
    wait_for(&primary, FIRST_LINE)?;
    let refused = |who: &str| {
        let again = names.start_primary(&site.lab, &site.files, &options(&["--start-alone"]))?;
        ends_with(who, &again, BAD_USAGE)?;
        one_line(who, &again, &["live", "last sign of life", "--force-new-guest"])
    };
    refused("a start beside the pair")?;
    require(primary.ended().is_none() && backup.ended().is_none(), "the pair is gone")?;
    primary.signal(SIGKILL);
    backup.signal(SIGKILL);
    let _ = (primary.wait()?, backup.wait()?);
    refused("a start after both have died")
}

/// A witness that holds something else, and one whose folder is not there.
fn unusable_witness(site: &Site) -> Result<(), Failed> {
    let names = PairNames::new(&site.lab)?;
    fs::write(site.lab.share().join(format!("{}.5", names.witness)), "hi")?;
    let primary = names.start_primary(&site.lab, &site.files, &options(&[]))?;
    ends_with("rubbish", &primary, BAD_USAGE)?;
    one_line("rubbish", &primary, &["hi", "which is no entry"])?;
    let missing = PairNames { witness: "no-folder/w".into(), ..names };
    let primary = missing.start_primary(&site.lab, &site.files, &options(&[]))?;
    ends_with("missing", &primary, BAD_USAGE)?;
    one_line("missing", &primary, &["No such file", "make the folder, or mount it"])
}

/// Both live, each thinks the other dead: exactly one goes on, and the client keeps its download.
fn split_brain(site: &Site, mut rng: Rng) -> Result<(), Failed> {
    const DOWNLOAD_BYTES: u64 = 4 * MIB;
    let release = rng.choice(["compare", "ack"]).unwrap_or("compare");
    let pair = site.ready_pair(&options(&["--release", release]))?;
    let mut download = site.download(DOWNLOAD_BYTES)?;
    let before = download.read_through(rng.u64(..DOWNLOAD_BYTES / 2), |_| ())?;
    site.lab.host(rng.usize(..2)).set_link(false)?;
    let downloaded = download.finish(|_| ())?;
    // The loser ends by itself, when the witness has answered it too.
    while pair.primary.ended().is_none() && pair.backup.ended().is_none() {
        std::thread::sleep(LOOK_EVERY);
    }
    pair.primary.signal(SIGTERM);
    pair.backup.signal(SIGTERM);
    let ends = [pair.primary.wait()?, pair.backup.wait()?];
    println!("  {release}, cut after {before} bytes: primary and backup ended with {ends:?}");
    complete(&downloaded, DOWNLOAD_BYTES)?;
    let winner = match ends {
        [GOOD, LOST_WITNESS] => &pair.primary_report,
        [LOST_WITNESS, GOOD] => &pair.backup_report,
        _ => return Err(format!("not one winner\n{}", site.lab.tails()).into()),
    };
    equal("divergences", site.report(winner)?.divergences, 0)
}

pub fn cases(seed: u64) -> Vec<(String, Case)> {
    type Plain = fn(&Site) -> Result<(), Failed>;
    let plain: [(&str, Plain); 14] = [
        ("other_kernel", other_kernel),
        ("other_initramfs", other_initramfs),
        ("other_cmdline", other_cmdline),
        ("other_memory", other_memory),
        ("other_mac", other_mac),
        ("other_template", other_template),
        ("other_witness", other_witness),
        ("port_in_use", port_in_use),
        ("connected_to_another_service", connected_to_another_service),
        ("connected_to_a_silent_service", connected_to_a_silent_service),
        ("reached_by_another_client", reached_by_another_client),
        ("lost_witness", lost_witness),
        ("start_beside_a_live_guest", start_beside_a_live_guest),
        ("unusable_witness", unusable_witness),
    ];
    let plain = plain.into_iter().map(|(name, case)| (name.into(), Box::new(case) as Case));
    let split = (0..3).map(|number| {
        let rng = Rng::with_seed(seed.wrapping_add(number));
        (format!("split_brain-{number}"), Box::new(move |s: &Site| split_brain(s, rng)) as Case)
    });
    plain.chain(split).collect()
}
