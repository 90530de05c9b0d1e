//! `cargo xtask fuzz`: libFuzzer on the targets of `fuzz/`, one after the other.
//!
//! The stable compiler can do it: what cargo-fuzz passes to a nightly one is an address sanitizer,
//! which these crates have little unsafe code for, and flags of code generation that are stable.
//! Numbers that overflow and assertions of debug builds end a run, as in a debug build.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use ftvmm_host_programs::{Program, built};

use crate::cargo::workspace;

/// Counters at the edges of the code, which libFuzzer reads: as cargo-fuzz 0.13 passes them.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares \
                     -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1 --cfg fuzzing";
/// Builds with these flags are other ones than the usual.
const BUILDS: &str = "target/fuzz";
/// What is found, from the workspace's root: inputs that lead further, and those that end a target.
const FOUND: &str = "out/fuzz";
/// No longer input is tried, in bytes.
const INPUT_BYTES_MAX: u32 = 20_000;
/// No target may take more, in MiB, or work on one input for longer, in seconds.
const MEMORY_MIB_MAX: u32 = 2048;
const INPUT_S_MAX: u32 = 20;

/// Arguments of `cargo xtask fuzz`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct FuzzArguments {
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Which targets [default: all]
    targets: Vec<String>,
}

/// Runs them; fails when one finds something.
pub fn run(arguments: &FuzzArguments) -> Result<ExitCode, Box<dyn Error>> {
    let all = targets()?;
    if let Some(name) = arguments.targets.iter().find(|name| !all.contains(name)) {
        return Err(format!("no target is called {name}; there are {}", all.join(", ")).into());
    }
    let chosen =
        all.iter().filter(|name| arguments.targets.is_empty() || arguments.targets.contains(name));
    let mut found = Vec::new();
    for name in chosen {
        build(name)?;
        if !fuzz(name, arguments.seconds)? {
            found.push(name.as_str());
        }
    }
    if found.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("found something: {}; look for crash-* and others in {FOUND}", found.join(", "));
    println!("mend it, and put the file into fuzz/corpus, where every test run tries it");
    Ok(ExitCode::FAILURE)
}

/// The names of the targets.
fn targets() -> Result<Vec<String>, Box<dyn Error>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(workspace().join("fuzz/fuzz_targets"))? {
        let file = entry?.file_name().to_string_lossy().into_owned();
        names.extend(file.strip_suffix(".rs").map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

fn build(name: &str) -> Result<(), Box<dyn Error>> {
    let status = Program::Cargo
        .command()?
        .args(["build", "--quiet", "--release", "--package", "ftvmm-fuzz"])
        .args(["--features", "libfuzzer", "--bin", &format!("fuzz_{name}"), "--target-dir", BUILDS])
        .env("RUSTFLAGS", FLAGS)
        .current_dir(workspace())
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("the target {name} does not build").into()) }
}

/// Whether a target finds nothing. New inputs go to the first folder; those of the second are only
/// read.
fn fuzz(name: &str, seconds: u32) -> Result<bool, Box<dyn Error>> {
    let program = workspace().join(BUILDS).join(release_folder()).join(format!("fuzz_{name}"));
    let grown = workspace().join(FOUND).join(name);
    fs::create_dir_all(&grown)?;
    let mut command = built(program);
    command.arg(&grown);
    let seeds = workspace().join("fuzz/corpus").join(name);
    if seeds.exists() {
        command.arg(seeds);
    }
    let findings = format!("{}/", workspace().join(FOUND).display());
    let status = command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!("-timeout={INPUT_S_MAX}"))
        .arg(format!("-artifact_prefix={findings}{name}-"))
        .arg("-print_final_stats=1")
        .status()?;
    Ok(status.success())
}

/// Where cargo puts programs, below the folder of builds: the workspace's configuration names a
/// target.
fn release_folder() -> &'static Path {
    Path::new("x86_64-unknown-linux-gnu/release")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_file() {
        let names = targets().unwrap();
        assert!(names.iter().any(|name| name == "wire") && names.len() >= 14, "{names:?}");
        let manifest = fs::read_to_string(workspace().join("fuzz/Cargo.toml")).unwrap();
        for name in &names {
            assert!(manifest.contains(&format!("name = \"fuzz_{name}\"")), "{name}");
        }
    }
}
