//! A recording and its replay: what must be equal, and what is kept when it is not.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use crate::guest_run::{Finished, GuestLab, GuestRunError, Report};

/// What two runs of one guest left.
#[derive(Debug)]
pub struct Replayed {
    /// The run that wrote the log.
    pub recorded: Finished,
    /// The run that read it.
    pub replayed: Finished,
}

impl Replayed {
    /// Replays `<name>.log`, which `recorded` wrote, and keeps both consoles beside it.
    ///
    /// # Errors
    /// What the lab or the file system said.
    pub fn after(site: &GuestLab, name: &str, recorded: Finished) -> Result<Self, GuestRunError> {
        let replayed = site.replay(&format!("{name}-replayed"), &format!("{name}.log"), &[])?;
        site.write(&format!("{name}-recorded.console"), &recorded.console)?;
        site.write(&format!("{name}-replayed.console"), &replayed.console)?;
        Ok(Self { recorded, replayed })
    }

    /// What differs between the two; `None` when nothing does.
    pub fn difference(&self) -> Option<String> {
        difference(&self.recorded, &self.replayed)
    }
}

/// What differs between a recorded run and a replay; `None` when nothing does.
pub fn difference(recorded: &Finished, replayed: &Finished) -> Option<String> {
    for (what, half) in [("recorded", recorded), ("replayed", replayed)] {
        if !half.ended.success() {
            let said = half.errors.trim_end();
            return Some(format!("the {what} run ended with {:?}: {said}", half.ended));
        }
    }
    let same_console = recorded.console == replayed.console;
    let (Some(recorded), Some(replayed)) = (&recorded.report, &replayed.report) else {
        return Some("a report is missing".to_owned());
    };
    if recorded.state_digest.is_none() {
        return Some("the recording ended between two exits".to_owned());
    }
    let facts = |r: &Report| {
        [
            ("state digest", r.state_digest.clone().unwrap_or_default()),
            ("exits", r.exits.to_string()),
            ("inputs", r.inputs.to_string()),
            ("outputs", r.outputs.to_string()),
        ]
    };
    let mut differences: Vec<String> = facts(recorded)
        .into_iter()
        .zip(facts(replayed))
        .filter(|(recorded, replayed)| recorded != replayed)
        .map(|((what, a), (_, b))| format!("{what}: recorded {a}, replayed {b}"))
        .collect();
    if !same_console {
        differences.push("console output".to_owned());
    }
    (!differences.is_empty()).then(|| differences.join("; "))
}

impl fmt::Display for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(report) = &self.recorded.report else {
            return f.write_str("no report");
        };
        let Report { exits, inputs, outputs, log_bytes, state_digest, .. } = report;
        write!(
            f,
            "{exits} exits, {inputs} inputs, {outputs} frames sent, log {log_bytes} bytes, \
             state {:.16}",
            state_digest.as_deref().unwrap_or("unknown")
        )
    }
}

/// Puts all that belongs to `name`, and what it takes to replay it, into a folder of its own below
/// `folder`; returns the command that does it.
///
/// # Errors
/// What the file system said.
pub fn keep(site: &GuestLab, folder: &Path, name: &str) -> io::Result<String> {
    let folder = folder.join(name);
    fs::create_dir_all(&folder)?;
    for entry in fs::read_dir(site.lab.share())? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        if file.starts_with(name) || site.is_image(&path) {
            fs::copy(&path, folder.join(&*file))?;
        }
    }
    fs::copy(site.lab.share().join("bin/ftvmm"), folder.join("ftvmm"))?;
    Ok(format!(
        "cargo xtask lab --no-ftvmm --copy {}/* -- ftvmm replay /share/bin/{name}.log \
         --kernel /share/bin/bzImage --initrd /share/bin/initramfs.cpio",
        folder.display()
    ))
}
