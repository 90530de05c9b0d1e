//! Debian's unmodified cloud kernel boots to a shell that answers, and replays.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::Path;

use ftvmm_tests::guest_run::{GuestLab, PROMPT};
use ftvmm_tests::packages;
use ftvmm_tests::replayed::Replayed;

#[test]
fn debians_cloud_kernel_boots_to_a_shell_and_replays() {
    let release = packages::cloud_kernel().unwrap().release;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stock_kernel");
    let site = GuestLab::start(&folder, 1).unwrap();
    let command = site.boot_stock(&["--mem", "256", "--record", &site.inside("stock.log")]);
    let run = site.run("stock-recorded", command).unwrap();
    run.wait_for(PROMPT).unwrap();
    println!("stock kernel: the shell is there");
    run.type_text("echo answer $((6 * 7)) from $(uname -r)\n");
    run.wait_for(&format!("answer 42 from {release}")).unwrap();
    run.type_text("selfcheck\n");
    run.wait_for("SELFCHECK ok").unwrap();
    run.type_text("reboot -f\n");
    let outcome = Replayed::after(&site, "stock", run.finish().unwrap()).unwrap();
    println!("stock kernel: {outcome}");
    assert_eq!(outcome.difference(), None);
}
