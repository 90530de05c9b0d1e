//! Keeps the report of a divergence as a file.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ftvmm_host::sync::{lock, wait_timeout_while};
use ftvmm_host::user_file::SECRET;
use ftvmm_replication::incident::IncidentReport;

use super::{Peer, REPORTS_LONGEST};

/// Further reports of one reporter in one term.
const REPORTS_MAX: u32 = 1000;

impl Peer {
    /// Writes an incident report on a thread of its own: its folder may be one that hangs.
    pub(super) fn keep_incident(self: &Arc<Self>, report: IncidentReport) {
        let peer = Arc::clone(self);
        let write = move || {
            write(&peer.incidents.folder, &report);
            peer.count_incidents(|under_way| *under_way -= 1);
        };
        self.count_incidents(|under_way| *under_way += 1);
        if let Err(error) = std::thread::Builder::new().name("incident".into()).spawn(write) {
            self.count_incidents(|under_way| *under_way -= 1);
            tracing::error!(%error, "no thread to keep an incident report");
        }
    }

    fn count_incidents(&self, change: impl FnOnce(&mut u32)) {
        let incidents = &self.incidents;
        change(&mut lock(&incidents.under_way));
        incidents.written.notify_all();
    }

    /// Waits until the incident reports are written, but not for a folder that hangs.
    pub fn finish_reports(&self) {
        let incidents = &self.incidents;
        let (under_way, written) = (lock(&incidents.under_way), &incidents.written);
        let left = wait_timeout_while(written, under_way, REPORTS_LONGEST, |count| *count > 0);
        if *left > 0 {
            tracing::error!("an incident report is not written yet; it is lost");
        }
    }
}

/// Writes the report to a new file in `folder` that names the reporter and the term; if the folder
/// cannot be written, the report is only logged. May block, so not under a lock.
fn write(folder: &Path, report: &IncidentReport) {
    match write_new(folder, report) {
        Ok(path) => {
            tracing::error!(cause = %report.cause, path = %path.display(), "divergence");
        }
        Err(error) => {
            let folder = folder.display();
            tracing::error!(%error, %folder, "the incident report cannot be written; it \
                follows\n{report}");
        }
    }
}

fn write_new(folder: &Path, report: &IncidentReport) -> io::Result<PathBuf> {
    for number in 1..=REPORTS_MAX {
        let suffix = if number == 1 { String::new() } else { format!("-{number}") };
        let name = format!("ftvmm-incident-{}-term-{}{suffix}.txt", report.reporter, report.term);
        let path = folder.join(name);
        // The report contains frames of the guest, so only the owner may read it.
        match File::options().write(true).create_new(true).mode(SECRET).open(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            file => return file?.write_all(report.to_string().as_bytes()).map(|()| path),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}
