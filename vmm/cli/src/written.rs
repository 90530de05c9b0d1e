//! What a run writes when it has ended: its report and its profile. Their folders are held from the
//! start.

use std::path::Path;

use ftvmm_host::folder::Place;
use ftvmm_host::profile;
use ftvmm_host::user_file;
use serde::Serialize;
use serde_json::Value;

use super::CommandError;
use super::args::WrittenArgs;
use crate::report::Report;

const REPORT: &str = "report";
const PROFILE: &str = "profile";
/// Longer than a report with every MSR in it, and than a profile.
const BYTES_MAX: u64 = 1 << 24;

/// Where it goes.
#[derive(Debug, Default)]
pub struct Written {
    /// Of `--report`.
    pub report: Option<Place>,
    /// Of `--profile`.
    pub profile: Option<Place>,
}

impl Written {
    /// The places. Refuses to write over anything but what an earlier run wrote there, unless the
    /// user says so.
    ///
    /// # Errors
    /// When a file is there, or its folder is not.
    pub fn places(args: &WrittenArgs) -> Result<Self, CommandError> {
        let WrittenArgs { report, profile, overwrite } = args;
        let place = |what, path: Option<&Path>, is_ours: fn(&Value) -> bool| {
            let Some(path) = path else { return Ok(None) };
            user_file::may_replace(what, path, *overwrite || holds(what, path, is_ours))?;
            Place::of(path).map(Some).map_err(unusable(what, path))
        };
        Ok(Self {
            report: place(REPORT, report.as_deref(), is_report)?,
            profile: place(PROFILE, profile.as_deref(), is_profile)?,
        })
    }

    /// Writes what is asked for of a run that has ended.
    ///
    /// # Errors
    /// When a file cannot be written; the other one is.
    pub fn write(&self, report: &Report) -> Result<(), CommandError> {
        let written = write_json(REPORT, self.report.as_ref(), report);
        let profile = profile::so_far();
        written.and(profile.map_or(Ok(()), |it| write_json(PROFILE, self.profile.as_ref(), &it)))
    }
}

fn write_json(
    what: &'static str,
    place: Option<&Place>,
    of: &impl Serialize,
) -> Result<(), CommandError> {
    let Some(place) = place else { return Ok(()) };
    let text = serde_json::to_string_pretty(of).unwrap_or_default();
    place.replace((text + "\n").as_bytes()).map_err(unusable(what, &place.path()))
}

fn unusable(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CommandError {
    let path = path.to_owned();
    move |cause| CommandError::File { what, path, cause }
}

/// Whether a file is what an earlier run wrote.
fn holds(what: &'static str, path: &Path, is_ours: fn(&Value) -> bool) -> bool {
    let text = user_file::read(what, path, BYTES_MAX, "none is so long");
    let json = text.ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    json.is_some_and(|json| is_ours(&json))
}

fn is_report(json: &Value) -> bool {
    json["role"].is_string() && json["exits"].is_u64()
}

fn is_profile(json: &Value) -> bool {
    json["threads"].is_object() && json["cpu_ns"].is_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(report: &Path, overwrite: bool) -> Result<Written, CommandError> {
        let report = Some(report.to_owned());
        Written::places(&WrittenArgs { report, overwrite, ..WrittenArgs::default() })
    }

    #[test]
    fn a_report_replaces_a_report_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report");
        let written = places(&path, false).unwrap();
        let report = Report { role: "solo", exits: 7, ..Report::default() };
        written.write(&report).unwrap();
        places(&path, false).unwrap();
        let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((json["role"].as_str(), json["exits"].as_u64()), (Some("solo"), Some(7)));
        for other in ["notes", "{}", r#"{"role":"solo"}"#, r#"{"role":1,"exits":7}"#] {
            std::fs::write(&path, other).unwrap();
            assert_eq!(places(&path, false).unwrap_err().status(), 2, "{other}");
            places(&path, true).unwrap();
        }
        Written::places(&WrittenArgs::default()).unwrap();
    }

    #[test]
    fn a_report_lies_in_the_folder_that_was_checked_wherever_that_is_at_the_end() {
        let around = tempfile::tempdir().unwrap();
        let [before, after] = ["before", "after"].map(|name| around.path().join(name));
        std::fs::create_dir(&before).unwrap();
        let written = places(&before.join("report"), false).unwrap();
        std::fs::rename(&before, &after).unwrap();
        written.write(&Report { role: "solo", ..Report::default() }).unwrap();
        assert!(holds(REPORT, &after.join("report"), is_report) && !before.exists());
        std::fs::remove_dir_all(&after).unwrap();
        let error = written.write(&Report::default()).unwrap_err();
        assert_eq!(error.status(), 2);
        assert!(error.to_string().contains("report '") && !error.to_string().contains('\n'));
    }
}
