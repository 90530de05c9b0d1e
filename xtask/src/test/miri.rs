//! Unit tests under miri, which sees what no test of the result does: accesses to memory that is not theirs.
//!
//! Only of the crates that touch nothing of the host; what they do not forbid, `unsafe`, is in the libraries they use.

use std::process::{Command, Stdio};

use ftvmm_tests::Program;

/// The toolchain that miri is a component of.
const TOOLCHAIN: &str = "nightly";
/// What is to be run of it.
const WORDS: &[&str] = &[
    "cargo",
    "miri",
    "test",
    "--package",
    "ftvmm-devices",
    "--package",
    "ftvmm-replication",
    "--lib",
];
/// Miri is some hundred times as slow as the processor: few cases of each property. The files of cases that failed are
/// the host's, and left alone.
const SETTINGS: &[(&str, &str)] = &[
    ("MIRIFLAGS", "-Zmiri-disable-isolation"),
    ("PROPTEST_CASES", "2"),
    ("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "true"),
];

/// The command, or why there is none.
pub fn command() -> Result<Command, String> {
    let rustup = || Program::Rustup.command().map_err(|error| error.to_string());
    let mut asked = rustup()?;
    let asked = asked.args(["run", TOOLCHAIN, "cargo", "miri", "--version"]);
    let answer = asked.stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !answer.is_ok_and(|status| status.success()) {
        return Err(format!(
            "there is none here: rustup toolchain install {TOOLCHAIN} --component miri,rust-src"
        ));
    }
    let mut command = rustup()?;
    command.args(["run", TOOLCHAIN]).args(WORDS).envs(SETTINGS.iter().copied());
    Ok(command)
}
