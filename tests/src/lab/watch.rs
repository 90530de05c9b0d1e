//! The watchdog: knows when anything was last heard, and what was said last.
//!
//! A lab is alive while a console file grows or the agent sends bytes. Waiting is always bounded
//! by silence, never by total time: emulated machines are slow by an unknown factor, but a stuck
//! one is mute.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;

const TAIL_BYTES: u64 = 2048;
const TAIL_LINES: usize = 15;

/// Hears all hosts of one lab.
pub(crate) struct Watch {
    began: Instant,
    numbered: AtomicU32,
    heard: Mutex<Heard>,
}

struct Heard {
    last: Instant,
    /// Every log of the lab with its length in bytes when last looked at.
    logs: BTreeMap<PathBuf, u64>,
}

impl Watch {
    pub(crate) fn new() -> Self {
        let began = clock::now();
        let numbered = AtomicU32::new(0);
        Self { began, numbered, heard: Mutex::new(Heard { last: began, logs: BTreeMap::new() }) }
    }

    /// Time since the lab began.
    pub(crate) fn age(&self) -> Duration {
        clock::now().duration_since(self.began)
    }

    /// A number for what is run next anywhere in the lab, so that no two logs share a name and
    /// their names sort by time, over restarts of a host too.
    pub(crate) fn next_number(&self) -> u32 {
        self.numbered.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was heard just now.
    pub(crate) fn touch(&self) {
        self.heard().last = clock::now();
    }

    /// Counts the growth of this file as a sign of life and shows its tail in reports.
    pub(crate) fn follow(&self, log: &Path) {
        self.heard().logs.entry(log.to_owned()).or_default();
    }

    /// Ends [`Self::follow`].
    pub(crate) fn leave(&self, log: &Path) {
        self.heard().logs.remove(log);
    }

    /// How long nothing was heard.
    pub(crate) fn silence(&self) -> Duration {
        let mut heard = self.heard();
        let mut grew = false;
        for (path, length) in &mut heard.logs {
            let now = fs::metadata(path).map_or(0, |metadata| metadata.len());
            grew |= now != *length;
            *length = now;
        }
        if grew {
            heard.last = clock::now();
        }
        clock::now().duration_since(heard.last)
    }

    /// The last lines of every log that says anything.
    pub(crate) fn tails(&self) -> String {
        let logs: Vec<PathBuf> = self.heard().logs.keys().cloned().collect();
        let shown = logs.iter().filter_map(|log| Some((log, tail(log)?)));
        shown.map(|(log, tail)| format!("--- {}\n{tail}\n", log.display())).collect()
    }
}

fn tail(log: &Path) -> Option<String> {
    let mut file = fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    (!lines.is_empty()).then(|| lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_counts_while_it_is_followed() {
        const LONG: Duration = Duration::from_secs(60);
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let watch = Watch::new();
        let silence_after = |content: &str| {
            watch.heard().last -= LONG;
            fs::write(&log, content).unwrap();
            watch.silence()
        };
        watch.follow(&log);
        assert!(silence_after("1") < LONG);
        assert!(silence_after("2") >= LONG, "it did not grow");
        assert!(silence_after("33") < LONG);
        watch.leave(&log);
        assert!(silence_after("444") >= LONG);
    }
}
