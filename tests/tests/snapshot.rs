//! Snapshots of a real guest: a replay from each ends as the whole replay does, a restored guest
//! goes on where it was, and a file that is none, or another one, is refused by name.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use ftvmm_guest_images::GuestKernel;
use ftvmm_guest_programs::compute::line_after;
use ftvmm_tests::clients;
use ftvmm_tests::guest_run::{
    Finished, GUEST_ADDRESS, GuestLab, GuestRun, LabPool, PROMPT, READY, Report, SECOND_TAP, TAP,
    cmdline,
};
use ftvmm_tests::lab::Ended;
use libtest_mimic::{Arguments, Trial};

const GOOD: Ended = Ended::Status(0);
const FAILED: Ended = Ended::Status(1);
const BAD_USAGE: Ended = Ended::Status(2);
/// The control sockets lie in a file system of the host's own.
const CONTROL: &str = "/run/ftvmm-snapshot.sock";
const ROUNDS: u64 = 300;
const TAP_OPTION: &str = "tap=ftvm0";

type Check = fn(&GuestLab, &Recording);

const CHECKS: &[(&str, Check)] = &[
    ("a_replay_from_each_ends_like_the_whole", a_replay_from_each_ends_like_the_whole),
    ("until_and_record_work_from_a_snapshot", until_and_record_work_from_a_snapshot),
    ("a_restored_guest_goes_on", a_restored_guest_goes_on),
    ("a_restored_guest_is_recorded", a_restored_guest_is_recorded),
    ("a_restored_primary_gets_a_backup", a_restored_primary_gets_a_backup),
    ("a_damaged_snapshot_is_refused", a_damaged_snapshot_is_refused),
    ("what_does_not_fit_is_refused", what_does_not_fit_is_refused),
    ("a_replay_without_its_snapshot_is_refused", a_replay_without_its_snapshot_is_refused),
];

/// A recorded guest of which three snapshots were taken: while it computed, while it spoke to a
/// client, and while it did nothing.
struct Recording {
    run: Finished,
    /// Name and exit of each.
    snapshots: Vec<(&'static str, u64)>,
    /// `/proc/uptime` before the last, in seconds.
    uptime: f64,
}

impl Recording {
    fn make(site: &GuestLab) -> Self {
        assert_eq!(TAP_OPTION, format!("tap={TAP}"));
        let log = site.inside("whole.log");
        let given = ["--net", TAP_OPTION, "--cmdline", &cmdline(""), "--mem", "64"];
        let into = site.inside("");
        let served = ["--control", CONTROL, "--snapshot-dir", &into];
        let more = [&given[..], &["--record", &log], &served].concat();
        let run = site.run("whole", site.boot(&more)).unwrap();
        run.wait_for(READY).unwrap();
        run.wait_for(PROMPT).unwrap();
        run.type_text(&format!("kept=memory; echo BEGIN; compute {ROUNDS}\n"));
        run.wait_for("\nBEGIN").unwrap();
        let computing = ("computing.snapshot", take(site, "computing.snapshot"));
        run.wait_for(&line_after(ROUNDS)).unwrap();

        let fetching = std::thread::scope(|scope| {
            let fetched = scope.spawn(|| is_reached(site, 400_000));
            let exit = take(site, "fetching.snapshot");
            assert!(fetched.join().unwrap(), "the client got other bytes");
            ("fetching.snapshot", exit)
        });

        let uptime = uptime(&run, "before");
        let idle = ("idle.snapshot", take(site, "idle.snapshot"));
        // Slices after it are written against what the recorder remembers of memory.
        run.type_text("compute 20; echo over; reboot -f\n");
        let run = run.finish().unwrap();
        assert_eq!(run.ended, GOOD, "{}", run.errors);
        for line in run.errors.lines().filter(|line| line.contains("snapshot is written")) {
            println!("snapshot: {line}");
        }
        let snapshots = vec![computing, fetching, idle];
        println!("snapshot: {snapshots:?}, {:?}", run.report);
        Self { run, snapshots, uptime }
    }

    fn report(&self) -> &Report {
        self.run.report.as_ref().unwrap()
    }
}

/// Takes a snapshot of the guest whose socket is [`CONTROL`]; the exit it was taken at.
fn take(site: &GuestLab, name: &str) -> u64 {
    let taken = ask(site, name);
    assert_eq!(taken.ended, GOOD, "{}", taken.errors);
    let said = String::from_utf8(taken.console).unwrap();
    let exit = said.split(": exit ").nth(1).unwrap().split(',').next().unwrap();
    assert!(!site.outside(format!("{name}.partial")).exists());
    exit.parse().unwrap()
}

fn ask(site: &GuestLab, name: &str) -> Finished {
    ftvmm(site, &["snapshot", &site.inside(name), "--control", CONTROL])
}

fn ftvmm(site: &GuestLab, arguments: &[&str]) -> Finished {
    site.ask(arguments).unwrap()
}

fn assert_refused(answer: &Finished, status: Ended, says: &str) {
    assert_eq!(answer.ended, status, "{}", answer.errors);
    assert_eq!(answer.errors.lines().count(), 1, "{}", answer.errors);
    assert!(answer.errors.contains(says), "{says:?} is not in: {}", answer.errors);
}

/// What the guest's `/proc/uptime` says; `word` is new on its console.
fn uptime(run: &GuestRun, word: &str) -> f64 {
    run.type_text(&format!("echo {word} $(cat /proc/uptime) {word}$((40 + 2))\n"));
    run.wait_for(&format!("{word}42")).unwrap();
    let console = String::from_utf8(run.process().stdout()).unwrap();
    let said = console.rsplit(&format!("\n{word} ")).next().unwrap();
    said.split(' ').next().unwrap().parse().unwrap()
}

/// Whether a client gets the right bytes over TCP.
fn is_reached(site: &GuestLab, bytes: usize) -> bool {
    std::thread::scope(|scope| {
        let call = || {
            clients::enter_network(&site.lab).unwrap();
            let server = SocketAddr::new(GUEST_ADDRESS.parse().unwrap(), 7);
            let payload: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
            clients::reaching(|| clients::echo_stream(server, &payload)).unwrap()
        };
        scope.spawn(call).join().unwrap()
    })
}

/// `ftvmm --restore` of this snapshot with the guest's network card; snapshots of a guest that is
/// served go into the shared folder.
fn restored(site: &GuestLab, name: &str, more: &[&str]) -> Vec<String> {
    let snapshot = site.inside(name);
    let fixed = ["ftvmm", "--restore", &snapshot, "--net", TAP_OPTION];
    let into = site.inside("");
    let served = if more.contains(&CONTROL) { &["--snapshot-dir", &into][..] } else { &[] };
    fixed.iter().chain(more).chain(served).map(|&word| word.to_owned()).collect()
}

fn stop(run: GuestRun) -> Finished {
    run.process().signal(nix::libc::SIGTERM);
    let run = run.finish().unwrap();
    assert_eq!(run.ended, GOOD, "{}", run.errors);
    run
}

fn assert_same_end(one: &Report, other: &Report) {
    assert!(one.state_digest.is_some());
    assert_eq!(one.state_digest, other.state_digest);
    assert_eq!((one.exits, one.inputs, one.slices), (other.exits, other.inputs, other.slices));
}

fn a_replay_from_each_ends_like_the_whole(site: &GuestLab, recorded: &Recording) {
    let whole = site.replay("replayed", "whole.log", &[]).unwrap();
    assert_eq!(whole.ended, GOOD, "{}", whole.errors);
    assert_same_end(whole.report.as_ref().unwrap(), recorded.report());
    assert_eq!(whole.console, recorded.run.console);
    for (name, exit) in &recorded.snapshots {
        let from = exit.to_string();
        let replay = site.replay("from", "whole.log", &["--from", &from]).unwrap();
        assert_eq!(replay.ended, GOOD, "from {name}: {}", replay.errors);
        assert_same_end(replay.report.as_ref().unwrap(), recorded.report());
        assert!(recorded.run.console.ends_with(&replay.console), "from {name}");
        assert!(replay.console.len() < recorded.run.console.len(), "from {name}");
    }
    // The last at or before, not the nearest.
    let between = (recorded.snapshots[2].1 - 1).to_string();
    let replay = site.replay("between", "whole.log", &["--from", &between]).unwrap();
    assert_same_end(replay.report.as_ref().unwrap(), recorded.report());
    assert!(String::from_utf8_lossy(&replay.console).contains("before "));
    let stat = ftvmm(site, &["log", "stat", &site.inside("whole.log")]);
    assert!(String::from_utf8_lossy(&stat.console).contains("snapshots   3\n"));
}

fn until_and_record_work_from_a_snapshot(site: &GuestLab, recorded: &Recording) {
    let (name, exit) = recorded.snapshots[1];
    let (from, until) = (exit.to_string(), (exit + 500).to_string());
    let (moved, again) = (site.inside("moved.snapshot"), site.inside("again.log"));
    std::fs::rename(site.outside(name), site.outside("moved.snapshot")).unwrap();
    let more = ["--from", &from, "--snapshot", &moved, "--until", &until, "--record", &again];
    let part = site.replay("part", "whole.log", &more).unwrap();
    std::fs::rename(site.outside("moved.snapshot"), site.outside(name)).unwrap();
    assert_eq!(part.ended, GOOD, "{}", part.errors);
    let part = part.report.unwrap();
    assert_eq!(part.exits, exit + 500);
    let whole = site.replay("whole-part", "whole.log", &["--until", &until]).unwrap();
    assert_same_end(&part, whole.report.as_ref().unwrap());
    // What it wrote begins at the snapshot, which has come back under its old name.
    let original = site.inside(name);
    let replay = site.replay("again", "again.log", &["--snapshot", &original]).unwrap();
    // A recording that was stopped has no end, and says so.
    assert_refused(&replay, Ended::Status(1), "does not say how the run ended");
    assert_same_end(&part, replay.report.as_ref().unwrap());
    let diff = ftvmm(site, &["log", "diff", &site.inside("whole.log"), &again]);
    assert_eq!(diff.ended, Ended::Status(3), "{}", diff.errors);
    assert!(
        diff.errors.contains(&format!("begin at exit 0 and at exit {exit}")),
        "{}",
        diff.errors
    );
}

fn a_restored_guest_goes_on(site: &GuestLab, recorded: &Recording) {
    let run = site.run("on", restored(site, "computing.snapshot", &[])).unwrap();
    run.wait_for(&line_after(ROUNDS)).unwrap();
    run.type_text("echo it has $kept\n");
    run.wait_for("it has memory").unwrap();
    assert!(is_reached(site, 20_000));
    stop(run);

    let run = site.run("on", restored(site, "idle.snapshot", &["--control", CONTROL])).unwrap();
    let [first, second] = ["first", "second"].map(|word| {
        run.type_text("sleep 1\n");
        uptime(&run, word)
    });
    assert!(first >= recorded.uptime, "{first} s after {} s", recorded.uptime);
    assert!(second >= first + 1.0, "{second} s after {first} s");
    println!("snapshot: up {:.2} s before, {first:.2} s restored", recorded.uptime);
    assert!(is_reached(site, 20_000));
    // One of a restored guest, which no log describes.
    take(site, "second.snapshot");
    stop(run);
    let run = site.run("on", restored(site, "second.snapshot", &[])).unwrap();
    assert!(uptime(&run, "third") >= second);
    stop(run);
    std::fs::remove_file(site.outside("second.snapshot")).unwrap();
}

fn a_restored_guest_is_recorded(site: &GuestLab, _: &Recording) {
    let log = site.inside("restored.log");
    let more = ["--record", &log, "--control", CONTROL];
    let run = site.run("restored", restored(site, "idle.snapshot", &more)).unwrap();
    run.type_text("compute 20; echo computed $kept\n");
    run.wait_for("computed memory").unwrap();
    assert!(is_reached(site, 20_000));
    let exit = take(site, "later.snapshot").to_string();
    run.type_text("compute 20; echo again $kept\n");
    run.wait_for("again memory").unwrap();
    let run = stop(run);
    for more in [&[][..], &["--from", &exit]] {
        let replay = site.replay("replayed", "restored.log", more).unwrap();
        assert_eq!(replay.ended, GOOD, "{more:?}: {}", replay.errors);
        assert_same_end(replay.report.as_ref().unwrap(), run.report.as_ref().unwrap());
        assert!(run.console.ends_with(&replay.console), "{more:?}");
    }
    std::fs::remove_file(site.outside("later.snapshot")).unwrap();
}

fn a_restored_primary_gets_a_backup(site: &GuestLab, _: &Recording) {
    const ADDRESS: &str = "127.0.0.1:7811";
    let witness = format!("file:{}", site.inside("witness"));
    let host = site.lab.host(0);
    host.tap(SECOND_TAP).unwrap();
    let common = ["--witness", &witness, "--failure-timeout-ms", "3000", "--control"];
    let primary = ["--role", "primary", "--listen", ADDRESS, "--start-alone"];
    let primary = [&primary[..], &common, &[CONTROL]].concat();
    let primary = site.run("primary", restored(site, "idle.snapshot", &primary)).unwrap();
    primary.type_text("echo primary has $kept\n");
    primary.wait_for("primary has memory").unwrap();

    let (backup_control, tap) = ("/run/ftvmm-backup.sock", format!("tap={SECOND_TAP}"));
    let backup = ["--role", "backup", "--connect", ADDRESS, "--net", &tap, "--mem", "64"];
    let own_cmdline = ["--cmdline", &cmdline("")];
    let backup = [&backup[..], &own_cmdline, &common, &[backup_control]].concat();
    let backup = site.run("backup", site.boot(&backup)).unwrap();
    let wait_until = |control: &str, run: &GuestRun, says: &str| {
        let is_so = || {
            let status = ftvmm(site, &["status", "--control", control]);
            String::from_utf8_lossy(&status.console).contains(says)
        };
        while !is_so() {
            assert!(run.process().ended().is_none(), "ftvmm ended before it said {says:?}");
        }
    };
    wait_until(CONTROL, &primary, "primary, protected");
    primary.type_text("compute 20; echo both have $kept\n");
    primary.wait_for("both have memory").unwrap();
    backup.wait_for("both have memory").unwrap();
    // The guest's memory as the protected host has it, which the backup's log is told of.
    take(site, "protected.snapshot");
    primary.type_text("compute 20; echo both go on\n");
    backup.wait_for("\nboth go on").unwrap();
    primary.process().signal(nix::libc::SIGKILL);
    primary.finish().unwrap();
    wait_until(backup_control, &backup, "primary, not protected");
    backup.type_text("echo survivor has $kept\n");
    backup.wait_for("survivor has memory").unwrap();
    stop(backup);
    std::fs::remove_file(site.outside("protected.snapshot")).unwrap();
}

fn a_damaged_snapshot_is_refused(site: &GuestLab, _: &Recording) {
    let whole = std::fs::read(site.outside("idle.snapshot")).unwrap();
    let half = whole.len() / 2;
    let mut flipped = whole.clone();
    flipped[half] ^= 1;
    let mut newer = whole.clone();
    newer[8] = 9;
    let log = std::fs::read(site.outside("whole.log")).unwrap();
    for (content, says) in [
        (flipped, "snapshot is damaged: the checksum of the part at offset"),
        (whole[..half].to_vec(), "before its last part"),
        ([&whole[..], &[0]].concat(), "goes on after its end"),
        (newer, "snapshot has version 9, this program reads version 3"),
        (log, "not an ftvmm snapshot: it begins with \"FTVMMLOG\""),
        (whole[..40].to_vec(), "ends inside its header, after 40 bytes"),
        (Vec::new(), "not an ftvmm snapshot"),
    ] {
        site.write("changed.snapshot", &content).unwrap();
        let run = site.run("changed", restored(site, "changed.snapshot", &[])).unwrap();
        assert_refused(&run.finish().unwrap(), BAD_USAGE, says);
    }
}

fn what_does_not_fit_is_refused(site: &GuestLab, _: &Recording) {
    let idle = site.inside("idle.snapshot");
    let before = std::fs::read(site.outside("idle.snapshot")).unwrap();
    let refused = |words: &[&str], says: &str| {
        let restore = [&["--restore", &idle], words].concat();
        assert_refused(&ftvmm(site, &restore), BAD_USAGE, says);
    };
    refused(&[], "is of another guest: network card differs: ours is 52:54:00:46:54:01");
    let net = ["--net", TAP_OPTION];
    refused(&[&net[..], &["--mem", "64"]].concat(), "cannot be used with '--mem");
    refused(&[&net[..], &["--cmdline", "x"]].concat(), "cannot be used with '--cmdline");
    let [kernel, _] = site.guest.boot_files(GuestKernel::Tiny);
    site.write("longer-kernel", &[&std::fs::read(kernel).unwrap()[..], &[0]].concat()).unwrap();
    let longer = site.inside("longer-kernel");
    refused(&[&net[..], &["--kernel", &longer]].concat(), "is of another guest: kernel differs");
    refused(&[&net[..], &["--cpu-template", "sse4"]].concat(), "guest: CPU template differs");
    let primary = ["--role", "primary", "--listen", "127.0.0.1:7812", "--witness", "file:/run/w"];
    refused(&[&net[..], &primary].concat(), "add --start-alone");
    refused(&[&net[..], &["--record", &idle]].concat(), "would overwrite");
    let absent = ftvmm(site, &["--restore", "/nowhere.snapshot"]);
    assert_refused(&absent, BAD_USAGE, "snapshot '/nowhere.snapshot': No such file");

    // A guest that runs refuses what it cannot write, and goes on.
    let more = [&net[..], &["--control", CONTROL]].concat();
    let run = site.run("goes-on", restored(site, "idle.snapshot", &more[2..])).unwrap();
    uptime(&run, "first");
    assert_refused(&ask(site, "idle.snapshot"), BAD_USAGE, "is there already");
    let nowhere = ftvmm(site, &["snapshot", "/nowhere/x", "--control", CONTROL]);
    assert_refused(&nowhere, BAD_USAGE, "'/nowhere/x' is not in the folder for snapshots, '");
    let full = ftvmm(site, &["snapshot", "/dev/full", "--control", CONTROL]);
    assert_refused(&full, BAD_USAGE, "with another --snapshot-dir");
    assert_eq!(std::fs::read(site.outside("idle.snapshot")).unwrap(), before);
    uptime(&run, "second");
    stop(run);
    let gone = ask(site, "late.snapshot");
    assert_eq!(gone.ended, FAILED, "{}", gone.errors);
}

fn a_replay_without_its_snapshot_is_refused(site: &GuestLab, recorded: &Recording) {
    let log = site.inside("whole.log");
    let refused = |words: &[&str], says: &str| {
        assert_refused(&ftvmm(site, &[&["replay", &log], words].concat()), BAD_USAGE, says);
    };
    let [first, second] = [0, 1].map(|index| recorded.snapshots[index].1.to_string());
    let (name, exit) = recorded.snapshots[2];
    let last = exit.to_string();
    let computing = site.inside("computing.snapshot");
    refused(
        &["--from", "5"],
        &format!("no snapshot at or before exit 5; there are: {first} ({computing}), {second} ("),
    );
    refused(
        &["--from", &second, "--snapshot", &computing],
        &format!("'{computing}': is of exit {first}, memory "),
    );
    refused(&["--snapshot", &computing], "begins at power-on; to begin at a snapshot");
    refused(&["--from", &last, "--until", &first], "is before the snapshot of exit");
    let idle = site.inside("idle.snapshot");
    refused(&["--from", &last, "--record", &idle], "would overwrite");
    std::fs::rename(site.outside(name), site.outside("away.snapshot")).unwrap();
    refused(&["--from", &last], "idle.snapshot': No such file");
    std::fs::rename(site.outside("away.snapshot"), site.outside(name)).unwrap();
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("snapshot");
    let pool = Arc::new(LabPool::new(folder));
    let recordings = Arc::new(Mutex::new(BTreeMap::new()));
    let trial = |&(name, check): &(&str, Check)| {
        let (pool, recordings) = (Arc::clone(&pool), Arc::clone(&recordings));
        Trial::test(name, move || {
            let work = |site: &GuestLab| {
                // A lab in which a check failed is not lent again, and its recording lies in it.
                let mut recordings = recordings.lock().unwrap_or_else(PoisonError::into_inner);
                let made = recordings.entry(site.lab.share().to_owned());
                check(site, made.or_insert_with(|| Recording::make(site)));
            };
            Ok(pool.with(work)?)
        })
    };
    let conclusion = libtest_mimic::run(&arguments, CHECKS.iter().map(trial).collect());
    drop(pool);
    conclusion.exit_code()
}
