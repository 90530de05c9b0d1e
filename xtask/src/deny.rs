//! `cargo xtask deny`: licences, sources, bans and advisories of the dependencies, by deny.toml.
//!
//! The network is asked for crates only. The advisories' database is a git repository, which
//! `cargo deny fetch db` brings; where nobody has fetched it, that is said and the rest is checked.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use ftvmm_host_programs::Program;

use crate::cargo::workspace;

/// Where cargo-deny keeps databases of advisories, below cargo's own folder.
const DATABASES: &str = "advisory-dbs";

/// Checks what can be checked here.
pub fn run() -> Result<ExitCode, Box<dyn Error>> {
    let mut good = check(&["--log-level", "error", "check", "bans", "licenses", "sources"])?;
    if has_advisories() {
        good &= check(&["--offline", "--log-level", "error", "check", "advisories"])?;
    } else {
        println!("advisories are not checked: `cargo deny fetch db` brings their database");
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check(words: &[&str]) -> Result<bool, Box<dyn Error>> {
    let mut command = Program::CargoDeny.command()?;
    Ok(command.args(words).current_dir(workspace()).status()?.success())
}

fn has_advisories() -> bool {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"));
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home);
    let databases = cargo.map(|cargo| cargo.join(DATABASES));
    let mut entries = databases.into_iter().filter_map(|folder| folder.read_dir().ok()).flatten();
    entries.any(|entry| entry.is_ok_and(|entry| entry.path().join(".git").exists()))
}
