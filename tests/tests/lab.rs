//! The lab does what the tests of the product rely on.
//!
//! Every check is written once, against [`Lab`], and runs on both backends: emulated machines,
//! and namespaces of this machine (which need no KVM to be checked). They need root.
#![allow(
    clippy::unwrap_used,
    reason = "a helper that unwraps is a check of the test that calls it"
)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ftvmm_tests::lab::{Backend, Ended, Lab, LabConfig, LabError};
use ftvmm_tests::{Program, built};

fn start(backend: Backend, name: &str, hosts: usize) -> Lab {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab").join(name);
    let _ = fs::remove_dir_all(&folder);
    let agent = PathBuf::from(env!("CARGO_BIN_EXE_lab-agent"));
    let config =
        LabConfig { backend, hosts, folder, agent, ..LabConfig::new(backend, "").unwrap() };
    Lab::start(config).unwrap()
}

/// Two hosts that several tests use at the same time; gone when none does.
fn shared(backend: Backend) -> Arc<Lab> {
    static EMULATED: Mutex<Weak<Lab>> = Mutex::new(Weak::new());
    static LOCAL: Mutex<Weak<Lab>> = Mutex::new(Weak::new());
    let (place, name) = match backend {
        Backend::Lab => (&EMULATED, "shared-emulated"),
        Backend::Local => (&LOCAL, "shared-local"),
    };
    let mut place = place.lock().unwrap();
    place.upgrade().unwrap_or_else(|| {
        let lab = Arc::new(start(backend, name, 2));
        *place = Arc::downgrade(&lab);
        lab
    })
}

/// Runs a shell script on a host, which must succeed; returns what it printed.
fn sh(lab: &Lab, host: usize, script: &str) -> String {
    let output = lab.host(host).run(&["sh", "-c", script]).unwrap();
    assert!(output.ended.success(), "{script}: {output:?}");
    output.text()
}

fn ping(lab: &Lab, from: usize, address: &str) -> bool {
    let ping = ["busybox", "ping", "-c", "1", "-W", "3", address];
    lab.host(from).run(&ping).unwrap().ended.success()
}

fn status_and_streams(lab: &Lab) {
    let output = lab.host(0).run(&["sh", "-c", "echo out; echo err >&2; exit 7"]).unwrap();
    assert_eq!(output.ended, Ended::Status(7));
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    let refused = lab.host(0).run(&["no-such-program"]);
    assert!(matches!(refused, Err(LabError::Refused { .. })), "{refused:?}");
}

fn standard_input_and_signals(lab: &Lab) {
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    let cat = lab.host(0).spawn(&["cat"]).unwrap();
    cat.write_stdin(&sent);
    let output = cat.finish().unwrap();
    assert_eq!(output.ended, Ended::Status(0));
    assert!(output.stdout == sent, "{} bytes came back changed", output.stdout.len());

    let sleeper = lab.host(0).spawn(&["sh", "-c", "echo up; sleep 1000; true"]).unwrap();
    assert!(sleeper.wait_for_stdout("up").unwrap());
    sleeper.signal(nix::libc::SIGTERM);
    assert_eq!(sleeper.wait().unwrap(), Ended::Signal(nix::libc::SIGTERM));
}

fn files_both_ways(lab: &Lab) {
    let content: Vec<u8> = (0..300_000_u32).map(|i| (i / 7) as u8).collect();
    fs::write(lab.share().join("in"), &content).unwrap();
    let share = lab.host(0).share().display();
    sh(lab, 0, &format!("cd {share} && cat in in > out"));
    let expected = [&content[..], &content[..]].concat();
    assert!(fs::read(lab.share().join("out")).unwrap() == expected);
    assert_eq!(sh(lab, 1, &format!("wc -c < {share}/out")), "600000", "the other host sees it too");
    // A file that has been looked at and then replaced is seen new at once: nothing is cached.
    sh(lab, 0, &format!("cd {share} && echo new > out.tmp && mv out.tmp out"));
    assert_eq!(sh(lab, 1, &format!("cat {share}/out")), "new");
}

/// The witness: of two hosts that want the same name, exactly one gets it, by O_EXCL and by link.
fn one_winner_per_name(lab: &Lab) {
    const NAMES: usize = 100;
    let share = lab.host(0).share().display();
    for (way, take) in
        [("excl", "(set -C; echo $me > $i) 2>/dev/null"), ("link", "ln mine.$me $i 2>/dev/null")]
    {
        fs::create_dir(lab.share().join(way)).unwrap();
        let script = |me: &str| {
            format!(
                "cd {share}/{way}; me={me}; echo $me > mine.$me; echo ready; read go
                 for i in $(seq {NAMES}); do {take} && echo $i; done; exit 0"
            )
        };
        let racers = [0, 1]
            .map(|i| lab.host(i).spawn(&["sh", "-c", &script(lab.host(i).letter())]).unwrap());
        for racer in &racers {
            assert!(racer.wait_for_stdout("ready").unwrap());
        }
        for racer in &racers {
            racer.write_stdin(b"go\n");
        }
        let won = racers.map(|racer| {
            let printed = racer.finish().unwrap().text();
            printed.lines().skip(1).map(|name| name.parse().unwrap()).collect::<BTreeSet<usize>>()
        });
        assert!(won[0].is_disjoint(&won[1]), "{way}: both won {:?}", &won[0] & &won[1]);
        assert_eq!(&won[0] | &won[1], (1..=NAMES).collect(), "{way}: somebody wins every name");
        for name in 1..=NAMES {
            let owner = fs::read_to_string(lab.share().join(way).join(name.to_string())).unwrap();
            let winner = if won[0].contains(&name) { "a\n" } else { "b\n" };
            assert_eq!(owner, winner, "{way}: {name}");
        }
    }
}

fn installed_programs_are_found_by_name(lab: &Lab) {
    let program = tempfile::tempdir().unwrap();
    let program = program.path().join("says-hello");
    fs::write(&program, "#!/bin/sh\necho hello\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    lab.install(&program).unwrap();
    assert_eq!(lab.host(1).run(&["says-hello"]).unwrap().text(), "hello");
}

fn hosts_reach_each_other(lab: &Lab) {
    assert!(ping(lab, 0, "10.77.0.2"));
    assert!(ping(lab, 1, "10.77.0.1"));
    assert!(ping(lab, 0, "10.78.0.2"));
}

fn a_client_reaches_a_server_through_br0(lab: &Lab) {
    let host = lab.host(0);
    fs::write(lab.share().join("page"), "served\n").unwrap();
    host.tap("ftvm0").unwrap();
    assert_eq!(sh(lab, 0, "ls /sys/class/net/br0/brif | tr '\\n' ' '"), "eth0 ftvm0");
    let home = host.share().display().to_string();
    let _server = host.spawn(&["busybox", "httpd", "-f", "-p", "80", "-h", &home]).unwrap();
    let url = format!("http://{}/page", host.outer_address());
    let curl = ["-sS", "--retry", "30", "--retry-connrefused", "--retry-delay", "1", &url];
    let answer = lab.run_client(Program::Curl, &curl).unwrap();
    assert_eq!(answer.stdout, b"served\n", "{answer:?}");
}

fn a_cut_link_is_cut_and_mends(lab: &Lab) {
    assert!(ping(lab, 0, "10.77.0.2"));
    lab.host(1).set_link(false).unwrap();
    assert!(!ping(lab, 0, "10.77.0.2"));
    assert!(ping(lab, 0, "10.78.0.2"), "the other network is not touched");
    lab.host(1).set_link(true).unwrap();
    assert!((0..10).any(|_| ping(lab, 0, "10.77.0.2")));
}

fn a_hard_stop_ends_one_host_and_a_restart_brings_it_back(lab: &Lab) {
    let stays = lab.host(0).spawn(&["sh", "-c", "echo up; read word; echo $word"]).unwrap();
    let goes = lab.host(1).spawn(&["sh", "-c", "echo up; sleep 1000"]).unwrap();
    assert!(stays.wait_for_stdout("up").unwrap() && goes.wait_for_stdout("up").unwrap());
    lab.host(1).kill();
    let gone = goes.wait();
    assert!(matches!(gone, Err(LabError::HostGone { .. })), "{gone:?}");
    assert!(!ping(lab, 0, "10.77.0.2"));
    stays.write_stdin(b"alive\n");
    assert_eq!(stays.finish().unwrap().text(), "up\nalive");
    lab.host(1).restart().unwrap();
    assert!((0..10).any(|_| ping(lab, 0, "10.77.0.2")));
}

/// What a guest that loses one host after the other needs: each comes back fresh, under the same
/// addresses, while the one that carries the guest goes on.
fn hosts_are_replaced_one_after_the_other(lab: &Lab) {
    let program = tempfile::tempdir().unwrap();
    let program = program.path().join("tells-host");
    fs::write(&program, "#!/bin/sh\necho host $1\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    lab.install(&program).unwrap();
    for round in 0..3 {
        let (goes, stays) = (round % 2, (round + 1) % 2);
        let script = "echo up; while read word; do echo $word; done";
        let witness = lab.host(stays).spawn(&["sh", "-c", script]).unwrap();
        assert!(witness.wait_for_stdout("up").unwrap());
        lab.host(goes).tap(&format!("old{round}")).unwrap();
        lab.host(goes).kill();
        witness.write_stdin(format!("alone {round}\n").as_bytes());
        assert!(witness.wait_for_stdout(&format!("alone {round}")).unwrap());

        let fresh = lab.host(goes);
        fresh.restart().unwrap();
        assert_eq!(sh(lab, goes, "ls /sys/class/net/br0/brif"), "eth0", "nothing of the old one");
        fresh.tap("ftvm0").unwrap();
        assert_eq!(fresh.run(&["tells-host", fresh.letter()]).unwrap().text().len(), 6);
        for address in [lab.host(stays).link_address(), lab.host(stays).outer_address()] {
            assert!((0..10).any(|_| ping(lab, goes, &address)), "{address} from the fresh host");
        }
        for address in [fresh.link_address(), fresh.outer_address()] {
            assert!((0..10).any(|_| ping(lab, stays, &address)), "{address} from the other");
        }
        let outside = ["-c", "1", "-w", "30", &fresh.outer_address()];
        assert!(
            lab.run_client(Program::Ping, &outside).unwrap().ended.success(),
            "a client reaches it"
        );
        witness.write_stdin(b"together\n");
        assert_eq!(witness.finish().unwrap().text(), format!("up\nalone {round}\ntogether"));
    }
}

fn a_silent_lab_is_reported_with_its_last_words(lab: &Lab) {
    let host = lab.host(0);
    let script = "echo the guest said this; sleep 1000";
    let mute = host.spawn(&["sh", "-c", script]).unwrap().with_silence(Duration::from_secs(2));
    let Err(LabError::Silent { tails, .. }) = mute.wait() else { panic!("it was not silent") };
    assert!(tails.contains("the guest said this"), "{tails}");
}

macro_rules! on_both_backends {
    ($($check:ident: $lab:expr;)*) => {
        mod emulated {
            use super::*;
            $(#[test] fn $check() { super::$check(&$lab(Backend::Lab, stringify!($check))); })*
        }
        mod local {
            use super::*;
            $(#[test] fn $check() { super::$check(&$lab(Backend::Local, stringify!($check))); })*
        }
    };
}

on_both_backends! {
    status_and_streams: |backend, _| shared(backend);
    standard_input_and_signals: |backend, _| shared(backend);
    files_both_ways: |backend, _| shared(backend);
    one_winner_per_name: |backend, _| shared(backend);
    installed_programs_are_found_by_name: |backend, _| shared(backend);
    hosts_reach_each_other: |backend, _| shared(backend);
    a_client_reaches_a_server_through_br0: |backend, _| shared(backend);
    a_cut_link_is_cut_and_mends: |backend, name| own(backend, name, 2);
    a_hard_stop_ends_one_host_and_a_restart_brings_it_back: |backend, name| own(backend, name, 2);
    hosts_are_replaced_one_after_the_other: |backend, name| own(backend, name, 2);
    a_silent_lab_is_reported_with_its_last_words: |backend, name| own(backend, name, 1);
}

fn own(backend: Backend, check: &str, hosts: usize) -> Lab {
    start(backend, &format!("{check}-{backend:?}"), hosts)
}

#[test]
fn an_emulated_host_has_kvm_with_nested_paging() {
    let lab = shared(Backend::Lab);
    assert_eq!(sh(&lab, 0, "test -c /dev/kvm && cat /sys/module/kvm_amd/parameters/npt"), "Y");
}

#[test]
fn a_hard_stop_of_a_local_host_ends_even_what_detached_itself() {
    let lab = own(Backend::Local, "detached", 1);
    let lock = lab.share().join("lock");
    let hold =
        format!("setsid flock {} sleep 1000 </dev/null >/dev/null 2>&1 & exit 0", lock.display());
    sh(&lab, 0, &hold);
    let free = || {
        let mut flock = Program::Flock.command().unwrap();
        flock.arg("-n").arg(&lock).arg("true").status().unwrap().success()
    };
    while free() {
        std::thread::yield_now();
    }
    lab.host(0).kill();
    assert!(free(), "the holder of the lock outlived its host");
}

fn exists(namespace: &str) -> bool {
    Path::new("/run/netns").join(namespace).exists()
}

#[test]
fn a_panic_takes_the_lab_away() {
    let name = Mutex::new(String::new());
    let panicked = std::panic::catch_unwind(|| {
        let lab = own(Backend::Local, "panic", 2);
        *name.lock().unwrap() = lab.namespace().to_owned();
        assert!(exists(lab.namespace()));
        panic!("on purpose");
    });
    let name = name.into_inner().unwrap();
    assert!(panicked.is_err() && !name.is_empty());
    assert!(!exists(&name) && !exists(&format!("{name}.a")) && !exists(&format!("{name}.b")));
}

const ABANDON: &str = "FTVMM_TEST_ABANDONS_A_LAB";

/// The other half of the next test: started by it as a process of its own, killed by it.
#[test]
#[ignore = "started by the_next_lab_removes_what_a_killed_one_left"]
fn abandons_a_lab() {
    if std::env::var_os(ABANDON).is_some() {
        let lab = own(Backend::Local, "abandoned", 1);
        println!("its namespace is {}", lab.namespace());
        lab.host(0).run(&["sleep", "1000"]).unwrap();
    }
}

#[test]
fn the_next_lab_removes_what_a_killed_one_left() {
    use std::io::{BufRead, BufReader};
    let mut maker = built(std::env::current_exe().unwrap())
        .args(["--exact", "abandons_a_lab", "--ignored", "--nocapture"])
        .env(ABANDON, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(maker.stdout.take().unwrap()).lines();
    let told = |line: String| Some(line.split_once("its namespace is ")?.1.to_owned());
    let name = lines.map_while(Result::ok).find_map(told).unwrap();
    assert!(exists(&name));
    maker.kill().unwrap();
    maker.wait().unwrap();
    assert!(exists(&name) && exists(&format!("{name}.a")), "SIGKILL leaves it behind");
    drop(own(Backend::Local, "successor", 1));
    assert!(!exists(&name) && !exists(&format!("{name}.a")));
}
