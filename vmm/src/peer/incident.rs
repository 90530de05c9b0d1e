//! Keeps the report of a divergence as a file.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ftvmm_replication::session::incident::IncidentReport;

use crate::user_file::SECRET;

/// Further reports of one reporter in one term.
const REPORTS_MAX: u32 = 1000;

/// Writes the report to a new file in `folder` that names the reporter and the term; a folder that cannot be
/// written leaves it to the log. May block, so not under a lock.
pub fn keep(folder: &Path, report: &IncidentReport) {
    match write_new(folder, report) {
        Ok(path) => {
            tracing::error!(cause = %report.cause, path = %path.display(), "divergence");
        }
        Err(error) => {
            let folder = folder.display();
            tracing::error!(%error, %folder, "the incident report cannot be written; it follows\n{report}");
        }
    }
}

fn write_new(folder: &Path, report: &IncidentReport) -> io::Result<PathBuf> {
    for number in 1..=REPORTS_MAX {
        let suffix = if number == 1 { String::new() } else { format!("-{number}") };
        let name = format!("ftvmm-incident-{}-term-{}{suffix}.txt", report.reporter, report.term);
        let path = folder.join(name);
        // Its frames are the guest's: nobody but the owner reads them.
        match File::options().write(true).create_new(true).mode(SECRET).open(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            file => return file?.write_all(report.to_string().as_bytes()).map(|()| path),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}
