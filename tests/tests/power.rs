//! What becomes of a guest that resets, panics, is switched off, interrupted or restored: each is
//! recorded, and its replay is the same run.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::Path;
use std::thread;
use std::time::Duration;

use ftvmm_guest_images::GuestKernel;
use ftvmm_tests::clock;
use ftvmm_tests::guest_run::{GuestLab, GuestRun, READY, cmdline};
use ftvmm_tests::lab::Ended;
use ftvmm_tests::replayed::Replayed;

const LOOK_EVERY: Duration = Duration::from_millis(20);
const SIGTERM: i32 = 15;
const SIGCONT: i32 = 18;
const SIGSTOP: i32 = 19;
/// Twice as long as Linux waits for a thread that gets no turn (`watchdog_thresh`, 2 x 10 s).
const STALL: Duration = Duration::from_secs(40);
/// Ways in which Linux resets a PC (`reboot=`), as /sys/kernel/reboot/type has them.
const RESETS: [&str; 6] = ["kbd", "acpi", "bios", "efi", "triple", "pci"];

/// A run that is recorded as `name`, as a user would start it.
fn start(site: &GuestLab, name: &str, kernel: GuestKernel, more: &[&str]) -> GuestRun {
    let log = site.inside(format!("{name}.log"));
    let fixed = ["--mem", "128", "--record", &log];
    site.run(name, site.power_on(kernel, &[&fixed[..], more].concat())).unwrap()
}

/// Waits until the guest has printed `wanted` so many times.
fn wait_for_times(run: &GuestRun, wanted: &str, times: usize) {
    run.wait_for(wanted).unwrap();
    loop {
        let console = String::from_utf8_lossy(&run.process().stdout()).into_owned();
        if console.matches(wanted).count() >= times {
            return;
        }
        assert!(run.process().ended().is_none(), "the run ended: {console}");
        thread::sleep(LOOK_EVERY);
    }
}

/// Waits for the end; the replay must be the same.
fn equal(site: &GuestLab, name: &str, run: GuestRun) -> Replayed {
    let replayed = Replayed::after(site, name, run.finish().unwrap()).unwrap();
    assert_eq!(replayed.difference(), None, "{name}");
    println!("{name}: {replayed}");
    replayed
}

fn end(replayed: &Replayed) -> &str {
    replayed.recorded.report.as_ref().unwrap().end.as_deref().unwrap()
}

/// One run, started again after a reset of each kind.
fn resets(site: &GuestLab) {
    let run = start(site, "resets", GuestKernel::Tiny, &["--cmdline", &cmdline("true")]);
    for (before, kind) in RESETS.iter().enumerate() {
        wait_for_times(&run, READY, before + 1);
        run.type_text(&format!("echo {kind} > /sys/kernel/reboot/type; reboot -f\n"));
    }
    wait_for_times(&run, READY, RESETS.len() + 1);
    run.type_text("selfcheck 1; poweroff -f\n");
    let replayed = equal(site, "resets", run);
    assert_eq!(end(&replayed), "guest_power_off");
    for run in [&replayed.recorded, &replayed.replayed] {
        assert_eq!(run.report.as_ref().unwrap().resets, RESETS.len() as u64);
    }
}

/// A kernel without a driver for pvpanic: its console tells.
fn panics_on_its_console(site: &GuestLab) {
    let line = "console=ttyS0 quiet rdinit=/bin/false";
    let run = start(site, "panics", GuestKernel::Tiny, &["--cmdline", line]);
    let finished = run.finish().unwrap();
    assert_eq!(finished.ended, Ended::Status(1), "{}", finished.errors);
    let told = "the guest's kernel panicked: Attempted to kill init!";
    assert!(finished.errors.contains(told), "{}", finished.errors);
    assert_eq!(finished.report.unwrap().end.as_deref(), Some("guest_panic"));
}

/// Debian's driver tells at once, whatever the kernel does then. The guest goes on from `snapshot`.
fn panics_with_a_driver(site: &GuestLab, snapshot: &str) {
    let log = site.inside("pvpanic.log");
    let command = ["ftvmm", "--restore", snapshot, "--record", &log].map(str::to_owned);
    let run = site.run("pvpanic", command.to_vec()).unwrap();
    run.type_text(
        "echo 0 > /proc/sys/kernel/panic; modprobe pvpanic-mmio; echo c > /proc/sysrq-trigger\n",
    );
    let finished = run.finish().unwrap();
    assert_eq!(finished.ended, Ended::Status(1), "{}", finished.errors);
    assert!(finished.errors.contains("panicked: sysrq triggered crash"), "{}", finished.errors);
    let replayed = site.replay("pvpanic-replayed", "pvpanic.log", &[]).unwrap();
    let digest = |report: &Option<ftvmm_tests::guest_run::Report>| {
        report.as_ref().unwrap().state_digest.clone().unwrap()
    };
    assert_eq!(digest(&replayed.report), digest(&finished.report));
}

/// Has acpid listen to the button; it is in the background before it has opened the button's
/// events.
const LISTEN: &str = "modprobe -a button evdev; mkdir -p /etc/acpi/PWRF; \
     printf '#!/bin/sh\\necho PRESSED\\npoweroff -f\\n' > /etc/acpi/PWRF/00000080; \
     chmod +x /etc/acpi/PWRF/00000080; acpid -l /tmp/acpid.log; \
     until ls -l /proc/$(pidof acpid)/fd | grep -q event; do usleep 100000; done; echo LIST''ENS\n";

/// A host that stands still while its guest computes, and while something else happens: the guest
/// catches up, and all its threads get their turn.
fn stands_still(run: &GuestRun, meanwhile: impl FnOnce()) {
    run.type_text("(while :; do :; done) & echo COM''PUTES\n");
    run.wait_for("COMPUTES").unwrap();
    run.process().signal(SIGSTOP);
    let stopped = clock::now();
    meanwhile();
    thread::sleep(STALL.saturating_sub(stopped.elapsed()));
    run.process().signal(SIGCONT);
    // In the guest's time, of which it has missed more.
    run.type_text("usleep 25000000; kill $!; echo CAUGHT''UP\n");
    run.wait_for("CAUGHTUP").unwrap();
    let console = String::from_utf8_lossy(&run.process().stdout()).into_owned();
    for report in ["soft lockup", "self-detected stall"] {
        assert!(!console.contains(report), "{console}");
    }
}

/// A non-maskable interrupt, the alarm of the clock and the power button reach the guest and its
/// replay. The path of a snapshot of the guest before all that.
fn is_interrupted(site: &GuestLab) -> String {
    let socket = site.inside("power.sock");
    let line = cmdline("cat /sys/class/rtc/rtc0/since_epoch");
    // An emulated host may need longer than a person would wait.
    let more = ["--cmdline", line.as_str(), "--control", &socket, "--stop-grace", "86400"];
    let run = start(site, "interrupted", GuestKernel::Cloud, &more);
    run.wait_for(READY).unwrap();
    let snapshot = site.save(&socket, "interrupted.snapshot").unwrap();
    let asked = site.ask(&["nmi", "--control", &socket]).unwrap();
    assert!(asked.ended.success(), "{}", asked.errors);
    run.wait_for("NMI received for unknown reason").unwrap();
    run.type_text(
        "echo +2 > /sys/class/rtc/rtc0/wakealarm; \
         until grep -q '8: *[1-9].*rtc0' /proc/interrupts; do usleep 100000; done; echo RANG\n",
    );
    run.wait_for("\nRANG").unwrap();
    stands_still(&run, || panics_on_its_console(site));
    run.type_text(LISTEN);
    run.wait_for("LISTENS").unwrap();
    run.process().signal(SIGTERM);
    let replayed = equal(site, "interrupted", run);
    assert_eq!(end(&replayed), "guest_power_off");
    snapshot
}

/// Two guests of one snapshot have other random numbers. The guest they come from does not listen
/// to its power button: SIGTERM ends it, whatever time it would have.
fn is_restored(site: &GuestLab) {
    let socket = site.inside("restore.sock");
    let line = cmdline("true");
    let more = ["--cmdline", line.as_str(), "--control", &socket, "--stop-grace", "86400"];
    let run = start(site, "origin", GuestKernel::Tiny, &more);
    run.wait_for(READY).unwrap();
    let snapshot = site.save(&socket, "origin.snapshot").unwrap();
    run.process().signal(SIGTERM);
    assert_eq!(end(&equal(site, "origin", run)), "requested");
    let mut numbers = Vec::new();
    for name in ["copy-1", "copy-2"] {
        let log = site.inside(format!("{name}.log"));
        let command = ["ftvmm", "--restore", &snapshot, "--record", &log].map(str::to_owned);
        let run = site.run(name, command.to_vec()).unwrap();
        run.type_text("echo NUMBERS $(head -c 16 /dev/urandom | md5sum); poweroff -f\n");
        let replayed = equal(site, name, run);
        let console = String::from_utf8_lossy(&replayed.recorded.console).into_owned();
        let line = console.lines().find(|line| line.starts_with("NUMBERS")).unwrap();
        numbers.push(line.to_owned());
    }
    assert_ne!(numbers[0], numbers[1]);
}

#[test]
fn a_machine_that_is_switched_on_and_off_is_the_same_in_its_replay() {
    let site = GuestLab::start(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("power"), 1).unwrap();
    resets(&site);
    let snapshot = is_interrupted(&site);
    panics_with_a_driver(&site, &snapshot);
    is_restored(&site);
}
