//! Unit tests under miri, which sees what no test of a result does: accesses to memory that is not
//! theirs.
//!
//! Our part of the crates that touch nothing of the host is without `unsafe`, so they are tests
//! that come to that of the libraries: queues in guest memory, compressed pages, differences of
//! pages. Some of the others take minutes each.

use std::process::{Command, Stdio};

use ftvmm_tests::Program;

/// The toolchain that miri is a component of.
const TOOLCHAIN: &str = "nightly";
/// What is to be run of it: the tests whose names have one of the last words.
const WORDS: &str = "cargo miri test --package ftvmm-devices --package ftvmm-replication --lib \
                     -- virtqueue virtio_ slice:: state::";
/// Miri is some hundred times as slow as the processor: few cases of each property. The files of
/// cases that failed are the host's, and left alone.
const SETTINGS: &[(&str, &str)] = &[
    ("MIRIFLAGS", "-Zmiri-disable-isolation"),
    ("PROPTEST_CASES", "1"),
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
    command.args(["run", TOOLCHAIN]).args(WORDS.split_whitespace()).envs(SETTINGS.iter().copied());
    Ok(command)
}
