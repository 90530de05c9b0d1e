//! The guest programs, built by cargo for the target this workspace always builds for (static).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use ftvmm_host_programs::Program;
use serde_json::Value;

use crate::store::{NAME_DIGITS, Store, digest, not_started, succeeded};
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
    command.arg("--target-dir").arg(store.path(&target_name(Path::new(WORKSPACE))?));
    let output = command.output().map_err(not_started(&command))?;
    succeeded(&command, output.status, &log)?;
    executable(&String::from_utf8_lossy(&output.stdout))
        .ok_or(GuestBuildError::NoExecutable { package: PACKAGE })
}

/// Two checkouts share the cache. In one folder, cargo takes what the other has built for fresh.
fn target_name(workspace: &Path) -> Result<String, GuestBuildError> {
    let workspace = workspace.canonicalize().map_err(at(workspace))?;
    let digest = digest([workspace.as_os_str().as_encoded_bytes()]);
    Ok(format!("guest-target-{}", &digest[..NAME_DIGITS]))
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
    fn two_checkouts_have_two_folders() {
        let checkouts = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [one, other] = checkouts.each_ref().map(|path| target_name(path.path()).unwrap());
        assert_ne!(one, other);
        assert_eq!(one, target_name(&checkouts[0].path().join(".")).unwrap());
    }

    #[test]
    fn the_executable_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
             {\"reason\":\"compiler-artifact\",\"executable\":\"/t/release/ftguest\"}\n\
             {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(executable(messages), Some(PathBuf::from("/t/release/ftguest")));
        assert_eq!(executable("not json\n"), None);
    }
}
