//! The guest programs, built by cargo for the target this workspace always builds for (static).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use ftvmm_host_programs::Program;
use serde_json::Value;

use crate::store::{Store, not_started, succeeded};
use crate::{GuestBuildError, at};

const PACKAGE: &str = "ftvmm-guest-programs";
const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Returns the stripped executable.
pub(crate) fn build(store: &Store) -> Result<PathBuf, GuestBuildError> {
    let log = store.path("guest-programs.log");
    let errors = File::create(&log).map_err(at(&log))?;
    let mut command = Program::Cargo.command()?;
    command
        .args([
            "build",
            "--release",
            "--package",
            PACKAGE,
            "--message-format=json-render-diagnostics",
        ])
        // Symbols would triple the archive that the guest keeps in its memory.
        .args(["--config", "profile.release.strip='symbols'"])
        .current_dir(Path::new(WORKSPACE))
        .stdin(Stdio::null())
        .stderr(errors);
    // A folder of its own: the same folder would have every other build undo the stripping, and
    // wait for it.
    command.arg("--target-dir").arg(store.path("guest-target"));
    let output = command.output().map_err(not_started(&command))?;
    succeeded(&command, output.status, &log)?;
    executable(&String::from_utf8_lossy(&output.stdout))
        .ok_or(GuestBuildError::NoExecutable { package: PACKAGE })
}

/// The path in the last message about an executable
/// (<https://doc.rust-lang.org/cargo/reference/external-tools.html#json-messages>).
fn executable(messages: &str) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    };
    messages.lines().rev().find_map(of_line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
             {\"reason\":\"compiler-artifact\",\"executable\":\"/t/release/ftguest\"}\n\
             {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(executable(messages), Some(PathBuf::from("/t/release/ftguest")));
        assert_eq!(executable("not json\n"), None);
    }
}
