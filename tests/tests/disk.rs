//! A guest with a disk: a real file system and a real database on it, alone, recorded, and on two
//! hosts of which one dies or has a disk that fails.
//!
//! The database is the guest's `ledger` (`guest-images/programs/src/ledger.rs`): every byte in it
//! follows from the number of the last committed transaction, which the guest prints. After a kill
//! both hosts' files are looked at from outside: the file system is recovered, and the database
//! must hold at least what was printed. `FTVMM_KILLS` sets how many hosts are killed, each in the
//! middle of transactions; the survivor's file is the next pair's.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use fastrand::Rng;
use ftvmm_guest_images::Guest;
use ftvmm_tests::group::Group;
use ftvmm_tests::guest_run::{GuestLab, cmdline};
use ftvmm_tests::lab::{Ended, Lab, LabProcess};
use ftvmm_tests::pair::{GuestFiles, Pair, PairNames, RunOptions};
use ftvmm_tests::replayed::Replayed;
use ftvmm_tests::site::{
    Case, Stage, ends_with, equal, require, run_cases, running, setting, wait_for,
};
use ftvmm_tests::{Program, built};
use libtest_mimic::Failed;
use nix::libc::SIGTERM;
use serde_json::Value;

#[path = "disk/restored.rs"]
mod restored;
#[path = "disk/states.rs"]
mod states;

const KILLS: u64 = 2;
/// Room for a journal and some megabytes of files.
const DISK_BYTES: u64 = 16 << 20;
const GOOD: Ended = Ended::Status(0);
const FAILED: Ended = Ended::Status(1);
const BAD_USAGE: Ended = Ended::Status(2);
const MOUNT: &str = "mount -t ext4 /dev/vda /mnt";
const LEDGER: &str = "mount -t ext4 /dev/vda /mnt && ledger /mnt/ledger.db";
/// Writes one page at 12 MiB of the raw disk and says how that went.
const FAR_WRITE: &str =
    "dd if=/dev/urandom of=/dev/vda bs=4k count=1 seek=3072 conv=fsync; echo WROTE $?; poweroff -f";
/// What follows runs where no file can be written beyond 8 MiB, in units of 512 bytes.
const SMALL_FILES: &str = "trap '' XFSZ; ulimit -f 16384; exec \"$@\"";

struct Site {
    lab: GuestLab,
    files: GuestFiles,
}

impl Stage for Site {
    fn start(folder: &Path) -> Result<Self, Failed> {
        let lab = GuestLab::start(folder, 2)?;
        let seen = |path: &Path| lab.inside(path.file_name().unwrap_or_default()).into();
        let files =
            GuestFiles { kernel: seen(&lab.guest.kernel), initramfs: seen(&lab.guest.initramfs) };
        Ok(Self { lab, files })
    }

    fn lab(&self) -> &Lab {
        &self.lab.lab
    }
}

impl Site {
    /// An empty file system in a file of the shared folder.
    fn make_disk(&self, name: &str) -> Result<(), Failed> {
        let path = self.lab.outside(name);
        let _ = fs::remove_file(&path);
        let _ = fs::remove_file(self.lab.outside(format!("{name}.ftvmm")));
        fs::File::create(&path)?.set_len(DISK_BYTES)?;
        tool(Program::MkfsExt4, &["-q", "-F"], &path).map(drop)
    }

    /// One disk for each host, equal.
    fn make_disks(&self) -> Result<(), Failed> {
        self.make_disk("disk-0.img")?;
        self.copy_disk(0, 1)
    }

    /// Copies a host's disk over the other's, with all that is known of it.
    fn copy_disk(&self, from: usize, to: usize) -> Result<(), Failed> {
        let place = |host, suffix| self.lab.outside(format!("disk-{host}.img{suffix}"));
        fs::copy(place(from, ""), place(to, ""))?;
        let _ = fs::remove_file(place(to, ".ftvmm"));
        if place(from, ".ftvmm").exists() {
            fs::copy(place(from, ".ftvmm"), place(to, ".ftvmm"))?;
        }
        Ok(())
    }

    /// A pair, each host with its own disk, running `script`.
    fn pair(&self, script: &str, more: &[&str]) -> Result<Pair, Failed> {
        self.pair_of(PairNames::new(&self.lab.lab)?, script, more)
    }

    /// As [`Self::pair`], with these names.
    fn pair_of(&self, names: PairNames, script: &str, more: &[&str]) -> Result<Pair, Failed> {
        let options = |host: usize| self.options(script, more, &format!("disk-{host}.img"));
        let primary = names.start_primary(&self.lab.lab, &self.files, &options(0))?;
        let backup = names.start_backup(&self.lab.lab, &self.files, &options(1))?;
        let PairNames { witness, incidents, primary_report, backup_report, .. } = names;
        Ok(Pair { primary, backup, primary_report, backup_report, witness, incidents })
    }

    fn options(&self, script: &str, more: &[&str], disk: &str) -> RunOptions {
        let mut options = running(script);
        let disk = format!("path={}", self.lab.inside(disk));
        options
            .arguments
            .extend([more, &["--disk", &disk]].concat().into_iter().map(str::to_owned));
        options
    }

    /// A number of the report of this name, by its path.
    fn reported(&self, report: &str, path: &str) -> Result<Value, Failed> {
        let text = fs::read_to_string(self.lab.outside(report))?;
        let report: Value = serde_json::from_str(&text)?;
        Ok(report.pointer(path).cloned().unwrap_or_default())
    }

    /// Starts a guest alone on the first host.
    fn solo(&self, name: &str, script: &str, more: &[&str]) -> Result<LabProcess, Failed> {
        let disk = format!("path={}", self.lab.inside("disk-0.img"));
        let script = cmdline(script);
        let report = self.lab.inside(format!("{name}.json"));
        let fixed = ["--cmdline", &script, "--disk", &disk, "--report", &report];
        let command = self.lab.boot(&[&fixed[..], more].concat());
        Ok(self.lab.lab.host(0).spawn(&command)?)
    }

    /// Recovers a copy of a disk as a mount would; returns the last transaction of the ledger on
    /// it, whose every row was compared.
    fn ledger_on(&self, disk: &str) -> Result<u64, Failed> {
        let copy = self.lab.outside("checked.img");
        fs::copy(self.lab.outside(disk), &copy)?;
        // Status 1: the journal was replayed.
        tool(Program::E2fsck, &["-p"], &copy)?;
        tool(Program::E2fsck, &["-f", "-n"], &copy)?;
        let database = self.lab.outside("checked.db");
        for (from, to) in [("ledger.db", ""), ("ledger.db-journal", "-journal")] {
            let to = format!("{}{to}", database.display());
            let _ = fs::remove_file(&to);
            let request = format!("dump /{from} {to}");
            tool(Program::Debugfs, &["-R", &request], &copy)?;
            // debugfs leaves an empty file where there is none.
            if fs::metadata(&to).is_ok_and(|facts| facts.len() == 0) {
                fs::remove_file(&to)?;
            }
        }
        let checked = built(&self.guest().programs)
            .args(["ledger", &database.display().to_string(), "--check"])
            .output()?;
        let said = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
        last_number(&said, "LEDGER found ").ok_or_else(|| format!("{disk}: {said}").into())
    }

    fn guest(&self) -> &Guest {
        &self.lab.guest
    }
}

/// Runs a tool of e2fsprogs on an image.
fn tool(program: Program, words: &[&str], image: &Path) -> Result<String, Failed> {
    let output = program.command()?.args(words).arg(image).output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    match output.status.code() {
        Some(0 | 1) => Ok(said),
        status => Err(format!("{} {}: {status:?}\n{said}", program.file(), image.display()).into()),
    }
}

/// The number behind the last `word` of a complete line.
fn last_number(said: &str, word: &str) -> Option<u64> {
    let complete = &said[..said.rfind('\n')?];
    let digits = complete.rsplit_once(word)?.1.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

fn committed(process: &LabProcess) -> u64 {
    let console = String::from_utf8_lossy(&process.stdout()).into_owned();
    last_number(&console, "LEDGER committed ").unwrap_or_default()
}

/// The process says this in its last line for the user.
fn says(process: &LabProcess, words: &[&str]) -> Result<(), Failed> {
    let said = String::from_utf8_lossy(&process.stderr()).into_owned();
    let line = said.lines().rfind(|line| line.starts_with("ftvmm: ")).unwrap_or_default();
    println!("  {line}");
    require(words.iter().all(|word| line.contains(word)), format!("not {words:?}: {said}"))
}

/// Files are written, read back after a mount of their own, and freed; freed space reads as zeroes
/// from outside.
fn files_on_a_disk(site: &Site) -> Result<(), Failed> {
    site.make_disk("disk-0.img")?;
    let script = format!(
        "{MOUNT} && yes SECRET | head -c 4000000 > /mnt/gone; cp /bin/busybox /mnt/kept; sync; \
         fallocate -l 32768 /mnt/zeroed; dd if=/bin/busybox of=/mnt/zeroed bs=4k seek=3 count=1 \
         conv=notrunc; \
         rm /mnt/gone; sync; fstrim /mnt; umount /mnt; {MOUNT}; cmp /bin/busybox /mnt/kept && echo \
         SAME; \
         umount /mnt; poweroff -f"
    );
    let run = site.solo("files", &script, &[])?;
    wait_for(&run, "SAME")?;
    ends_with("guest", &run, GOOD)?;
    let mut counted = Vec::new();
    for counter in ["reads", "writes", "flushes", "discards", "write_zeroes"] {
        let count = site.reported("files.json", &format!("/disk/{counter}"))?;
        require(count.as_u64() > Some(0), format!("{counter}: {count}"))?;
        counted.push(format!("{count} {counter}"));
    }
    println!("  {}", counted.join(", "));
    equal("failed", site.reported("files.json", "/disk/failed")?, 0.into())?;
    equal("guest faults", site.reported("files.json", "/guest_faults")?, 0.into())?;
    let image = site.lab.outside("disk-0.img");
    tool(Program::E2fsck, &["-f", "-n"], &image)?;
    let content = fs::read(&image)?;
    require(!content.windows(6).any(|window| window == b"SECRET"), "not discarded")
}

/// The recording has what the disk said, so its replay needs no disk and touches none.
fn a_replay_needs_no_disk(site: &Site) -> Result<(), Failed> {
    site.make_disk("disk-0.img")?;
    let (script, log) =
        (format!("compute 60 & {LEDGER} --count 15; poweroff -f"), site.lab.inside("ledger.log"));
    let disk = format!("path={}", site.lab.inside("disk-0.img"));
    let script = cmdline(&script);
    let command =
        site.lab.boot(&["--cmdline", &script, "--disk", &disk, "--record", &log, "--mem", "128"]);
    let recorded = site.lab.run("ledger", command)?.finish()?;
    let slices = recorded.report.as_ref().map_or(0, |report| report.slices);
    println!("  {slices} slices");
    require(slices > 0, "the guest did not compute")?;
    let console = String::from_utf8_lossy(&recorded.console).into_owned();
    require(console.contains("LEDGER done"), console.clone())?;
    equal("transactions", site.ledger_on("disk-0.img")?, 15)?;
    fs::remove_file(site.lab.outside("disk-0.img"))?;
    let both = Replayed::after(&site.lab, "ledger", recorded)?;
    let stat = site.lab.lab.host(0).run(&["ftvmm", "log", "stat", &log])?;
    let stat = String::from_utf8_lossy(&stat.stdout).into_owned();
    println!("  {}", stat.lines().find(|line| line.contains("disk")).unwrap_or_default());
    both.difference().map_or(Ok(()), |difference| Err(difference.into()))
}

/// A second guest on the same file is refused, whatever name it gives it, and the first goes on.
fn a_file_serves_one_guest(site: &Site) -> Result<(), Failed> {
    site.make_disk("disk-0.img")?;
    for link in ["hard.img", "soft.img"] {
        let _ = fs::remove_file(site.lab.outside(link));
    }
    fs::hard_link(site.lab.outside("disk-0.img"), site.lab.outside("hard.img"))?;
    std::os::unix::fs::symlink("disk-0.img", site.lab.outside("soft.img"))?;
    let first = site.solo("first", LEDGER, &[])?;
    wait_for(&first, "LEDGER committed 2\r\n")?;
    for name in ["disk-0.img", "hard.img", "soft.img"] {
        let disk = format!("path={}", site.lab.inside(name));
        let command = site.lab.boot(&["--disk", &disk]);
        let second = site.lab.lab.host(0).spawn(&command)?;
        ends_with("second", &second, BAD_USAGE)?;
        says(&second, &[&format!("{name}' is in use by another ftvmm")])?;
    }
    let last = committed(&first) + 2;
    wait_for(&first, &format!("LEDGER committed {last}\r\n"))?;
    first.signal(SIGTERM);
    ends_with("first", &first, GOOD)?;
    require(site.ledger_on("disk-0.img")? >= last, "a committed transaction is lost")
}

/// The guest ends by itself: both hosts in the same state, both disks equal.
fn both_disks_are_equal(site: &Site) -> Result<(), Failed> {
    site.make_disks()?;
    let pair = site.pair(&format!("{LEDGER} --count 15; umount /mnt; poweroff -f"), &[])?;
    ends_with("primary", &pair.primary, GOOD)?;
    ends_with("backup", &pair.backup, GOOD)?;
    let digest = |report: &str| site.reported(report, "/state_digest");
    require(digest(&pair.primary_report)?.is_string(), "no digest")?;
    equal("digest", digest(&pair.backup_report)?, digest(&pair.primary_report)?)?;
    println!("  {} flushes", site.reported(&pair.primary_report, "/disk/flushes")?);
    let [first, second] = ["disk-0.img", "disk-1.img"].map(|name| fs::read(site.lab.outside(name)));
    require(first? == second?, "the disks differ")?;
    equal("transactions", site.ledger_on("disk-1.img")?, 15)
}

fn different_disks_are_refused(site: &Site) -> Result<(), Failed> {
    site.make_disk("disk-0.img")?;
    site.make_disk("disk-1.img")?;
    let pair = site.pair("", &[])?;
    for process in [&pair.primary, &pair.backup] {
        ends_with("host", process, BAD_USAGE)?;
        says(process, &["the two hosts do not fit: disk differs: ours is sha256 "])?;
    }
    fs::File::options().write(true).open(site.lab.outside("disk-1.img"))?.set_len(1 << 20)?;
    let pair = site.pair("", &[])?;
    for process in [&pair.primary, &pair.backup] {
        ends_with("host", process, BAD_USAGE)?;
        says(process, &["disk size differs: ours is ", "1048576 bytes"])?;
    }
    Ok(())
}

/// A pair in which the disk of one host cannot be written where the guest writes.
fn with_a_bad_disk(site: &Site, bad: usize, more: &[&str]) -> Result<Pair, Failed> {
    site.make_disks()?;
    let names = PairNames::new(&site.lab.lab)?;
    let options = |host: usize| {
        let options = site.options(FAR_WRITE, more, &format!("disk-{host}.img"));
        let shell = ["sh", "-c", SMALL_FILES, "sh"].map(str::to_owned).to_vec();
        RunOptions { under: if host == bad { shell } else { vec![] }, ..options }
    };
    let primary = names.start_primary(&site.lab.lab, &site.files, &options(0))?;
    let backup = names.start_backup(&site.lab.lab, &site.files, &options(1))?;
    let PairNames { witness, incidents, primary_report, backup_report, .. } = names;
    Ok(Pair { primary, backup, primary_report, backup_report, witness, incidents })
}

fn an_error_is_the_guests_on_both_hosts(site: &Site) -> Result<(), Failed> {
    let pair = with_a_bad_disk(site, 0, &[])?;
    for process in [&pair.primary, &pair.backup] {
        wait_for(process, "WROTE 1")?;
        ends_with("host", process, GOOD)?;
    }
    let digest = |report: &str| site.reported(report, "/state_digest");
    equal("digest", digest(&pair.backup_report)?, digest(&pair.primary_report)?)
}

fn a_primary_with_a_bad_disk_leaves(site: &Site) -> Result<(), Failed> {
    let pair = with_a_bad_disk(site, 0, &["--disk-error", "failover"])?;
    ends_with("primary", &pair.primary, FAILED)?;
    says(&pair.primary, &["the disk of this host failed: request "])?;
    wait_for(&pair.backup, "WROTE 0")?;
    ends_with("backup", &pair.backup, GOOD)?;
    equal("take-overs", site.reported(&pair.backup_report, "/takeovers")?, 1.into())
}

fn a_backup_with_a_bad_disk_leaves(site: &Site) -> Result<(), Failed> {
    let pair = with_a_bad_disk(site, 1, &[])?;
    ends_with("backup", &pair.backup, FAILED)?;
    says(&pair.backup, &["the disk of this host failed: request "])?;
    wait_for(&pair.primary, "WROTE 0")?;
    ends_with("primary", &pair.primary, GOOD)?;
    equal("divergences", site.reported(&pair.primary_report, "/divergences")?, 0.into())
}

/// Hosts are killed in the middle of transactions, one pair after the other on the same disk.
fn kills(site: &Site, seed: u64, kills: u64) -> Result<(), Failed> {
    site.make_disks()?;
    let mut found = 0;
    // One guest, so one witness: another one's disks are refused.
    let witness = PairNames::new(&site.lab.lab)?.witness;
    for kill in 0..kills {
        let mut rng = Rng::with_seed(seed.wrapping_add(kill));
        let victim = usize::from(kill % 4 == 3);
        let at = found + rng.u64(2..20);
        let names = PairNames { witness: witness.clone(), ..PairNames::new(&site.lab.lab)? };
        let pair = site.pair_of(names, LEDGER, &[])?;
        wait_for(&pair.primary, &format!("LEDGER found {found}, integrity ok"))?;
        wait_for(&pair.primary, &format!("LEDGER committed {at}\r\n"))?;
        // Not always right after a line was printed.
        std::thread::sleep(std::time::Duration::from_micros(rng.u64(..60_000)));
        site.lab.lab.host(victim).kill();
        let (dead, survivor) = match victim {
            0 => (&pair.primary, &pair.backup),
            _ => (&pair.backup, &pair.primary),
        };
        // It went with its host, which is an error elsewhere.
        let _ = dead.wait();
        let promised = committed(dead);
        wait_for(survivor, &format!("LEDGER committed {}\r\n", promised + 5))?;
        survivor.signal(SIGTERM);
        ends_with("survivor", survivor, GOOD)?;
        let [on_dead, on_survivor] =
            [victim, 1 - victim].map(|host| site.ledger_on(&format!("disk-{host}.img")));
        let (on_dead, on_survivor) = (on_dead?, on_survivor?);
        println!(
            "  kill {kill} of host {victim}: {promised} committed there, {on_dead} on its disk, {} \
             on the survivor's",
            on_survivor
        );
        let lost = format!("FTVMM_SEED={seed}: a committed transaction is lost");
        require(on_dead >= promised && on_survivor >= committed(survivor), lost)?;
        found = on_survivor;
        site.copy_disk(1 - victim, victim)?;
        site.mend()?;
    }
    Ok(())
}

/// The guest is never started anew: the active host is killed, and a host with a blank disk
/// joins the survivor.
fn blank_disks_join(site: &Site, seed: u64, kills: u64) -> Result<(), Failed> {
    site.make_disks()?;
    let group = Group::new(&site.lab.lab, &site.files, running(LEDGER))?;
    let name = |host: usize| format!("disk-{host}.img");
    let path = |host: usize| format!("path={}", site.lab.inside(name(host)));
    let mut speaker = group.start_primary(0, &["--disk", &path(0)])?;
    let mut follower = group.join(1, 0, &["--disk", &path(1)])?;
    speaker.wait_protected()?;
    for kill in 0..kills {
        let mut rng = Rng::with_seed(seed.wrapping_add(kill));
        let at = committed(&speaker.process) + rng.u64(2..10);
        wait_for(&speaker.process, &format!("LEDGER committed {at}\r\n"))?;
        let dead = speaker.host;
        site.lab.lab.host(dead).kill();
        let _ = speaker.process.wait();
        let promised = committed(&speaker.process);
        wait_for(&follower.process, &format!("LEDGER committed {}\r\n", promised + 3))?;
        let on_dead = site.ledger_on(&name(dead))?;
        println!("  kill {kill} of host {dead}: {promised} committed there, {on_dead} on its disk");
        require(on_dead >= promised, format!("FTVMM_SEED={seed}: a transaction is lost"))?;
        site.mend()?;
        fs::File::create(site.lab.outside(name(dead)))?.set_len(DISK_BYTES)?;
        let next = group.join(dead, follower.host, &["--disk", &path(dead)])?;
        let status = follower.wait_followed_by(&next, |_| ())?;
        let stopped_us = status.last_attach.unwrap_or_default().stopped_us;
        println!("  joined again, the guest stood still for {:.0} ms", stopped_us as f64 / 1e3);
        (speaker, follower) = (follower, next);
    }
    let last = committed(&speaker.process) + 3;
    wait_for(&follower.process, &format!("LEDGER committed {last}\r\n"))?;
    speaker.process.signal(SIGTERM);
    ends_with("speaker", &speaker.process, GOOD)?;
    ends_with("follower", &follower.process, GOOD)?;
    let digest = |report: &str| site.reported(report, "/state_digest");
    equal("digest", digest(&follower.report)?, digest(&speaker.report)?)?;
    for host in 0..2 {
        let found = site.ledger_on(&name(host))?;
        require(found >= last, format!("host {host}: {found} of {last}"))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let clock = ftvmm_tests::clock::since_epoch().as_millis() as u64;
    let (seed, count) = (setting("FTVMM_SEED").unwrap_or(clock), setting("FTVMM_KILLS"));
    println!("disk: FTVMM_SEED={seed}");
    let cases: Vec<(&str, Case<Site>)> = vec![
        ("files_on_a_disk", Box::new(files_on_a_disk)),
        ("a_replay_needs_no_disk", Box::new(a_replay_needs_no_disk)),
        ("a_file_serves_one_guest", Box::new(a_file_serves_one_guest)),
        ("restored_with_its_disk", Box::new(restored::restored_with_its_disk)),
        ("a_half_copied_disk_is_refused", Box::new(states::a_half_copied_disk_is_refused)),
        ("the_dead_hosts_disk_is_refused", Box::new(states::the_dead_hosts_disk_is_refused)),
        ("both_disks_are_equal", Box::new(both_disks_are_equal)),
        ("different_disks_are_refused", Box::new(different_disks_are_refused)),
        ("an_error_is_the_guests_on_both_hosts", Box::new(an_error_is_the_guests_on_both_hosts)),
        ("a_primary_with_a_bad_disk_leaves", Box::new(a_primary_with_a_bad_disk_leaves)),
        ("a_backup_with_a_bad_disk_leaves", Box::new(a_backup_with_a_bad_disk_leaves)),
        ("kills", Box::new(move |site| kills(site, seed, count.unwrap_or(KILLS)))),
        (
            "blank_disks_join",
            Box::new(move |site| blank_disks_join(site, seed, count.unwrap_or(KILLS))),
        ),
    ];
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("disk");
    run_cases(&folder, cases.into_iter().map(|(name, case)| (name.to_owned(), case)).collect())
}
