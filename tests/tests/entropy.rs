//! The guest's random numbers: another boot, other numbers; a replay or a backup, the same.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use ftvmm_replication::{LogReader, log_stat::stat};
use ftvmm_tests::guest_run::{GuestLab, cmdline};
use ftvmm_tests::pair::{GuestFiles, Pair, RunOptions, read_report};
use ftvmm_tests::replayed::Replayed;

/// Prints 64 hexadecimal digits, after the kernel has said that its generator is seeded.
/// The brackets keep the words on the command line from being counted too.
const SCRIPT: &str = "dmesg | grep -c crng.init.[d]one; head -c 32 /dev/urandom | sha256sum";
const SEEDED: &str = "1";
const DONE: &str = "FTGUEST RAN 0";
const REBOOT: &str = "reboot -f\n";

/// The digits, and what was printed before them.
fn numbers(console: &[u8]) -> (String, String) {
    let text = String::from_utf8_lossy(console).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let is_sum = |line: &&str| line.len() == 67 && line.ends_with("  -");
    let at = lines.iter().position(is_sum).unwrap_or_else(|| panic!("no digits in:\n{text}"));
    (lines[at - 1].to_owned(), lines[at].to_owned())
}

fn recorded(site: &GuestLab, name: &str) -> String {
    let log = format!("{name}.log");
    let command = site.boot(&["--cmdline", &cmdline(SCRIPT), "--record", &site.inside(&log)]);
    let run = site.run(&format!("{name}-recorded"), command).unwrap();
    run.wait_for(DONE).unwrap();
    run.type_text(REBOOT);
    let replayed = Replayed::after(site, name, run.finish().unwrap()).unwrap();
    assert_eq!(replayed.difference(), None);
    let (seeded, digits) = numbers(&replayed.recorded.console);
    assert_eq!(numbers(&replayed.replayed.console).1, digits, "a replay has other numbers");
    assert_eq!(seeded, SEEDED, "the generator was not seeded by the time init ran");
    let log = File::open(site.outside(&log)).unwrap();
    let stat = stat(&mut LogReader::new(BufReader::new(log)).unwrap()).unwrap();
    assert!(stat.entropy_bytes > 0, "{stat}");
    println!("{name}: {digits}, {} random bytes logged: {replayed}", stat.entropy_bytes);
    digits
}

fn in_lockstep(site: &GuestLab) -> String {
    let inside = |image: &PathBuf| site.inside(image.file_name().unwrap()).into();
    let files =
        GuestFiles { kernel: inside(&site.guest.kernel), initramfs: inside(&site.guest.initramfs) };
    let options = RunOptions {
        cmdline: format!("ftguest.run=\"{SCRIPT}\""),
        arguments: ["--failure-timeout-ms", "3000"].map(str::to_owned).into(),
        ..RunOptions::default()
    };
    let pair = Pair::start(&site.lab, &files, &options).unwrap();
    assert!(pair.primary.wait_for_stdout(DONE).unwrap());
    pair.primary.write_stdin(REBOOT.as_bytes());
    assert!(pair.primary.wait().unwrap().success());
    assert!(pair.backup.wait().unwrap().success());
    let (_, digits) = numbers(&pair.primary.stdout());
    assert_eq!(numbers(&pair.backup.stdout()).1, digits, "the backup has other numbers");
    let report = |name| read_report(&site.lab, name).unwrap();
    let [primary, backup] = [report(&pair.primary_report), report(&pair.backup_report)];
    assert!(primary.state_digest.is_some());
    assert_eq!(primary.state_digest, backup.state_digest);
    assert_eq!((primary.divergences, backup.takeovers), (0, 0));
    println!("pair: {digits}, {} exits", primary.exits);
    digits
}

#[test]
fn random_numbers_differ_between_boots_and_nowhere_else() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("entropy");
    let site = GuestLab::start(&folder, 2).unwrap();
    let [first, second] = ["first", "second"].map(|name| recorded(&site, name));
    let third = in_lockstep(&site);
    assert_ne!(first, second);
    assert_ne!(first, third);
    assert_ne!(second, third);
}
