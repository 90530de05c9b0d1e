//! RDTSC everywhere, on the tiny kernel and on Debian's: user mode's in every shape the guest's `tsccheck` knows,
//! the #GPs that are none of it, and `--tsc hide`. Each run is recorded and replayed.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::Path;

use ftvmm_guest_images::GuestKernel;
use ftvmm_tests::guest_run::{GuestLab, PROMPT};
use ftvmm_tests::replayed::Replayed;

/// #GPs `tsccheck` takes beside the counter.
const FAULTS: u64 = 1000;

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

#[test]
fn rdtsc_is_trapped_in_every_shape_and_nothing_else_is() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tsc");
    let site = GuestLab::start(&folder, 1).unwrap();
    let check = format!("tsccheck --aux-zero --faults {FAULTS}");
    let trapped = Wanted {
        commands: &[(&check, "TSCCHECK ok"), ("rdtsc 300", "RDTSC ok")],
        user_reads_min: 500,
    };
    let hidden =
        Wanted { commands: &[("tsccheck --hidden --faults 50", "TSCCHECK ok")], user_reads_min: 0 };
    for kernel in [GuestKernel::Tiny, GuestKernel::Cloud] {
        recorded_and_replayed(&site, kernel, "trap", &trapped);
        recorded_and_replayed(&site, kernel, "hide", &hidden);
    }
}
