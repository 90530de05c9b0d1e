//! Recordings as files: creating and opening them, and their error messages.

use std::io::{BufReader, Read};
use std::path::Path;

use ftvmm_host::{WriteBehind, user_file};
use ftvmm_replication::{LogError, LogHeader, LogReader, LogWriter, Ordinal};
use ftvmm_runtime::input::{FileLog, FinishedLog, OnRecordError, Recording};

use super::{CommandError, host};

/// A recording that `path` is made for; refuses a path it cannot write before the guest has run.
pub fn create_log(
    path: &Path,
    overwrite: bool,
    on_error: OnRecordError,
    header: &LogHeader,
) -> Result<Recording, CommandError> {
    let file = user_file::create("recording", path, overwrite)?;
    let file = WriteBehind::start(file).map_err(host("thread for the recording"))?;
    let writer = LogWriter::new(file, header)
        .map_err(|e| CommandError::Recording { path: path.into(), why: e.to_string() })?;
    let left = header.start.as_ref().map_or(Ordinal(0), |start| start.at.previous());
    Ok(FileLog::new(writer, left, path, on_error))
}

/// Opens a recording and reads its header.
///
/// # Errors
/// When the file is none, or from another version.
pub fn open_log(path: &Path) -> Result<LogReader<Box<dyn Read>>, CommandError> {
    let file = user_file::open("recording", path)?;
    LogReader::new(Box::new(BufReader::new(file)) as Box<dyn Read>)
        .map_err(|e| CommandError::Recording { path: path.into(), why: e.to_string() })
}

/// What to say of a recording that cannot be read to its end.
pub fn damaged(path: &Path) -> impl Fn(LogError) -> CommandError {
    move |e| CommandError::Recording { path: path.into(), why: e.to_string() }
}

/// A recording that was wanted and is not there as a whole is a failure, however well the guest
/// ended.
///
/// # Errors
/// What the host said when it was written.
pub fn complete(recording: Option<FinishedLog>) -> Result<(), CommandError> {
    recording.and_then(|recording| recording.broken).map_or(Ok(()), |broken| Err(broken.into()))
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use ftvmm_devices::Input;
    use ftvmm_replication::{Event, Record};
    use ftvmm_runtime::input::LogSink;
    use ftvmm_runtime::testing::header;

    use super::*;

    /// A recording in `folder` with the guest time `now_ns` at each exit from 1 on.
    pub(crate) fn recorded(folder: &Path, name: &str, times_ns: &[u64]) -> PathBuf {
        let path = folder.join(name);
        let mut log = create_log(&path, false, OnRecordError::Stop, &header()).unwrap();
        let exits = (1..).map(Ordinal);
        for (at, now_ns) in exits.zip(times_ns) {
            let event = Event::Input(Input::Time { now_ns: *now_ns });
            log.append(&Record { at, event }).unwrap();
            log.exit_complete(at).unwrap();
        }
        let left = Ordinal(times_ns.len() as u64 + 1);
        assert!(log.finish(left, None).broken.is_none());
        path
    }

    #[test]
    fn what_was_recorded_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = recorded(folder.path(), "log", &[10, 20]);
        let mut reader = open_log(&path).unwrap();
        assert_eq!(*reader.header(), header());
        let mut records = Vec::new();
        while let Some(group) = reader.next_group().unwrap() {
            records.extend(group.records.into_iter().map(|record| record.to_string()));
        }
        assert_eq!(records.len(), 2, "{records:?}");
        let refused = create_log(&path, false, OnRecordError::Stop, &header());
        assert!(matches!(refused.err(), Some(CommandError::Named(_))));
    }

    #[test]
    fn a_file_that_is_no_recording_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes");
        for content in ["", "dear diary, today"] {
            std::fs::write(&path, content).unwrap();
            let error = open_log(&path).err().unwrap();
            assert!(matches!(&error, CommandError::Recording { path: p, .. } if *p == path));
            assert_eq!(error.status(), 2, "{error}");
        }
    }
}
