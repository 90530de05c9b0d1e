//! Keeps the report of a divergence as a file.

use std::ffi::OsStr;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::sync::Arc;

use ftvmm_host::contain::Thread;
use ftvmm_host::folder::Folder;
use ftvmm_host::sync::{lock, wait_timeout_while};
use ftvmm_replication::incident::IncidentReport;

use super::{Peer, REPORTS_LONGEST};

/// Further reports of one reporter in one term.
const REPORTS_MAX: u32 = 1000;

impl Peer {
    /// Writes an incident report on a thread of its own: its folder may be one that hangs.
    pub(super) fn keep_incident(self: &Arc<Self>, report: IncidentReport) {
        let peer = Arc::clone(self);
        let write = move || {
            write(peer.incidents.folder.as_ref(), &report);
            peer.count_incidents(|under_way| *under_way -= 1);
        };
        self.count_incidents(|under_way| *under_way += 1);
        if let Err(error) = Thread::Incident.start(write) {
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

/// Writes the report to a new file in `folder` that names the reporter and the term; if there is no
/// folder, or it cannot be written, the report is only logged. May block, so not under a lock.
fn write(folder: Option<&Folder>, report: &IncidentReport) {
    let Some(folder) = folder else {
        return tracing::error!("there is no folder for the incident report; it follows\n{report}");
    };
    match write_new(folder, report) {
        Ok(path) => {
            tracing::error!(cause = %report.cause, path = %path.display(), "divergence");
        }
        Err(error) => {
            let folder = folder.path().display();
            tracing::error!(%error, %folder, "the incident report cannot be written; it \
                follows\n{report}");
        }
    }
}

fn write_new(folder: &Folder, report: &IncidentReport) -> io::Result<PathBuf> {
    for number in 1..=REPORTS_MAX {
        let suffix = if number == 1 { String::new() } else { format!("-{number}") };
        let name = format!("ftvmm-incident-{}-term-{}{suffix}.txt", report.reporter, report.term);
        let name = OsStr::new(&name);
        // The report contains frames of the guest, so only the owner may read it.
        match folder.create_new(name) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            file => {
                file?.write_all(report.to_string().as_bytes())?;
                return Ok(folder.join(name));
            }
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use ftvmm_host::folder::SECRET;
    use ftvmm_replication::Term;
    use ftvmm_replication::incident::DivergenceCause;
    use ftvmm_replication::policy::Role;

    use super::*;

    #[test]
    fn no_incident_is_written_over_an_earlier_one_and_all_are_their_owners() {
        let around = tempfile::tempdir().unwrap();
        let [before, after] = ["before", "after"].map(|name| around.path().join(name));
        fs::create_dir(&before).unwrap();
        let folder = Folder::open(&before).unwrap();
        // It is written where the folder is by then.
        fs::rename(&before, &after).unwrap();
        let report = |description: &str| IncidentReport {
            term: Term(3),
            reporter: Role::Primary,
            cause: DivergenceCause::ReplayFault { description: description.into() },
            primary: None,
            backup: None,
        };
        let said = ["first", "second", "third"];
        let paths = said.map(|said| write_new(&folder, &report(said)).unwrap());
        let paths = paths.map(|path| after.join(path.file_name().unwrap()));
        for (path, said) in paths.iter().zip(said) {
            assert!(fs::read_to_string(path).unwrap().contains(said), "{path:?}");
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, SECRET);
        }
        assert!(paths[1].ends_with("ftvmm-incident-primary-term-3-2.txt"), "{paths:?}");
    }
}
