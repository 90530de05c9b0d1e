//! A log sink that is a file.
//!
//! The file is as complete as possible however the run ends. When this is dropped, the records so
//! far are written without an end record, so that a run that failed can be replayed to the point of
//! the failure.

use std::io::Write;
use std::path::{Path, PathBuf};

use ftvmm_devices::Input;
use ftvmm_replication::{End, Event, GroupEncoder, LogError, LogWriter, Ordinal, Record};

use super::log_sink::LogSink;
use crate::input_error::InputError;

/// A group is closed when it holds this much, ...
const GROUP_BYTES: u64 = 64 * 1024;
/// ... or when its guest time spans this much, in nanoseconds, so that a torn file loses little,
/// ...
const GROUP_NS: u64 = 1_000_000_000;
/// ... or when the guest went through this many exits without looking at a clock.
const GROUP_EXITS: u64 = 4096;

/// What a recording that cannot be written leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRecordError {
    /// The guest stops.
    Stop,
    /// The guest goes on, unrecorded.
    Continue,
}

/// Writes a recording.
pub struct FileLog<W: Write> {
    writer: LogWriter<W>,
    path: PathBuf,
    on_error: OnRecordError,
    /// Why nothing is written any more.
    broken: Option<InputError>,
    group: GroupEncoder,
    group_since: Ordinal,
    /// Guest time at which the group began, and the last one seen.
    group_since_ns: u64,
    now_ns: u64,
    complete: Ordinal,
    finished: bool,
}

/// A recording that is complete, or as complete as it could be.
#[derive(Debug)]
pub struct FinishedLog {
    /// Its length.
    pub bytes: u64,
    /// Why it is not complete.
    pub broken: Option<InputError>,
}

impl<W: Write> FileLog<W> {
    /// A log that goes to `writer`, whose header is written, of a guest that has completed exit
    /// `complete`. `path` is where it lies.
    pub fn new(
        writer: LogWriter<W>,
        complete: Ordinal,
        path: &Path,
        on_error: OnRecordError,
    ) -> Self {
        Self {
            writer,
            path: path.into(),
            on_error,
            broken: None,
            group: GroupEncoder::new(),
            group_since: complete,
            group_since_ns: 0,
            now_ns: 0,
            complete,
            finished: false,
        }
    }

    /// Writes how the guest ended, if it ended where a replay can end too, and closes the file.
    /// `at` is the first exit the guest did not get past.
    pub fn finish(mut self, at: Ordinal, end: Option<End>) -> FinishedLog {
        self.finished = true;
        if let Some(end) = end
            && self.broken.is_none()
        {
            self.group.push(&Record { at, event: Event::End(end) });
        }
        // A failure is kept and reported at the end, also when the guest continues without a
        // recording.
        let failed = self.close().err();
        FinishedLog { bytes: self.writer.written_bytes(), broken: failed.or(self.broken.take()) }
    }

    /// Closes the file of a run that failed: what was recorded up to there is in it, without an
    /// end.
    pub fn abandon(mut self) -> FinishedLog {
        let failed = self.close_unless_finished();
        FinishedLog { bytes: self.writer.written_bytes(), broken: failed.or(self.broken.take()) }
    }

    fn close_unless_finished(&mut self) -> Option<InputError> {
        let finished = std::mem::replace(&mut self.finished, true);
        if finished { None } else { self.close().err() }
    }

    fn close_group(&mut self) -> Result<(), InputError> {
        if self.broken.is_some() {
            return Ok(());
        }
        self.group_since = self.complete;
        self.group_since_ns = self.now_ns;
        let group = self.group.finish(self.complete);
        self.writer.write_group(&group).or_else(|cause| self.fail(cause))
    }

    /// The last group, and all that the file has not taken yet.
    fn close(&mut self) -> Result<(), InputError> {
        self.close_group()?;
        if self.broken.is_some() {
            return Ok(());
        }
        self.writer.flush().or_else(|cause| self.fail(cause))
    }

    fn fail(&mut self, cause: LogError) -> Result<(), InputError> {
        let error = || InputError::LogWrite { path: self.path.clone(), at: self.complete.0, cause };
        match self.on_error {
            OnRecordError::Stop => {
                self.finished = true;
                Err(error())
            }
            OnRecordError::Continue => {
                let error = error();
                tracing::error!("{error}; the guest goes on, unrecorded");
                self.broken = Some(error);
                Ok(())
            }
        }
    }
}

impl<W: Write> Drop for FileLog<W> {
    fn drop(&mut self) {
        if let Some(error) = self.close_unless_finished() {
            tracing::error!("{error}");
        }
    }
}

impl<W: Write> LogSink for FileLog<W> {
    fn append(&mut self, record: &Record) -> Result<(), InputError> {
        if self.broken.is_some() {
            return Ok(());
        }
        self.group.push(record);
        if let Event::Input(Input::Time { now_ns }) = record.event {
            self.now_ns = now_ns;
        }
        // A big slice fills several groups while the guest stands still.
        if self.group.is_full() {
            self.close_group()?;
        }
        Ok(())
    }

    fn exit_complete(&mut self, at: Ordinal) -> Result<(), InputError> {
        self.complete = at;
        let full = self.group.body_bytes() >= GROUP_BYTES;
        let old = self.now_ns - self.group_since_ns >= GROUP_NS;
        if full || old || at.0 - self.group_since.0 >= GROUP_EXITS {
            self.close_group()?;
        }
        Ok(())
    }

    fn idle(&mut self) -> Result<(), InputError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use ftvmm_replication::LogReader;

    use super::*;
    use crate::testing::header;

    /// A file on a file system with so much room.
    #[derive(Clone)]
    struct Disk {
        bytes: Arc<Mutex<Vec<u8>>>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut file = self.bytes.lock().unwrap();
            let taken = bytes.len().min(self.room - file.len());
            file.extend_from_slice(&bytes[..taken]);
            if taken == 0 { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(taken) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log(room: usize, on_error: OnRecordError) -> (Disk, FileLog<Disk>) {
        let disk = Disk { bytes: Arc::default(), room };
        let writer = LogWriter::new(disk.clone(), &header()).unwrap();
        (disk, FileLog::new(writer, Ordinal(0), Path::new("/r.log"), on_error))
    }

    fn time(at: u64) -> Record {
        let input = Input::Time { now_ns: at * 1_000_001 };
        Record { at: Ordinal(at), event: Event::Input(input) }
    }

    /// The last exit the file knows of.
    fn read(disk: &Disk) -> Ordinal {
        let bytes = disk.bytes.lock().unwrap().clone();
        let mut reader = LogReader::new(&bytes[..]).unwrap();
        let mut last = Ordinal(0);
        while let Some(group) = reader.next_group().unwrap() {
            last = group.horizon;
        }
        last
    }

    #[test]
    fn a_log_that_is_dropped_keeps_its_tail() {
        let (disk, mut log) = log(1 << 20, OnRecordError::Stop);
        for at in 1..=7 {
            log.append(&time(at)).unwrap();
            log.exit_complete(Ordinal(at)).unwrap();
        }
        assert_eq!(read(&disk), Ordinal(0), "the group is open");
        drop(log);
        assert_eq!(read(&disk), Ordinal(7));
    }

    fn fill(log: &mut FileLog<Disk>) -> Result<(), InputError> {
        (1..=100_000).try_for_each(|at| {
            log.append(&time(at))?;
            log.exit_complete(Ordinal(at))
        })
    }

    #[test]
    fn a_full_disk_stops_the_guest_or_leaves_it_alone() {
        let (disk, mut stopping) = log(2_000, OnRecordError::Stop);
        let error = fill(&mut stopping).unwrap_err().to_string();
        assert!(error.contains("'/r.log'") && error.contains("No space left"), "{error}");
        drop(stopping);
        assert!(read(&disk) > Ordinal(0));

        let (disk, mut going_on) = log(2_000, OnRecordError::Continue);
        fill(&mut going_on).unwrap();
        let FinishedLog { bytes, broken } = going_on.finish(Ordinal(100_001), None);
        let broken = broken.unwrap().to_string();
        assert!(broken.contains("No space left") && bytes <= 2_000, "{broken}");
        assert!(read(&disk) > Ordinal(0));
    }
}
