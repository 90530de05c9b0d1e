//! Builds programs of this workspace and says where they are.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use ftvmm_tests::Program;

/// The root of the checkout that this program was built from.
pub fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// Builds one program in the release profile; returns its path.
pub fn build(package: &str, program: &str) -> Result<PathBuf, Box<dyn Error>> {
    let output = Program::Cargo
        .command()?
        .args(["build", "--quiet", "--release", "--package", package, "--bin", program])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("{program} does not build").into());
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut executables = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message.get("executable")?.as_str()?))
    });
    executables.next_back().ok_or_else(|| format!("cargo did not say where {program} is").into())
}
