//! RDTSC everywhere, on the tiny kernel and on Debian's: user mode's in every shape the guest's
//! `tsccheck` knows, the #GPs that are none of it, and `--tsc hide`. Modules that read the counter,
//! loaded at random moments; a second kernel. Each run is recorded and replayed.
//!
//! `FTVMM_MODULE_RUNS` and `FTVMM_KEXECS` say how many recordings there are with modules and with a
//! second kernel; those after the first go on from a snapshot.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::Path;

use ftvmm_guest_images::GuestKernel;
use ftvmm_tests::guest_run::{GuestLab, PROMPT, Report, cmdline};
use ftvmm_tests::replayed::Replayed;
use ftvmm_tests::stress::cloud::kexec;

const SIGTERM: i32 = 15;
/// #GPs `tsccheck` takes beside the counter.
const FAULTS: u64 = 1000;
/// RDTSCs of a program.
const READS: u64 = 300;
/// With those of `tsccheck`.
const USER_READS_MIN: u64 = 500;

fn check() -> String {
    format!("tsccheck --aux-zero --faults {FAULTS}")
}

/// What is done in a run, and what must be in its report.
struct Wanted<'a> {
    /// Commands and what they print.
    commands: &'a [(&'a str, &'a str)],
    user_reads_min: u64,
}

fn recorded_and_replayed(site: &GuestLab, kernel: GuestKernel, tsc: &str, wanted: &Wanted) {
    let name = &format!("{}-{tsc}", kernel.name());
    let memory = kernel.memory_mib().to_string();
    let log = site.inside(format!("{name}.log"));
    let words = ["--mem", &memory, "--tsc", tsc, "--record", &log];
    let command = site.boot_kernel(kernel, &words);
    let run = site.run(&format!("{name}-recorded"), command).unwrap();
    run.wait_for(PROMPT).unwrap();
    for (command, answer) in wanted.commands {
        run.type_text(&format!("{command}\n"));
        run.wait_for(answer).unwrap();
    }
    run.type_text("reboot -f\n");
    let finished = run.finish().unwrap();
    let outcome = Replayed::after(site, name, finished).unwrap();
    assert_eq!(outcome.difference(), None, "{name}");
    let (recorded, replayed) =
        (outcome.recorded.report.as_ref().unwrap(), outcome.replayed.report.as_ref().unwrap());
    let facts = (recorded.rdtsc_user_reads, recorded.gp_passed, recorded.rdtsc_late_sites);
    println!("{name}: {outcome}; user reads, other #GPs, late sites: {facts:?}");
    assert_eq!(facts, (replayed.rdtsc_user_reads, replayed.gp_passed, replayed.rdtsc_late_sites));
    assert!(recorded.rdtsc_user_reads >= wanted.user_reads_min, "{name}: {facts:?}");
    if wanted.user_reads_min > 0 {
        assert!(recorded.gp_passed >= FAULTS, "{name}: {facts:?}");
    }
    assert_eq!(recorded.rdtsc_late_sites, 0, "{name}: {}", outcome.recorded.errors);
}

/// Cloud guests that run scripts: the first of them from power-on, those after it from a snapshot
/// of another one.
struct CloudGuests<'a> {
    site: &'a GuestLab,
    name: &'static str,
    words: Vec<String>,
    saved: Option<String>,
}

impl<'a> CloudGuests<'a> {
    fn new(site: &'a GuestLab, name: &'static str, words: &[&str]) -> Self {
        let words = words.iter().map(|&word| word.to_owned()).collect();
        Self { site, name, words, saved: None }
    }

    /// A guest at its prompt, saved.
    fn save(&self) -> String {
        let socket = self.site.inside(format!("{}.sock", self.name));
        let (line, origin) = (cmdline(""), format!("{}-origin", self.name));
        let words = [&["--cmdline", &line, "--control", &socket], &*self.own_words()].concat();
        let command = self.site.boot_kernel(GuestKernel::Cloud, &words);
        let run = self.site.run(&origin, command).unwrap();
        run.wait_for(PROMPT).unwrap();
        let saved = self.site.save(&socket, &format!("{origin}.snapshot")).unwrap();
        run.process().signal(SIGTERM);
        assert!(run.finish().unwrap().ended.success());
        saved
    }

    fn own_words(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }

    /// Records `script` in guest `number` and replays it; what is reported, and what the guest
    /// printed.
    fn script(&mut self, number: u64, script: &str) -> (Report, String) {
        let (site, name) = (self.site, format!("{}-{number}", self.name));
        let log = site.inside(format!("{name}.log"));
        let run = if number == 0 {
            let line = cmdline(script);
            let words = [&["--cmdline", &line, "--record", &log], &*self.own_words()].concat();
            let command = site.boot_kernel(GuestKernel::Cloud, &words);
            site.run(&format!("{name}-recorded"), command).unwrap()
        } else {
            if self.saved.is_none() {
                self.saved = Some(self.save());
            }
            let saved = self.saved.as_deref().unwrap();
            let words = ["ftvmm", "--restore", saved, "--record", &log];
            let command = words.map(str::to_owned).to_vec();
            let run = site.run(&format!("{name}-recorded"), command).unwrap();
            run.type_text(&format!("{script}\n"));
            run
        };
        let outcome = Replayed::after(site, &name, run.finish().unwrap()).unwrap();
        let console = String::from_utf8_lossy(&outcome.recorded.console).into_owned();
        assert_eq!(outcome.difference(), None, "{name}: {script}\n{console}");
        let report = outcome.recorded.report.clone().unwrap();
        let replayed = outcome.replayed.report.as_ref().unwrap();
        let facts =
            |report: &Report| (report.rdtsc_user_reads, report.gp_passed, report.rdtsc_late_sites);
        assert_eq!(facts(&report), facts(replayed), "{name}");
        println!(
            "{name}: {outcome}; sites of new code {}, late {}, kernels {}",
            report.rdtsc_new_sites, report.rdtsc_late_sites, report.other_kernels
        );
        assert_eq!(report.rdtsc_late_sites, 0, "{name}: {}", outcome.recorded.errors);
        std::fs::remove_file(site.outside(format!("{name}.log"))).unwrap();
        (report, console)
    }
}

fn runs(variable: &str) -> u64 {
    std::env::var(variable).map_or(1, |text| text.parse().unwrap())
}

/// The jitter entropy generator is a module made of RDTSCs: each value it reads is printed in the
/// end.
fn modules_read_guest_time(site: &GuestLab) {
    let mut rng = fastrand::Rng::new();
    let memory = GuestKernel::Cloud.memory_mib().to_string();
    let mut guests = CloudGuests::new(site, "modules", &["--mem", &memory]);
    for run in 0..runs("FTVMM_MODULE_RUNS") {
        let pause = |rng: &mut fastrand::Rng| format!("usleep {}", rng.u32(1..40_000));
        let (one, two) = (pause(&mut rng), pause(&mut rng));
        let script = format!(
            "{one}; modprobe -a sha3_generic algif_rng jitterentropy_rng; jitter; rmmod \
             jitterentropy_rng; \
             {two}; modprobe jitterentropy_rng; jitter; {}; rdtsc {READS}; reboot -f",
            check()
        );
        let (report, console) = guests.script(run, &script);
        assert_eq!(console.matches("JITTER ok").count(), 2, "{console}");
        for said in ["TSCCHECK ok", "RDTSC ok"] {
            assert!(console.contains(said), "{said}: {console}");
        }
        assert!(
            report.rdtsc_user_reads >= USER_READS_MIN && report.gp_passed >= FAULTS,
            "{report:?}"
        );
        // One RDTSC at least, each of the two times.
        assert!(report.rdtsc_new_sites >= 2, "{report:?}");
    }
}

fn a_second_kernel_reads_guest_time(site: &GuestLab) {
    const SCRIPT: &str =
        "modprobe:-a:sha3_generic:algif_rng:jitterentropy_rng,jitter,rdtsc:200,reboot:-f";
    let initramfs = site.kexec_initramfs().unwrap();
    let mut guests = CloudGuests::new(site, "kexec", &["--mem", "512", "--initrd", &initramfs]);
    for run in 0..runs("FTVMM_KEXECS") {
        let (report, console) = guests.script(run, &kexec(SCRIPT));
        assert_eq!(report.other_kernels, 1, "{console}");
        for said in ["JITTER ok", "RDTSC ok"] {
            assert_eq!(console.matches(said).count(), 1, "{said}: {console}");
        }
        assert!(report.rdtsc_new_sites >= 1 && report.rdtsc_user_reads >= 200, "{report:?}");
    }
}

#[test]
fn later_code_reads_guest_time() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tsc-later");
    let site = GuestLab::start(&folder, 1).unwrap();
    modules_read_guest_time(&site);
    a_second_kernel_reads_guest_time(&site);
}

#[test]
fn rdtsc_is_trapped_in_every_shape_and_nothing_else_is() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tsc");
    let site = GuestLab::start(&folder, 1).unwrap();
    let reads = format!("rdtsc {READS}");
    let trapped = Wanted {
        commands: &[(&check(), "TSCCHECK ok"), (&reads, "RDTSC ok")],
        user_reads_min: USER_READS_MIN,
    };
    let hidden =
        Wanted { commands: &[("tsccheck --hidden --faults 50", "TSCCHECK ok")], user_reads_min: 0 };
    // Debian's kernel with the counter trapped: `modules_read_guest_time`.
    recorded_and_replayed(&site, GuestKernel::Tiny, "trap", &trapped);
    for kernel in [GuestKernel::Tiny, GuestKernel::Cloud] {
        recorded_and_replayed(&site, kernel, "hide", &hidden);
    }
}
