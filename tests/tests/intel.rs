//! Guests on an Intel host: everything that KVM does by other code than on AMD's, on one emulated
//! host.
//!
//! The host is Bochs (`tests/src/lab/intel.rs`), which is slow: it is booted once for all cases,
//! and the tests of every day are a share of them. `FTVMM_INTEL=all` runs the rest as well; what
//! came out is in docs/determinism.md, "Intel hosts".
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ftvmm_guest_images::GuestKernel;
use ftvmm_guest_programs::compute::line_after;
use ftvmm_tests::guest_run::{Finished, PROMPT, Report, ftvmm_program, guest_images};
use ftvmm_tests::lab::{Ended, IntelConfig, IntelHost, LabConfig, LabProcess};
use ftvmm_tests::replayed::difference;
use libtest_mimic::{Arguments, Trial};

/// Says how much is run: `all`, or the share of every day.
const SHARE: &str = "FTVMM_INTEL";
/// The emulator is slow, and slower on a busy machine.
const SILENCE: Duration = Duration::from_secs(1800);
const GOOD: Ended = Ended::Status(0);
/// Rounds of computing, each some million instructions, into which a line is typed.
const ROUNDS: u64 = 40;
/// User mode's RDTSCs that the guest's `rdtsc` makes at least.
const USER_READS_MIN: u64 = 1000;
const SOCKET: &str = "/run/vm.sock";
const SNAPSHOT: &str = "/tmp/tiny.snapshot";

type Case = fn(&IntelHost);

const DAILY: &[(&str, Case)] = &[
    ("the_doctor_finds_the_host_suitable", the_doctor_finds_the_host_suitable),
    ("a_computing_guest_is_replayed", a_computing_guest_is_replayed),
];
const OTHERS: &[(&str, Case)] = &[
    ("a_saved_guest_goes_on", a_saved_guest_goes_on),
    ("a_pair_ends_alike", a_pair_ends_alike),
    ("a_stock_kernel_is_replayed", a_stock_kernel_is_replayed),
    ("parameters_of_the_module_have_no_say", parameters_of_the_module_have_no_say),
    ("without_ept_a_guest_with_a_log_is_refused", without_ept_a_guest_with_a_log_is_refused),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // All cases share the host, and the emulator one core.
    arguments.test_threads = Some(1);
    let all = std::env::var_os(SHARE).is_some_and(|share| share == "all");
    let others = if all { OTHERS } else { &[] };
    let host: Arc<Mutex<Option<IntelHost>>> = Arc::default();
    let trial = |(name, case): &(&'static str, Case)| {
        let (host, case) = (Arc::clone(&host), *case);
        Trial::test(*name, move || {
            let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
            case(host.get_or_insert_with(boot));
            Ok(())
        })
    };
    let trials = DAILY.iter().chain(others).map(trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn boot() -> IntelHost {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("intel");
    let config = LabConfig::new(ftvmm_tests::lab::Backend::Lab, &folder).unwrap();
    let images = guest_images().unwrap();
    let kernels = [GuestKernel::Tiny, GuestKernel::Cloud];
    IntelHost::start(&IntelConfig {
        folder,
        silence: SILENCE,
        memory_mib: 768,
        agent: config.agent,
        programs: vec![ftvmm_program().unwrap()],
        files: kernels.into_iter().flat_map(|kernel| images.boot_files(kernel)).collect(),
    })
    .unwrap()
}

/// A guest with one of the kernels, `mem` MiB and a script to run, as `ftguest.run` has it.
fn guest(kernel: GuestKernel, mem: &str, script: &str) -> Vec<String> {
    let images = guest_images().unwrap();
    let place = |path: &Path| format!("/share/{}", path.file_name().unwrap().to_string_lossy());
    let [kernel, initramfs] = images.boot_files(kernel).map(|path| place(&path));
    let run = if script.is_empty() { String::new() } else { format!(" ftguest.run={script}") };
    let cmdline = format!("console=ttyS0{run}");
    let words = ["--kernel", &kernel, "--initrd", &initramfs, "--cmdline", &cmdline, "--mem", mem];
    words.map(str::to_owned).to_vec()
}

/// Starts `ftvmm`, whose report will be `/tmp/<name>.json`.
fn start(host: &IntelHost, name: &str, words: &[String], more: &[&str]) -> LabProcess {
    let report = format!("/tmp/{name}.json");
    let fixed = ["ftvmm".to_owned()];
    let more = more.iter().map(|&word| word.to_owned());
    let argv = fixed.into_iter().chain(words.iter().cloned()).chain(more);
    let argv: Vec<String> = argv.chain(["--report".to_owned(), report]).collect();
    host.spawn(&argv).unwrap()
}

fn finish(host: &IntelHost, name: &str, process: LabProcess) -> Finished {
    let output = process.finish().unwrap();
    let report = host.run(&["cat", &format!("/tmp/{name}.json")]).unwrap();
    let report: Option<Report> = serde_json::from_slice(&report.stdout).ok();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    Finished { ended: output.ended, console: output.stdout, errors, report }
}

fn run(host: &IntelHost, name: &str, words: &[String], more: &[&str]) -> Finished {
    finish(host, name, start(host, name, words, more))
}

fn replay(host: &IntelHost, name: &str, log: &str, more: &[&str]) -> Finished {
    run(host, name, &["replay".to_owned(), log.to_owned()], more)
}

fn report(finished: &Finished) -> &Report {
    finished.report.as_ref().unwrap_or_else(|| panic!("no report: {}", finished.errors))
}

fn assert_equal(name: &str, recorded: &Finished, replayed: &Finished) {
    println!("{name}: {:?}", recorded.report);
    assert_eq!(difference(recorded, replayed), None, "{name}");
}

fn wait_for(process: &LabProcess, wanted: &str) {
    let came = process.wait_for_stdout(wanted).unwrap();
    let said = [process.stdout(), process.stderr()].concat();
    assert!(came, "no {wanted:?}: {}", String::from_utf8_lossy(&said));
}

fn the_doctor_finds_the_host_suitable(host: &IntelHost) {
    let answer = host.run(&["ftvmm", "doctor"]).unwrap();
    println!("{}", answer.text());
    assert_eq!(answer.ended, GOOD);
    assert!(answer.text().contains("provided by kvm_intel"));
    // Bochs steps over two instructions, which no Linux guest has to do with; and it has no XSAVE.
    assert!(answer.text().contains("would not work: "), "a step of Bochs is one instruction?");
}

/// A guest that makes user RDTSCs and #GPs, computes while a line is typed, and is saved.
fn a_computing_guest_is_replayed(host: &IntelHost) {
    let log = "/tmp/tiny.log";
    let words = guest(GuestKernel::Tiny, "64", "");
    let served = ["--control", SOCKET, "--snapshot-dir", "/tmp"];
    let recorder = start(host, "tiny", &words, &[&served[..], &["--record", log]].concat());
    wait_for(&recorder, PROMPT);
    // Of a guest that waits for its user, and so makes no slice.
    let idle = host.run(&["ftvmm", "snapshot", "/tmp/idle.snapshot", "--control", SOCKET]).unwrap();
    assert_eq!(idle.ended, GOOD, "{}", String::from_utf8_lossy(&idle.stderr));
    recorder.write_stdin(b"selfcheck 1; rdtsc\n");
    wait_for(&recorder, "\nSELFCHECK");
    recorder.write_stdin(format!("echo BEGIN; compute {ROUNDS}\n").as_bytes());
    wait_for(&recorder, "\nBEGIN");
    // It comes while the guest computes.
    recorder.write_stdin(b"echo typed$((40 + 2))\n");
    let taken = host.run(&["ftvmm", "snapshot", SNAPSHOT, "--control", SOCKET]).unwrap();
    assert_eq!(taken.ended, GOOD, "{}", String::from_utf8_lossy(&taken.stderr));
    let exit = taken.text();
    let exit = exit.split(": exit ").nth(1).unwrap().split(',').next().unwrap();
    wait_for(&recorder, &line_after(ROUNDS));
    wait_for(&recorder, "\ntyped42");
    recorder.write_stdin(b"poweroff -f\n");
    let recorded = finish(host, "tiny", recorder);
    let replayed = replay(host, "tiny-replayed", log, &[]);
    assert_equal("tiny", &recorded, &replayed);
    let told = report(&recorded);
    assert!(told.slices > 0, "nothing was given to a guest that computes");
    assert!(told.rdtsc_user_reads >= USER_READS_MIN, "{told:?}");
    assert_eq!(told.rdtsc_late_sites, 0);

    let later = replay(host, "tiny-later", log, &["--from", exit]);
    assert_eq!(later.ended, GOOD, "{}", later.errors);
    assert_eq!(report(&later).state_digest, told.state_digest, "replayed from exit {exit}");
}

/// Goes on from the snapshot that [`a_computing_guest_is_replayed`] took.
fn a_saved_guest_goes_on(host: &IntelHost) {
    let restored = start(host, "restored", &["--restore".to_owned(), SNAPSHOT.to_owned()], &[]);
    // Wherever the snapshot was taken: before or after the guest had done with computing.
    restored.write_stdin(b"echo back$((40 + 2))\n");
    wait_for(&restored, "\nback42");
    restored.write_stdin(b"poweroff -f\n");
    let restored = finish(host, "restored", restored);
    assert_eq!(restored.ended, GOOD, "{}", restored.errors);
}

fn a_pair_ends_alike(host: &IntelHost) {
    let words = guest(GuestKernel::Tiny, "64", "selfcheck:1,rdtsc,compute:4,poweroff:-f");
    // Both share one slow CPU.
    let both = ["--witness", "file:/tmp/witness", "--failure-timeout-ms", "60000"];
    let primary = [&both[..], &["--role", "primary", "--listen", "127.0.0.1:7700"]].concat();
    let backup = [&both[..], &["--role", "backup", "--connect", "127.0.0.1:7700"]].concat();
    let first = start(host, "primary", &words, &primary);
    let second = start(host, "backup", &words, &backup);
    let (first, second) = (finish(host, "primary", first), finish(host, "backup", second));
    println!("pair: {:?}", first.report);
    assert_eq!((first.ended, second.ended), (GOOD, GOOD), "{}\n{}", first.errors, second.errors);
    let (first, second) = (report(&first), report(&second));
    assert_eq!((first.exits, &first.state_digest), (second.exits, &second.state_digest));
    assert!(first.state_digest.is_some());
}

/// Debian's kernel has page-table isolation on an Intel CPU: the #GP handler starts in the user's
/// address space.
fn a_stock_kernel_is_replayed(host: &IntelHost) {
    let words = guest(GuestKernel::Cloud, "192", "selfcheck:1,rdtsc,poweroff:-f");
    let recorded = run(host, "cloud", &words, &["--record", "/tmp/cloud.log"]);
    let console = String::from_utf8_lossy(&recorded.console).into_owned();
    assert!(console.contains("isolation: enabled"), "no page-table isolation: {console}");
    assert!(!console.contains("unchecked MSR access"), "{console}");
    assert_equal("cloud", &recorded, &replay(host, "cloud-replayed", "/tmp/cloud.log", &[]));
    assert!(report(&recorded).rdtsc_user_reads >= USER_READS_MIN);
}

/// Loads KVM's modules anew.
fn reload(host: &IntelHost, kvm: &str, kvm_intel: &str) {
    let script = format!(
        "set -e; rmmod kvm-intel; rmmod kvm
         insmod /modules/*-kvm.ko {kvm}; insmod /modules/*-kvm-intel.ko pml=0 {kvm_intel}"
    );
    let said = host.run(&["sh", "-c", &script]).unwrap();
    assert_eq!(said.ended, GOOD, "{}", String::from_utf8_lossy(&said.stderr));
}

fn parameters_of_the_module_have_no_say(host: &IntelHost) {
    let words = guest(GuestKernel::Tiny, "64", "selfcheck:1,rdtsc,poweroff:-f");
    let recorded = run(host, "plain", &words, &["--record", "/tmp/plain.log"]);
    for (name, kvm, kvm_intel) in
        [("ignore-msrs", "ignore_msrs=1", ""), ("no-vpid", "", "vpid=0 eptad=0")]
    {
        reload(host, kvm, kvm_intel);
        assert_equal(name, &recorded, &replay(host, name, "/tmp/plain.log", &[]));
    }
    // KVM reports other segment attributes then: such a host repeats what another such host did.
    reload(host, "", "unrestricted_guest=0");
    let recorded = run(host, "restricted", &words, &["--record", "/tmp/restricted.log"]);
    let replayed = replay(host, "restricted-replayed", "/tmp/restricted.log", &[]);
    assert_equal("restricted", &recorded, &replayed);
}

fn without_ept_a_guest_with_a_log_is_refused(host: &IntelHost) {
    reload(host, "", "ept=0");
    let words = guest(GuestKernel::Tiny, "64", "poweroff:-f");
    let refused = run(host, "no-ept", &words, &["--record", "/tmp/no-ept.log"]);
    assert_eq!((refused.ended, refused.errors.lines().count()), (Ended::Status(2), 1));
    assert!(refused.errors.contains("kvm_intel/parameters/ept is N"), "{}", refused.errors);
    let unlogged = run(host, "no-ept-unlogged", &words, &[]);
    assert_eq!(unlogged.ended, GOOD, "{}", unlogged.errors);
    reload(host, "", "");
}
