//! The CPU a guest is shown: templates other than the default.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::Path;

use ftvmm_tests::guest_run::{GuestLab, cmdline};
use ftvmm_tests::lab::Ended;
use ftvmm_tests::replayed::Replayed;

const DONE: &str = "FTGUEST RAN 0";
const REBOOT: &str = "reboot -f\n";
const REFUSED: Ended = Ended::Status(2);

/// Records a run of `script` with a template and replays it; `None` when the host cannot have the
/// template.
fn recorded(site: &GuestLab, template: &str, script: &str) -> Option<Replayed> {
    let (log, cmdline) = (site.inside(format!("{template}.log")), cmdline(script));
    let more = ["--cpu-template", template, "--cmdline", &cmdline, "--record", &log];
    let run = site.run(&format!("{template}-recorded"), site.boot(&more)).unwrap();
    if run.wait_for(DONE).is_ok() {
        run.type_text(REBOOT);
    }
    let finished = run.finish().unwrap();
    if finished.ended == REFUSED {
        let lines: Vec<&str> = finished.errors.lines().collect();
        println!("{template}: {}", finished.errors.trim_end());
        let begins = format!("ftvmm: the CPU template '{template}' cannot be used on this host: ");
        assert!(matches!(lines[..], [line] if line.starts_with(&begins)), "{}", finished.errors);
        return None;
    }
    let replayed = Replayed::after(site, template, finished).unwrap();
    assert_eq!(replayed.difference(), None);
    println!("{template}: {replayed}");
    Some(replayed)
}

fn printed(replayed: &Replayed, wanted: &str) -> bool {
    String::from_utf8_lossy(&replayed.recorded.console).contains(wanted)
}

#[test]
fn guests_use_what_their_template_shows() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cpu");
    let site = GuestLab::start(&folder, 1).unwrap();
    let flags = "grep -m 1 flags /proc/cpuinfo; selfcheck 2";

    let sse4 = recorded(&site, "sse4", flags).unwrap();
    assert!(printed(&sse4, " sse4_2 "), "no SSE4.2 in the guest");
    assert!(!printed(&sse4, " avx"), "AVX in the guest");
    // Where AVX is refused, the reason was checked and printed.
    if let Some(avx) = recorded(&site, "avx", flags) {
        assert!(printed(&avx, " avx2 "), "no AVX2 in the guest");
    }
}
