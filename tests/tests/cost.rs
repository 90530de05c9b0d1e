//! No change costs a run's host more instructions than docs/bench/cost.json says, but for what a
//! busy kernel may do in between.

use std::path::Path;
use std::process::ExitCode;

use ftvmm_tests::cost::{grown, measure, read};
use libtest_mimic::{Arguments, Trial};

const SAVED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/bench/cost.json");
const MORE_PERCENT: u64 = 5;

fn main() -> ExitCode {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cost");
    let trial = Trial::test("instructions", move || {
        let saved = read(Path::new(SAVED))?;
        let found = measure(&folder, |doing| println!("{doing}"))?;
        let more = grown(&saved, &found, MORE_PERCENT);
        if more.is_empty() {
            return Ok(());
        }
        let advice = "if that is as it should be, `cargo xtask cost --save` writes the page again";
        Err(format!("{}\n{advice}", more.join("\n")).into())
    });
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}
