//! Keeps the report of a divergence as a file.

use std::path::Path;

use ftvmm_replication::session::incident::IncidentReport;

/// Writes the report to a file in `folder` that names the reporter and the term; a folder that cannot be
/// written leaves it to the log.
pub fn keep(folder: &Path, report: &IncidentReport) {
    let name = format!("ftvmm-incident-{}-term-{}.txt", report.reporter, report.term);
    let path = folder.join(name);
    tracing::error!(cause = %report.cause, path = %path.display(), "divergence");
    if let Err(error) = std::fs::write(&path, report.to_string()) {
        tracing::error!(%error, "the incident report cannot be written; it follows\n{report}");
    }
}
