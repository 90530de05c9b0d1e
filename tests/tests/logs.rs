//! Recordings that were cut, damaged or belong to another guest, and what `ftvmm log` says of them.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

#[path = "logs/differences.rs"]
mod differences;

use std::io::Cursor;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use fastrand::Rng;
use ftvmm_replication::{End, EndReason, Event, GroupEncoder, LogReader, LogWriter, Record};
use ftvmm_tests::clock;
use ftvmm_tests::guest_run::{Finished, GuestLab, LabPool, TAP, cmdline};
use ftvmm_tests::lab::Ended;
use libtest_mimic::{Arguments, Trial};

use differences::{a_page_that_differs_is_found, a_register_that_differs_is_found};

const BAD_USAGE: Ended = Ended::Status(2);
const FAILED: Ended = Ended::Status(1);
const DIVERGENCE: Ended = Ended::Status(3);
/// Positions at which the recording is cut, and at which a bit of it flips.
const CUTS: usize = 4;
const FLIPS: usize = 4;
const UNTIL: u64 = 6000;

type Check = fn(&GuestLab, &Recording);

const CHECKS: &[(&str, Check)] = &[
    ("a_whole_recording_replays", a_whole_recording_replays),
    ("a_cut_recording_replays_up_to_the_cut", a_cut_recording_replays_up_to_the_cut),
    ("a_cut_header_is_refused", a_cut_header_is_refused),
    ("a_flipped_bit_never_goes_unnoticed", a_flipped_bit_never_goes_unnoticed),
    ("what_only_the_end_shows_is_found", what_only_the_end_shows_is_found),
    (
        "another_builds_recording_is_replayed_and_named",
        another_builds_recording_is_replayed_and_named,
    ),
    ("what_is_no_recording_is_refused", what_is_no_recording_is_refused),
    ("another_guest_is_refused_by_name", another_guest_is_refused_by_name),
    ("until_stops_before_the_exit", until_stops_before_the_exit),
    ("stat_dump_and_diff_tell", stat_dump_and_diff_tell),
    ("a_recorded_replay_is_the_same_recording", a_recorded_replay_is_the_same_recording),
    ("a_register_that_differs_is_found", a_register_that_differs_is_found),
    ("a_page_that_differs_is_found", a_page_that_differs_is_found),
    ("what_diff_cannot_use_is_refused", what_diff_cannot_use_is_refused),
];

/// A guest that worked for a while and rebooted.
struct Recording {
    log: Vec<u8>,
    /// Where each group begins in the log, and where the last one ends.
    groups: Vec<u64>,
    run: Finished,
}

impl Recording {
    fn make(site: &GuestLab) -> Self {
        let (tap, log) = (format!("tap={TAP}"), site.inside("whole.log"));
        let script = cmdline("selfcheck; reboot -f");
        let command = site.boot(&["--net", &tap, "--cmdline", &script, "--record", &log]);
        let run = site.run("whole", command).unwrap().finish().unwrap();
        assert!(run.ended.success(), "{run:?}");
        let log = std::fs::read(site.outside("whole.log")).unwrap();
        let mut reader = LogReader::new(Cursor::new(&log)).unwrap();
        let mut groups = vec![reader.offset_bytes()];
        while reader.next_group().unwrap().is_some() {
            groups.push(reader.offset_bytes());
        }
        println!("logs: a recording of {} bytes in {} groups", log.len(), groups.len() - 1);
        Self { log, groups, run }
    }

    fn header_bytes(&self) -> usize {
        self.groups[0] as usize
    }

    fn exits(&self) -> u64 {
        self.run.report.as_ref().unwrap().exits
    }

    /// Writes `log` where hosts find it, and replays it.
    fn replay(&self, site: &GuestLab, log: &[u8], more: &[&str]) -> Finished {
        site.write("changed.log", log).unwrap();
        let _ = std::fs::remove_file(site.outside("changed.json"));
        site.replay("changed", "changed.log", more).unwrap()
    }

    fn assert_begins_like_this(&self, replayed: &Finished) {
        let console = &replayed.console;
        assert!(self.run.console.starts_with(console), "the guest printed something else");
        assert!(replayed.report.as_ref().unwrap().exits <= self.exits());
    }
}

fn assert_refused(answer: &Finished, status: Ended, says: &str) {
    assert_eq!(answer.ended, status, "{}", answer.errors);
    assert_eq!(answer.errors.lines().count(), 1, "{}", answer.errors);
    assert!(answer.errors.contains(says), "{says:?} is not in: {}", answer.errors);
}

fn ftvmm(site: &GuestLab, arguments: &[&str]) -> Finished {
    site.ask(arguments).unwrap()
}

fn a_whole_recording_replays(site: &GuestLab, whole: &Recording) {
    let replayed = whole.replay(site, &whole.log, &[]);
    assert_eq!(replayed.ended, Ended::Status(0), "{}", replayed.errors);
    let digest = |run: &Finished| run.report.as_ref().unwrap().state_digest.clone().unwrap();
    assert_eq!(digest(&replayed), digest(&whole.run));
    assert_eq!(replayed.console, whole.run.console);
}

fn a_cut_recording_replays_up_to_the_cut(site: &GuestLab, whole: &Recording) {
    let mut rng = rng();
    for _ in 0..CUTS {
        let cut = rng.usize(whole.header_bytes()..whole.log.len());
        let replayed = whole.replay(site, &whole.log[..cut], &[]);
        assert_eq!(replayed.ended, FAILED, "cut at {cut}: {}", replayed.errors);
        assert!(replayed.errors.contains("is not complete"), "{}", replayed.errors);
        whole.assert_begins_like_this(&replayed);
        let exits = replayed.report.as_ref().unwrap().exits;
        println!("logs: cut at byte {cut}: replayed {exits} exits of {}", whole.exits());
        let between_groups = whole.groups.contains(&(cut as u64));
        assert!(between_groups || replayed.errors.contains("tail is damaged"), "{replayed:?}");
    }
}

fn a_cut_header_is_refused(site: &GuestLab, whole: &Recording) {
    for cut in [1, 7, 12, 19, 20, whole.header_bytes() - 1] {
        let says = if cut < 8 { "log" } else { "inside its header" };
        assert_refused(&whole.replay(site, &whole.log[..cut], &[]), BAD_USAGE, says);
    }
}

fn a_flipped_bit_never_goes_unnoticed(site: &GuestLab, whole: &Recording) {
    let mut rng = rng();
    let last_group = whole.groups[whole.groups.len() - 2] as usize;
    for _ in 0..FLIPS {
        let at = rng.usize(whole.header_bytes()..whole.log.len());
        let mut log = whole.log.clone();
        log[at] ^= 1 << rng.u8(0..8);
        let answer = whole.replay(site, &log, &[]);
        println!("logs: bit flipped in byte {at}: {}", answer.errors.trim_end());
        if at < last_group {
            assert_refused(&answer, BAD_USAGE, "is damaged");
        } else {
            // Nothing readable follows, so it looks like a tear.
            assert_eq!(answer.ended, FAILED, "{}", answer.errors);
            assert!(answer.errors.contains("tail is damaged"), "{}", answer.errors);
            whole.assert_begins_like_this(&answer);
        }
    }
}

/// The recording with another end.
fn with_end(whole: &Recording, change: impl Fn(&mut End)) -> Vec<u8> {
    rewritten(whole, None, change)
}

/// The recording with another end, and as if another build had made it.
fn rewritten(whole: &Recording, build: Option<&str>, change: impl Fn(&mut End)) -> Vec<u8> {
    let mut reader = LogReader::new(Cursor::new(&whole.log)).unwrap();
    let mut header = reader.header().clone();
    if let Some(build) = build {
        header.build = build.try_into().unwrap();
    }
    let mut writer = LogWriter::new(Vec::new(), &header).unwrap();
    let mut encoder = GroupEncoder::new();
    while let Some(group) = reader.next_group().unwrap() {
        for mut record in group.records {
            if let Event::End(end) = &mut record.event {
                change(end);
            }
            encoder.push(&record);
        }
        writer.write_group(&encoder.finish(group.horizon)).unwrap();
    }
    writer.finish().unwrap()
}

fn what_only_the_end_shows_is_found(site: &GuestLab, whole: &Recording) {
    type Change = fn(&mut End);
    let cases: [(Change, &str); 4] = [
        (|end| end.chain ^= 1, "exits since the last check"),
        (|end| end.outputs ^= 1, "what the guest sent"),
        (|end| end.state_digest[0] ^= 1, "the state has digest"),
        (|end| end.reason = EndReason::PowerOff, "the end is reset, recorded is power-off"),
    ];
    for (change, says) in cases {
        let log = with_end(whole, change);
        assert_refused(&whole.replay(site, &log, &[]), DIVERGENCE, says);
    }
    // One that is to stop later comes to the same end.
    let (change, says) = cases[0];
    let until = ["--until", &(whole.exits() + 1000).to_string()];
    assert_refused(&whole.replay(site, &with_end(whole, change), &until), DIVERGENCE, says);
    let same = whole.replay(site, &with_end(whole, |_| {}), &[]);
    assert_eq!(same.ended, Ended::Status(0), "{}", same.errors);
}

fn another_builds_recording_is_replayed_and_named(site: &GuestLab, whole: &Recording) {
    const OTHER: &str = "0.0.1+0123456789abcdef";
    let made_by = format!("recording was made by build {OTHER}, this is build ");
    let same = whole.replay(site, &rewritten(whole, Some(OTHER), |_| {}), &[]);
    assert_eq!(same.ended, Ended::Status(0), "{}", same.errors);
    assert!(same.errors.contains(&made_by), "{}", same.errors);
    let other = whole.replay(site, &rewritten(whole, Some(OTHER), |end| end.chain ^= 1), &[]);
    assert_eq!(other.ended, DIVERGENCE, "{}", other.errors);
    let last = other.errors.lines().last().unwrap_or_default();
    assert!(last.contains("exits since the last check") && last.contains(&made_by), "{last}");
    let stat = ftvmm(site, &["log", "stat", &site.inside("changed.log")]);
    let line = format!("build       {OTHER}\n");
    assert!(String::from_utf8_lossy(&stat.console).contains(&line), "{line:?}");
}

fn what_is_no_recording_is_refused(site: &GuestLab, whole: &Recording) {
    let changed = |at: usize, to: u8| {
        let mut log = whole.log.clone();
        log[at] = to;
        log
    };
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("another magic", changed(0, b'G'), "not an ftvmm log: it begins with \"GTVMMLOG\""),
        ("another version", changed(8, 99), "log has version 99, this program reads version"),
        ("a changed header", changed(40, whole.log[40] ^ 1), "header is damaged"),
        ("an empty file", Vec::new(), "log"),
        ("a text", b"#!/bin/sh\nexit 0\n".to_vec(), "not an ftvmm log"),
    ];
    for (what, log, says) in cases {
        println!("logs: {what}");
        assert_refused(&whole.replay(site, &log, &[]), BAD_USAGE, says);
        let file = site.inside("changed.log");
        assert_refused(&ftvmm(site, &["log", "stat", &file]), BAD_USAGE, says);
        assert_refused(&ftvmm(site, &["log", "dump", &file]), BAD_USAGE, says);
    }
    assert_refused(&ftvmm(site, &["replay", "/nowhere.log"]), BAD_USAGE, "'/nowhere.log'");
}

fn another_guest_is_refused_by_name(site: &GuestLab, whole: &Recording) {
    let mut initramfs = std::fs::read(&site.guest.initramfs).unwrap();
    initramfs.push(0);
    site.write("other-initramfs", &initramfs).unwrap();
    let (kernel, initramfs) = (site.inside("cloud-vmlinuz"), site.inside("other-initramfs"));
    let other_kernel = whole.replay(site, &whole.log, &["--kernel", &kernel]);
    assert_refused(&other_kernel, BAD_USAGE, "made with another guest: kernel differs");
    let other_initramfs = whole.replay(site, &whole.log, &["--initrd", &initramfs]);
    assert_refused(&other_initramfs, BAD_USAGE, "made with another guest: initramfs differs");
}

fn until_stops_before_the_exit(site: &GuestLab, whole: &Recording) {
    let until = |exit: u64| whole.replay(site, &whole.log, &["--until", &exit.to_string()]);
    let [once, again] = [until(UNTIL), until(UNTIL)];
    assert_eq!(once.ended, Ended::Status(0), "{}", once.errors);
    whole.assert_begins_like_this(&once);
    assert_eq!(once.report.as_ref().unwrap().exits, UNTIL);
    assert!(once.report.as_ref().unwrap().state_digest.is_some());
    assert_eq!(once.report, again.report);
    let beyond = until(whole.exits() + 1000);
    assert_eq!(beyond.ended, Ended::Status(0), "{}", beyond.errors);
    assert_eq!(beyond.report.unwrap().exits, whole.exits());
}

fn stat_dump_and_diff_tell(site: &GuestLab, whole: &Recording) {
    let report = whole.run.report.as_ref().unwrap();
    let log = site.inside("stated.log");
    site.write("stated.log", &whole.log).unwrap();
    let says = |arguments: &[&str]| {
        let answer = ftvmm(site, arguments);
        assert_eq!(answer.ended, Ended::Status(0), "{arguments:?}: {}", answer.errors);
        String::from_utf8(answer.console).unwrap()
    };
    let stat = says(&["log", "stat", &log]);
    for fact in [
        format!("inputs      {}", report.inputs),
        format!("log         {} bytes", report.log_bytes),
        "end         reset".to_owned(),
        format!("state       {}", report.state_digest.as_ref().unwrap()),
    ] {
        assert!(stat.contains(&fact), "{fact:?} is not in:\n{stat}");
    }
    let dump = says(&["log", "dump", &log]);
    let times = dump.lines().filter(|line| line.contains(" time ")).count();
    assert!(stat.contains(&format!("  time      {times}\n")), "{times} in the dump, {stat}");
    assert_same(&says(&["log", "diff", &log, &log]));

    let cut = whole.groups[whole.groups.len() - 2] as usize;
    site.write("shorter.log", &whole.log[..cut]).unwrap();
    let different = ftvmm(site, &["log", "diff", &log, &site.inside("shorter.log")]);
    assert_eq!(different.ended, DIVERGENCE, "{}", different.errors);
    assert!(different.errors.contains("the second recording ends"), "{}", different.errors);
}

fn assert_same(diff: &str) {
    assert!(diff.ends_with("the two recordings say the same\n"), "{diff}");
}

/// What `log diff` says of `a` and `b`, files of the shared folder.
fn diff(site: &GuestLab, a: &str, b: &str, more: &[&str]) -> (Ended, String, String) {
    let (a, b) = (site.inside(a), site.inside(b));
    let answer = ftvmm(site, &[&["log", "diff", &a, &b], more].concat());
    let said = String::from_utf8(answer.console).unwrap();
    println!("{said}{}", answer.errors);
    (answer.ended, said, answer.errors)
}

/// Replays the whole recording into `name`, another one.
fn record_again(site: &GuestLab, whole: &Recording, name: &str, more: &[&str]) -> Finished {
    let into = site.inside(name);
    whole.replay(site, &whole.log, &[&["--record", &into, "--overwrite"], more].concat())
}

fn a_recorded_replay_is_the_same_recording(site: &GuestLab, whole: &Recording) {
    site.write("first.log", &whole.log).unwrap();
    let digest = |run: &Finished| run.report.as_ref().unwrap().state_digest.clone().unwrap();
    let slices = whole.run.report.as_ref().unwrap().slices;
    println!("logs: {} exits, {slices} slices", whole.exits());
    // The second takes digests of memory where the first did not, between the copies slices refer
    // to.
    for more in [&[][..], &["--check-every", "7", "--check-memory-every", "300"]] {
        let replayed = record_again(site, whole, "again.log", more);
        assert_eq!(replayed.ended, Ended::Status(0), "{}", replayed.errors);
        let (ended, said, _) = diff(site, "first.log", "again.log", &[]);
        assert_eq!(ended, Ended::Status(0));
        assert_same(&said);
        let twice = site.replay("twice", "again.log", &[]).unwrap();
        assert_eq!(twice.ended, Ended::Status(0), "{}", twice.errors);
        assert_eq!(digest(&twice), digest(&whole.run));
    }
}

fn records(log: &[u8]) -> Vec<Record> {
    let mut reader = LogReader::new(Cursor::new(log)).unwrap();
    std::iter::from_fn(|| reader.next_group().unwrap()).flat_map(|group| group.records).collect()
}

fn what_diff_cannot_use_is_refused(site: &GuestLab, whole: &Recording) {
    site.write("good.log", &whole.log).unwrap();
    let mut log = whole.log.clone();
    log[whole.groups[0] as usize + 9] ^= 1;
    site.write("damaged.log", &log).unwrap();
    let [good, damaged] = ["good.log", "damaged.log"].map(|name| site.inside(name));
    let refused = |words: &[&str], says: &str| assert_refused(&ftvmm(site, words), BAD_USAGE, says);
    refused(&["log", "diff", &good, "/nowhere.log"], "'/nowhere.log'");
    refused(&["log", "diff", &good, &damaged], "damaged.log'");
    refused(&["log", "diff", &good, &good, "--vmlinux", &good], "vmlinux '");
    refused(&["log", "diff", &good], "<RIGHT>");
    refused(&["replay", &good, "--record", &good], "would overwrite");
    refused(&["replay", &good, "--check-every", "1"], "--record");
    refused(&["replay", &good, "--record", "/nowhere/x.log"], "'/nowhere/x.log'");
    assert_eq!(std::fs::read(site.outside("good.log")).unwrap(), whole.log);
}

fn rng() -> Rng {
    let named = std::env::var("FTVMM_SEED").ok();
    let seed =
        named.map_or_else(|| clock::since_epoch().as_millis() as u64, |s| s.parse().unwrap());
    println!("logs: FTVMM_SEED={seed}");
    Rng::with_seed(seed)
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("logs");
    let pool = Arc::new(LabPool::new(folder));
    let recording = Arc::new(OnceLock::new());
    let trial = |&(name, check): &(&str, Check)| {
        let (pool, recording) = (Arc::clone(&pool), Arc::clone(&recording));
        Trial::test(name, move || {
            Ok(pool.with(|site| check(site, recording.get_or_init(|| Recording::make(site))))?)
        })
    };
    let conclusion = libtest_mimic::run(&arguments, CHECKS.iter().map(trial).collect());
    drop(pool);
    conclusion.exit_code()
}
