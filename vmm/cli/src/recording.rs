//! Recordings as files: creating and opening them, and their error messages.

use std::io::{BufReader, Read};
use std::path::Path;

use ftvmm_replication::{LogError, LogHeader, LogReader, LogWriter, Ordinal};

use super::{CommandError, host};
use ftvmm_host::WriteBehind;
use ftvmm_host::user_file;
use ftvmm_runtime::input::{FileLog, FinishedLog, OnRecordError, Recording};

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
