//! An idle guest costs next to nothing to record: this is what a backup's link carries all night.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where it cannot go on")]

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::thread;
use std::time::Duration;

use ftvmm_devices::Input;
use ftvmm_replication::{Event, GroupEncoder, LogReader, Record};
use ftvmm_tests::guest_run::{GuestLab, PROMPT, TAP, cmdline};

const IDLE: Duration = Duration::from_secs(10);
const KBIT_PER_S_MAX: f64 = 20.0;

/// What was recorded after the last key was typed.
fn idle_records(log: &Path) -> Vec<Record> {
    let mut reader = LogReader::new(BufReader::new(File::open(log).unwrap())).unwrap();
    let mut records = Vec::new();
    while let Some(group) = reader.next_group().unwrap() {
        records.extend(group.records);
    }
    let typed = |r: &Record| matches!(r.event, Event::Input(Input::ConsoleRx { .. }));
    let start = records.iter().rposition(typed).expect("something was typed");
    records.split_off(start + 1)
}

fn time_ns(record: &Record) -> Option<u64> {
    match record.event {
        Event::Input(Input::Time { now_ns }) => Some(now_ns),
        _ => None,
    }
}

#[test]
fn an_idle_guest_is_cheap_to_record() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("idle");
    let site = GuestLab::start(&folder, 1).unwrap();
    let (tap, log) = (format!("tap={TAP}"), site.inside("idle.log"));
    let command = site.boot(&["--net", &tap, "--cmdline", &cmdline(""), "--record", &log]);
    let run = site.run("idle", command).unwrap();
    run.wait_for(PROMPT).unwrap();
    // Whenever this host stalls, the guest's state is logged: all that changed since the last time.
    // What the boot changed is not the idle guest's; the stops of this computation log it.
    run.type_text("spin 24; echo computed $((40 + 1))\n");
    run.wait_for("computed 41").unwrap();
    run.type_text("echo idle from $((40 + 2))\n");
    run.wait_for("idle from 42").unwrap();
    thread::sleep(IDLE);
    run.process().signal(nix::libc::SIGTERM);
    let finished = run.finish().unwrap();
    assert!(finished.ended.success(), "{finished:?}");

    let records = idle_records(&site.outside("idle.log"));
    let times: Vec<u64> = records.iter().filter_map(time_ns).collect();
    let seconds = (times[times.len() - 1] - times[0]) as f64 / 1e9;
    let mut group = GroupEncoder::new();
    records.iter().for_each(|record| group.push(record));
    let last = records[records.len() - 1].at;
    let bytes = group.finish(last).len();
    let rate = bytes as f64 * 0.008 / seconds;
    println!(
        "idle log: {rate:.1} kbit/s ({} records, {bytes} bytes in {seconds:.1} s of guest time)",
        records.len()
    );
    assert!(rate < KBIT_PER_S_MAX, "{rate:.1} kbit/s");
}
