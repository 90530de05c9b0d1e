//! The lab's end of the stream to one host's agent, and the commands that run over it.
//!
//! A reader thread per link files every report under its command and wakes all waiters. Output is
//! kept in memory and in a log file per stream, `<host>-<number>-<program>.stdout|stderr`. When
//! the stream ends the link is gone for good; a restarted host gets a new one.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::error::{LabError, at};
use super::protocol::{
    CHUNK_BYTES, CommandId, Ended, Report, Request, Start, Stream, read_frame, write_frame,
};
use super::watch::Watch;

/// How often a waiter looks at the consoles while no report comes.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// One host's agent.
pub(crate) struct Link {
    host: String,
    folder: PathBuf,
    watch: Arc<Watch>,
    requests: Mutex<File>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ready: bool,
    gone: bool,
    commands: BTreeMap<CommandId, CommandState>,
}

#[derive(Default)]
struct CommandState {
    log: PathBuf,
    forward: bool,
    pid: Option<u32>,
    refused: Option<String>,
    stdout: Captured,
    stderr: Captured,
    ended: Option<Ended>,
}

#[derive(Default)]
struct Captured {
    bytes: Vec<u8>,
    file: Option<File>,
}

impl Link {
    pub(crate) fn new(
        host: &str,
        folder: &Path,
        watch: &Arc<Watch>,
        stream: impl Into<OwnedFd>,
    ) -> Result<Arc<Self>, LabError> {
        Self::after_mark(host, folder, watch, stream, &[])
    }

    /// As [`Self::new`], for a stream on which the agent may be heard after other things: its
    /// reports follow `mark`.
    pub(crate) fn after_mark(
        host: &str,
        folder: &Path,
        watch: &Arc<Watch>,
        stream: impl Into<OwnedFd>,
        mark: &'static [u8],
    ) -> Result<Arc<Self>, LabError> {
        let stream = File::from(stream.into());
        let mut reports = stream.try_clone().map_err(at("agent stream"))?;
        let link = Arc::new(Self {
            host: host.to_owned(),
            folder: folder.to_owned(),
            watch: Arc::clone(watch),
            requests: Mutex::new(stream),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let reader = Arc::clone(&link);
        thread::spawn(move || {
            if skip_to(&mut reports, mark).is_ok() {
                while let Ok(Some(report)) = read_frame(&mut reports) {
                    reader.on_report(report);
                }
            }
            reader.state().gone = true;
            reader.changed.notify_all();
        });
        Ok(link)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn on_report(&self, report: Report) {
        self.watch.touch();
        let mut state = self.state();
        match report {
            Report::Ready => state.ready = true,
            Report::Started(id, pid) => {
                state.commands.entry(id).and_modify(|command| command.pid = Some(pid));
            }
            Report::Refused(id, reason) => {
                state.commands.entry(id).and_modify(|command| command.refused = Some(reason));
            }
            Report::Output(id, stream, bytes) => {
                if let Some(command) = state.commands.get_mut(&id) {
                    command.on_output(stream, &bytes, &self.watch);
                }
            }
            Report::Ended(id, ended) => {
                self.note(id, &format!("{ended:?}"));
                state.commands.entry(id).and_modify(|command| command.ended = Some(ended));
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Adds a line to the list of what was run on this host and how it ended.
    fn note(&self, id: CommandId, text: &str) {
        let path = self.folder.join(format!("{}-commands.log", self.host));
        let file = OpenOptions::new().create(true).append(true).open(path);
        let age_s = self.watch.age().as_secs_f64();
        // Only people read it; what the tests judge is kept in memory.
        let _ = file.and_then(|mut file| writeln!(file, "{age_s:10.3} {id:03} {text}"));
    }

    /// Waits until `look` finds what it wants, the host is gone or the lab is silent for too long.
    fn wait_until<T>(
        &self,
        doing: &str,
        silence: Duration,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, LabError> {
        let mut state = self.state();
        loop {
            if let Some(found) = look(&mut state) {
                return Ok(found);
            }
            let doing = || doing.to_owned();
            if state.gone {
                let host = self.host.clone();
                return Err(LabError::HostGone { host, doing: doing(), tails: self.watch.tails() });
            }
            if self.watch.silence() > silence {
                return Err(LabError::Silent {
                    silence,
                    doing: doing(),
                    tails: self.watch.tails(),
                });
            }
            let woken = self.changed.wait_timeout(state, LOOK_EVERY);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn wait_ready(&self, silence: Duration) -> Result<(), LabError> {
        self.wait_until("booting", silence, |state| state.ready.then_some(()))
    }

    fn send(&self, request: &Request) {
        let mut stream = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        // A stream that no longer takes requests has ended for the reader too, which says so.
        let _ = write_frame(&mut *stream, request);
    }

    pub(crate) fn spawn(
        self: &Arc<Self>,
        start: Start,
        forward: bool,
        silence: Duration,
    ) -> Result<LabProcess, LabError> {
        let program = start.argv.first().cloned().unwrap_or_default();
        let id = self.watch.next_number();
        let base = Path::new(&program).file_name().unwrap_or_default().to_string_lossy();
        let log = self.folder.join(format!("{}-{id:03}-{base}", self.host));
        let command = CommandState { log, forward, ..CommandState::default() };
        self.state().commands.insert(id, command);
        self.note(id, &start.argv.join(" "));
        self.send(&Request::Start(id, start));
        let doing = format!("starting {program}");
        let started = self.wait_until(&doing, silence, |state| {
            let command = state.commands.get_mut(&id)?;
            command.pid.map(Ok).or_else(|| command.refused.take().map(Err))
        })?;
        let host = self.host.clone();
        match started {
            Ok(pid) => Ok(LabProcess { link: Arc::clone(self), id, pid, program, silence }),
            Err(reason) => Err(LabError::Refused { host, program, reason }),
        }
    }
}

impl CommandState {
    fn on_output(&mut self, stream: Stream, bytes: &[u8], watch: &Watch) {
        let (captured, suffix) = match stream {
            Stream::Stdout => (&mut self.stdout, "stdout"),
            Stream::Stderr => (&mut self.stderr, "stderr"),
        };
        if captured.file.is_none() {
            let path = PathBuf::from(format!("{}.{suffix}", self.log.display()));
            watch.follow(&path);
            captured.file = OpenOptions::new().create(true).append(true).open(&path).ok();
        }
        if let Some(file) = &mut captured.file {
            // The copy in memory is the one that is judged; the file is for people.
            let _ = file.write_all(bytes);
        }
        if self.forward {
            let _ = match stream {
                Stream::Stdout => write_through(std::io::stdout().lock(), bytes),
                Stream::Stderr => write_through(std::io::stderr().lock(), bytes),
            };
        }
        captured.bytes.extend_from_slice(bytes);
    }
}

/// Reads up to and with `mark`.
fn skip_to(stream: &mut impl Read, mark: &[u8]) -> std::io::Result<()> {
    let mut last = Vec::new();
    while last != mark {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        last.push(byte[0]);
        let surplus = last.len().saturating_sub(mark.len());
        last.drain(..surplus);
    }
    Ok(())
}

fn write_through(mut to: impl Write, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// What a finished command left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub ended: Ended,
    /// All it wrote to standard output.
    pub stdout: Vec<u8>,
    /// All it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without the final newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }
}

/// A command running on a host. Dropping it kills its whole process group.
pub struct LabProcess {
    link: Arc<Link>,
    id: CommandId,
    pid: u32,
    program: String,
    silence: Duration,
}

impl LabProcess {
    /// Process id, as the host counts.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Replaces the lab's bound of silence for all further waits on this command.
    pub fn with_silence(mut self, silence: Duration) -> Self {
        self.silence = silence;
        self
    }

    /// Queues bytes for its standard input.
    pub fn write_stdin(&self, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.link.send(&Request::Stdin(self.id, chunk.to_vec()));
        }
    }

    /// Ends its standard input after what was queued.
    pub fn close_stdin(&self) {
        self.link.send(&Request::CloseStdin(self.id));
    }

    /// Sends a signal, by number, to its process group.
    pub fn signal(&self, signal: i32) {
        self.link.send(&Request::Signal(self.id, signal));
    }

    /// Sends SIGKILL to its process group; [`Self::wait`] then tells the end.
    pub fn kill(&self) {
        self.signal(nix::libc::SIGKILL);
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> Vec<u8> {
        self.captured(|command| command.stdout.bytes.clone())
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> Vec<u8> {
        self.captured(|command| command.stderr.bytes.clone())
    }

    fn captured(&self, pick: impl FnOnce(&CommandState) -> Vec<u8>) -> Vec<u8> {
        self.link.state().commands.get(&self.id).map(pick).unwrap_or_default()
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        self.link.state().commands.get(&self.id)?.ended
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`LabError::HostGone`], or [`LabError::Silent`] after the lab's bound of silence.
    pub fn wait(&self) -> Result<Ended, LabError> {
        let doing = format!("waiting for the end of {}", self.program);
        self.link.wait_until(&doing, self.silence, |state| state.commands.get(&self.id)?.ended)
    }

    /// Waits until `wanted` appears in its standard output or it ends; true when it appeared.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_for_stdout(&self, wanted: &str) -> Result<bool, LabError> {
        self.wait_for(wanted, |command| &command.stdout.bytes)
    }

    /// As [`Self::wait_for_stdout`], in its standard error.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_for_stderr(&self, wanted: &str) -> Result<bool, LabError> {
        self.wait_for(wanted, |command| &command.stderr.bytes)
    }

    fn wait_for(
        &self,
        wanted: &str,
        written: impl Fn(&CommandState) -> &Vec<u8>,
    ) -> Result<bool, LabError> {
        let doing = format!("waiting for {wanted:?} from {}", self.program);
        let needle = wanted.as_bytes();
        // Only what came since the last look is searched, with an overlap of one needle.
        let mut searched = 0_usize;
        self.link.wait_until(&doing, self.silence, |state| {
            let command = state.commands.get(&self.id)?;
            let bytes = written(command);
            let from = searched.saturating_sub(needle.len());
            if bytes[from..].windows(needle.len().max(1)).any(|window| window == needle) {
                return Some(true);
            }
            searched = bytes.len();
            command.ended.map(|_| false)
        })
    }

    /// Ends its standard input, waits for its end and hands over all it wrote.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn finish(self) -> Result<Output, LabError> {
        self.close_stdin();
        let ended = self.wait()?;
        Ok(Output { ended, stdout: self.stdout(), stderr: self.stderr() })
    }
}

impl Drop for LabProcess {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.kill();
        }
        self.link.state().commands.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_before_the_mark_is_skipped() {
        let mut stream = &b"no\xff MARMARKS"[..];
        skip_to(&mut stream, b"MARK").unwrap();
        assert_eq!(stream, b"S");
        skip_to(&mut stream, b"").unwrap();
        assert_eq!(stream, b"S");
        assert!(skip_to(&mut stream, b"MARK").is_err());
    }
}
