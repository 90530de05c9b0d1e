//! Which kind of host this machine needs.

use std::path::Path;

use serde::Deserialize;

use super::error::{LabError, at};
use crate::built;

/// Overrides the choice: `lab` or `local`.
const OVERRIDE: &str = "FTVMM_BACKEND";

/// What a lab's hosts are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Machines emulated by QEMU, for a machine without a usable KVM.
    Lab,
    /// Namespaces of this machine, whose KVM the guests then use.
    Local,
}

/// The part of `ftvmm doctor --json` that decides.
#[derive(Debug, Deserialize)]
struct Diagnosis {
    suitable: bool,
    interpreted: bool,
    summary: String,
}

/// Asks `ftvmm doctor` whether guests can run on this machine; says which backend and why.
///
/// # Errors
/// [`LabError::NoDiagnosis`] when the doctor does not answer with the agreed JSON,
/// [`LabError::UnknownBackend`] when the override is misspelt.
pub fn choose_backend(ftvmm: &Path) -> Result<(Backend, String), LabError> {
    match std::env::var(OVERRIDE) {
        Ok(named) => Ok((backend_named(&named)?, format!("{OVERRIDE}={named}"))),
        Err(_) => diagnosed(ftvmm),
    }
}

fn backend_named(name: &str) -> Result<Backend, LabError> {
    match name {
        "lab" => Ok(Backend::Lab),
        "local" => Ok(Backend::Local),
        _ => Err(LabError::UnknownBackend { got: name.to_owned() }),
    }
}

fn diagnosed(ftvmm: &Path) -> Result<(Backend, String), LabError> {
    // Exit status 1 only repeats `"suitable": false`.
    let said = built(ftvmm).args(["doctor", "--json"]).output().map_err(at(ftvmm))?;
    let diagnosis: Diagnosis = serde_json::from_slice(&said.stdout).map_err(|error| {
        let errors = String::from_utf8_lossy(&said.stderr);
        let reason = format!("`{} doctor --json`: {error}; {errors}", ftvmm.display());
        LabError::NoDiagnosis { reason }
    })?;
    // A host that interprets its guests is slower than an emulated one, which translates them.
    let local = diagnosis.suitable && !diagnosis.interpreted;
    let backend = if local { Backend::Local } else { Backend::Lab };
    Ok((backend, diagnosis.summary))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn doctor(answer: &str) -> Result<(Backend, String), LabError> {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("ftvmm");
        fs::write(&program, format!("#!/bin/sh\necho '{answer}'\nexit 1\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        diagnosed(&program)
    }

    #[test]
    fn the_doctor_decides_and_gives_the_reason() {
        let unfit =
            doctor(r#"{"suitable": false, "interpreted": false, "summary": "no svm", "more": 1}"#)
                .unwrap();
        assert_eq!(unfit, (Backend::Lab, "no svm".to_owned()));
        let fit = doctor(r#"{"suitable": true, "interpreted": false, "summary": "fine"}"#).unwrap();
        assert_eq!(fit, (Backend::Local, "fine".to_owned()));
        let slow = doctor(r#"{"suitable": true, "interpreted": true, "summary": "slow"}"#).unwrap();
        assert_eq!(slow, (Backend::Lab, "slow".to_owned()));
        assert!(matches!(doctor("hello"), Err(LabError::NoDiagnosis { .. })));
    }

    #[test]
    fn only_two_backends_have_names() {
        assert_eq!(backend_named("lab").unwrap(), Backend::Lab);
        assert_eq!(backend_named("local").unwrap(), Backend::Local);
        assert!(backend_named("qemu").is_err());
    }
}
