//! Debian's unmodified kernels, and the tiny one beside them, find their devices and their clock by
//! themselves: each boots with its own modules and a command line that says nothing about the
//! machine, answers clients, switches itself off, and replays.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::fs::File;
use std::io::BufReader;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;

use ftvmm_devices::Input;
use ftvmm_guest_images::GuestKernel;
use ftvmm_guest_programs::stream::{DEFAULT_SEED, reader_sha256, stream_sha256};
use ftvmm_replication::{Event, LogReader};
use ftvmm_tests::guest_run::{GUEST_ADDRESS, GuestLab, READY, TAP, cmdline};
use ftvmm_tests::replayed::Replayed;
use ftvmm_tests::{clients, packages};

const PAGE_BYTES: u64 = 100_000;
/// The coarsest clock a guest may have.
const RESOLUTION_NS_MAX: u64 = 1000;
/// Two counts of the PM timer and the rounding of the samples lie between what the guest reads and
/// what is logged.
const CLOCK_ERROR_NS_MAX: u64 = 2000;

/// The kernel's name, its clock before and after some work, and how it ends.
const SCRIPT: &str = "uname -r; clockres; selfcheck; clockres 100; poweroff -f";

/// Numbers behind the words, of every line that has them.
fn numbers(console: &str, words: &str) -> Vec<u64> {
    let lines = console.lines().filter_map(|line| line.trim().strip_prefix(words));
    lines.flat_map(str::split_whitespace).map(|word| word.parse().unwrap()).collect()
}

/// Guest time at every sample of the log, in nanoseconds since power-on.
fn logged_times_ns(site: &GuestLab, log: &str) -> Vec<u64> {
    let mut reader =
        LogReader::new(BufReader::new(File::open(site.outside(log)).unwrap())).unwrap();
    let mut times_ns = Vec::new();
    while let Some(group) = reader.next_group().unwrap() {
        times_ns.extend(group.records.into_iter().filter_map(|record| match record.event {
            Event::Input(Input::Time { now_ns }) => Some(now_ns),
            _ => None,
        }));
    }
    times_ns
}

/// Whether each reading is a logged time, all of them shifted by the same: the moment the kernel's
/// clock began.
fn follow_the_log(readings_ns: &[u64], times_ns: &[u64]) -> bool {
    let close = |wanted_ns: u64| {
        let at = times_ns.partition_point(|&time_ns| time_ns + CLOCK_ERROR_NS_MAX < wanted_ns);
        times_ns.get(at).is_some_and(|&time_ns| time_ns <= wanted_ns + CLOCK_ERROR_NS_MAX)
    };
    let first_ns = readings_ns[0];
    let begins = times_ns.iter().filter_map(|&time_ns| time_ns.checked_sub(first_ns));
    begins.into_iter().any(|begin_ns| readings_ns.iter().all(|&at_ns| close(at_ns + begin_ns)))
}

fn answers(site: &GuestLab) {
    let port = |port| SocketAddr::new(GUEST_ADDRESS.parse().unwrap(), port);
    let url = format!("http://{GUEST_ADDRESS}/bytes/{PAGE_BYTES}");
    clients::enter_network(&site.lab).unwrap();
    assert!(clients::reaching(|| clients::echo_datagram(port(7), b"a datagram")).unwrap());
    assert!(clients::reaching(|| clients::echo_stream(port(7), b"a stream")).unwrap());
    let page = clients::reaching(|| clients::fetch(&site.lab, &url)).unwrap();
    let sum = reader_sha256(&page[..]).unwrap();
    assert_eq!(sum, stream_sha256(DEFAULT_SEED, PAGE_BYTES));
}

fn boots_serves_and_replays(site: &GuestLab, kernel: GuestKernel, release: &str) {
    let name = kernel.name();
    let log = format!("{name}.log");
    let [memory, cmdline] = [kernel.memory_mib().to_string(), cmdline("")];
    let net = format!("tap={TAP}");
    let guest = ["--mem", &memory, "--net", &net, "--cmdline", &cmdline];
    let command =
        site.boot_kernel(kernel, &[&guest[..], &["--record", &site.inside(&log)]].concat());
    let run = site.run(&format!("{name}-recorded"), command).unwrap();
    run.wait_for(READY).unwrap();
    thread::scope(|scope| scope.spawn(|| answers(site)).join()).unwrap();
    run.type_text(&format!("{SCRIPT}\n"));
    let replayed = Replayed::after(site, name, run.finish().unwrap()).unwrap();
    assert_eq!(replayed.difference(), None);

    let Replayed { recorded, .. } = &replayed;
    assert_eq!(recorded.report.as_ref().unwrap().end.as_deref(), Some("guest_power_off"));
    let console = String::from_utf8_lossy(&recorded.console).into_owned();
    assert!(console.contains(release), "no {release} in\n{console}");
    let resolutions_ns = numbers(&console, "CLOCK resolution ");
    let readings_ns = numbers(&console, "CLOCK readings ");
    println!("{name}: {replayed}, clock steps of {resolutions_ns:?} ns");
    assert_eq!(resolutions_ns.len(), 2, "{console}");
    assert!(resolutions_ns.iter().all(|&ns| ns <= RESOLUTION_NS_MAX));
    assert!(readings_ns.len() > 20);
    assert!(follow_the_log(&readings_ns, &logged_times_ns(site, &log)), "{readings_ns:?}");
    if kernel == GuestKernel::Cloud {
        // Registers nobody has planned for.
        assert!(!console.contains("unchecked MSR access"), "{console}");
        let unknown = &recorded.report.as_ref().unwrap().unknown_msrs;
        assert!(!unknown.is_empty(), "a stock kernel probes registers");
        println!("{name}: refused {unknown:?}");
    }
}

#[test]
fn every_kernel_finds_its_devices_and_its_clock() {
    let site = GuestLab::start(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("stock_kernel"), 1);
    let site = site.unwrap();
    for (kernel, release) in [
        (GuestKernel::Tiny, String::new()),
        (GuestKernel::Cloud, packages::cloud_kernel().unwrap().release),
        (GuestKernel::Generic, packages::generic_kernel().unwrap().release),
    ] {
        boots_serves_and_replays(&site, kernel, &release);
    }
}

#[test]
fn a_clock_that_drifts_does_not_follow_the_log() {
    let times_ns: Vec<u64> = (0..10_000).map(|i| i * 71_000 + i * i % 9973).collect();
    let good: Vec<u64> = times_ns.iter().skip(2000).step_by(400).map(|ns| ns - 100_000).collect();
    assert!(follow_the_log(&good, &times_ns));
    let drifting: Vec<u64> = good.iter().map(|ns| ns + ns / 1000).collect();
    assert!(!follow_the_log(&drifting, &times_ns));
}
