//! `ftvmm replay FILE`: runs the recorded guest again and says whether it came out the same.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ftvmm_devices::Output;
use ftvmm_replication::{LogHeader, LogReader, MemoryLook, Ordinal, OutputDigest};

use super::args::ReplayArgs;
use super::beginning::Beginning;
use super::origin::{Elsewhere, described};
use super::run::{complete, create_log, end_at, recording_error, report, verdict};
use super::{CommandError, check_report, write_report};
use crate::build;
use crate::guest::{Guest, GuestConfig};
use crate::host::clock::HostClock;
use crate::host::{NetWatch, print_console};
use crate::input::{CheckPlan, InputError, LogInputs, OnRecordError, Recorded, Restored};
use crate::kvm::install_kick_handler;
use crate::report::{Extent, Report};
use crate::run_loop::{self, OutputSink, RunError};
use crate::snapshot::Snapshot;
use crate::user_file::{self, Named};

/// Opens a recording and reads its header.
///
/// # Errors
/// When the file is none, or from another version.
pub fn open_log(path: &Path) -> Result<LogReader<BufReader<File>>, CommandError> {
    let file = user_file::open("recording", path)?;
    LogReader::new(BufReader::new(file))
        .map_err(|e| CommandError::Recording { path: path.into(), why: e.to_string() })
}

/// Replays a recording.
///
/// # Errors
/// When the recording or its guest cannot be had, and when the replay diverges.
pub fn replay(args: &ReplayArgs) -> Result<(), CommandError> {
    install_kick_handler()?;
    let reader = open_log(&args.file)?;
    let other_build = build::difference(&reader.header().build);
    if let Some(difference) = &other_build {
        tracing::warn!(
            "the recording was {difference}: where the two behave differently it diverges"
        );
    }
    replay_log(args, reader).map_err(|error| explained(error, other_build.as_deref()))
}

/// A divergence, with what may be its cause: the recording is another build's.
fn explained(error: CommandError, other_build: Option<&str>) -> CommandError {
    let Some(difference) = other_build else { return error };
    let what = match error {
        CommandError::Divergence(what) => what,
        CommandError::Run(RunError::Input(InputError::Divergence { at, what })) => {
            format!("at exit {at}: {what}")
        }
        error => return error,
    };
    CommandError::Divergence(format!("{what} (the recording was {difference})"))
}

fn replay_log(args: &ReplayArgs, reader: LogReader<BufReader<File>>) -> Result<(), CommandError> {
    let header = reader.header().clone();
    let Beginning { snapshot, skip } = Beginning::of(args, &header)?;
    let config = described(
        &header,
        &Elsewhere {
            kernel: args.kernel.as_deref(),
            initramfs: args.initrd.as_deref(),
            cpu_template: args.cpu_template.as_deref(),
        },
    );
    check_files(args, &config, snapshot.as_ref())?;
    let guest = Guest::assemble(&config)?;
    if let Some(difference) = header.fingerprint.first_difference(&guest.fingerprint) {
        let why = format!("was made with another guest: {difference}");
        return Err(CommandError::Recording { path: args.file.clone(), why });
    }
    let create = |path: &PathBuf| {
        let start = snapshot.as_ref().map(|snapshot| snapshot.start().clone());
        let header = LogHeader { start, ..guest.log_header(&config) };
        create_log(path, args.overwrite, OnRecordError::Stop, &header)
    };
    let mut log = args.record.as_ref().map(create).transpose()?;
    let mut machine = guest.power_on(&config)?;
    if let Some(fault) = args.inject_fault {
        machine.schedule(fault);
    }
    let network = Arc::<NetWatch>::default();
    machine.show_network(network.clone());
    let parts = snapshot.map(Snapshot::into_parts);
    let mut inputs = LogInputs::new(reader, args.until.map(Ordinal), skip);
    let mut outputs = Replayed::default();
    let clock = HostClock::host_start();
    let result = match &mut log {
        None => {
            let mut restored = Restored::new(inputs, parts, None);
            let result = run_loop::run(&mut machine, &mut restored, &mut outputs);
            inputs = restored.into_source();
            result
        }
        Some(log) => {
            let recorded = Recorded::new(inputs, log, check_plan(args));
            let mut restored = Restored::new(recorded, parts, None);
            let result = run_loop::run(&mut machine, &mut restored, &mut outputs);
            inputs = restored.into_source().into_source();
            result
        }
    };
    let ending = match result {
        Ok(ending) => ending,
        // What a recording of it is wanted for: it ends with the check that differs.
        Err(error) => return Err(unreadable(error, args)),
    };
    let seconds = clock.host_now_ns() as f64 / 1e9;
    let end = end_at(&machine, &ending)?;
    let recorded = match inputs.was_stopped() {
        true => Ok(None),
        false => inputs.recorded_end(ending.first_incomplete()),
    };
    let extent = match (&recorded, inputs.torn()) {
        _ if inputs.was_stopped() => Extent::NotReached,
        (Ok(Some(_)) | Err(_), _) => Extent::Complete,
        (Ok(None), Some(_)) => Extent::Torn,
        (Ok(None), None) => Extent::Unfinished,
    };
    // A replay that was stopped, or had no more log, is no guest that ended.
    let has_ended = ending.by_guest() || matches!(recorded, Ok(Some(_)));
    let copy = log.map(|log| log.finish(ending.first_incomplete(), end.filter(|_| has_ended)));
    let report = Report {
        outputs: outputs.frames,
        log_bytes: inputs.bytes_read(),
        network: network.report(),
        recording: Some(extent),
        recording_error: recording_error(copy.as_ref()),
        ..report("replay", &machine, &ending, end, seconds)
    };
    write_report(args.report.as_deref(), &report)?;
    if let (Some(recorded), Some(end)) = (recorded?, &end)
        && let Some(difference) = end.difference(&recorded)
    {
        return Err(CommandError::Divergence(format!("at exit {}: {difference}", ending.at)));
    }
    verdict(&machine, &ending)?;
    complete(copy)?;
    let why = match (extent, inputs.torn()) {
        (Extent::Torn, Some(torn)) => format!("its tail is damaged ({torn})"),
        (Extent::Unfinished, _) => "it does not say how the run ended".into(),
        _ => return Ok(()),
    };
    Err(CommandError::GuestFailed(format!(
        "recording '{}' is not complete: {why}; what it has was replayed, up to exit {}",
        args.file.display(),
        ending.at
    )))
}

/// A run that failed because of a file, by the file's name.
fn unreadable(error: RunError, args: &ReplayArgs) -> CommandError {
    match error {
        RunError::Input(
            source @ (InputError::LogRead { .. }
            | InputError::LogOrder { .. }
            | InputError::SnapshotRead { .. }),
        ) => CommandError::Recording { path: args.file.clone(), why: source.to_string() },
        error => error.into(),
    }
}

/// Slices refer to the copies of memory the recorder took, so a check of our own takes none.
fn check_plan(args: &ReplayArgs) -> CheckPlan {
    CheckPlan {
        every_exits: args.check_every,
        memory_every_exits: args.check_memory_every,
        from: Ordinal(args.check_from),
        memory: MemoryLook::Digest,
    }
}

/// Refuses files that would be lost, wherever the recording says they are.
fn check_files(
    args: &ReplayArgs,
    config: &GuestConfig,
    snapshot: Option<&Snapshot>,
) -> Result<(), CommandError> {
    let named = Named::default()
        .read("the recording", Some(&args.file))
        .read("--snapshot", snapshot.map(Snapshot::path))
        .read("--kernel", Some(&config.kernel))
        .read("--initrd", config.initramfs.as_deref())
        .read("--cpu-template", Some(&config.cpu_template))
        .written("--record", args.record.as_deref())
        .written("--report", args.report.as_deref());
    named.check()?;
    check_report(args.report.as_deref(), args.overwrite)
}

#[derive(Default)]
struct Replayed {
    frames: u64,
}

impl OutputSink for Replayed {
    fn emit(
        &mut self,
        _: Ordinal,
        _: Option<OutputDigest>,
        output: Output,
    ) -> Result<(), InputError> {
        match output {
            Output::Frame(_) => self.frames += 1,
            Output::Console(bytes) => print_console(&bytes),
            // The log has the answers.
            Output::Disk(_) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_from_another_builds_recording_says_so() {
        let diverged = || CommandError::from(InputError::Divergence { at: 7, what: "x".into() });
        let at_end = || CommandError::Divergence("at exit 9: y".into());
        let (other, failed) = (Some("made by build a, this is build b"), "z");
        let text = |error, other| explained(error, other).to_string();
        let end = "(the recording was made by build a, this is build b)";
        assert_eq!(text(diverged(), other), format!("divergence: at exit 7: x {end}"));
        assert_eq!(text(at_end(), other), format!("divergence: at exit 9: y {end}"));
        assert_eq!(explained(diverged(), other).status(), explained(diverged(), None).status());
        assert_eq!(text(diverged(), None), diverged().to_string());
        let failed = || CommandError::GuestFailed(failed.into());
        assert_eq!(text(failed(), other), failed().to_string());
    }
}
