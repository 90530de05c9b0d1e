//! A client on the outer machine, waited for no longer than the lab makes any sound.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use super::error::{LabError, at};
use super::link::Output;
use super::watch::Watch;

/// How often the client is looked at: shorter than a person notices, longer than it costs.
const LOOK_EVERY: Duration = Duration::from_millis(5);

pub(crate) fn run(
    mut command: Command,
    program: &str,
    folder: &Path,
    watch: &Watch,
    silence: Duration,
) -> Result<Output, LabError> {
    let number = watch.next_number();
    let name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
    let log = |stream: &str| folder.join(format!("client-{number:03}-{name}.{stream}"));
    let logs = [log("stdout"), log("stderr")];
    let [stdout, stderr] = logs.each_ref().map(|log| create(log, watch));
    command.stdin(Stdio::null()).stdout(stdout?).stderr(stderr?);
    watch.touch();
    let child = command.spawn().map_err(at(program))?;
    let status = wait(child, program, watch, silence)?;
    let [stdout, stderr] = logs.map(|log| fs::read(&log).map_err(at(&log)));
    Ok(Output { ended: status.into(), stdout: stdout?, stderr: stderr? })
}

fn create(log: &PathBuf, watch: &Watch) -> Result<File, LabError> {
    watch.follow(log);
    File::create(log).map_err(at(log))
}

fn wait(
    mut child: Child,
    program: &str,
    watch: &Watch,
    silence: Duration,
) -> Result<ExitStatus, LabError> {
    loop {
        if let Some(status) = child.try_wait().map_err(at(program))? {
            return Ok(status);
        }
        if watch.silence() > silence {
            // Both fail only when it has ended by itself after all.
            let _ = child.kill();
            let _ = child.wait();
            let doing = format!("waiting for the client {program}");
            return Err(LabError::Silent { silence, doing, tails: watch.tails() });
        }
        thread::sleep(LOOK_EVERY);
    }
}
