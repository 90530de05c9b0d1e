//! `ftvmm replay FILE`: runs the recorded guest again and says whether it was the same.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use ftvmm_host::clock::{HostClock, sleep_ms};
use ftvmm_host::user_file::{self, Named};
use ftvmm_kvm::install_kick_handler;
use ftvmm_machine::net_watch::NetWatch;
use ftvmm_replication::{LogHeader, LogReader, MemoryCheckMode, Ordinal};
use ftvmm_runtime::build;
use ftvmm_runtime::input::{CheckPlan, FileFeed, OnRecordError, Recorder, Replay};
use ftvmm_runtime::input_error::InputError;
use ftvmm_runtime::outputs::ReplayOutputs;
use ftvmm_runtime::run_loop::RunError;
use ftvmm_runtime::snapshot::Snapshot;
use ftvmm_runtime::sources::{Inputs, Source};
use ftvmm_runtime::step::{Ending, OutputSink};
use ftvmm_runtime::transfer::Restore;

use super::CommandError;
use super::args::ReplayArgs;
use super::from_header::{PathOverrides, config_from_header};
use super::outcome::end_at;
use super::recording::{create_log, open_log};
use super::replay_start::ReplayStart;
use super::run::{Conclusion, HostSide, Run, RunRole};
use super::written::Written;
use crate::guest::{Guest, GuestConfig, Machine};
use crate::report::{Report, RunCompleteness};

/// What a replay compares its guest with.
struct Replayed {
    path: PathBuf,
    outputs: ReplayOutputs,
    network: Arc<NetWatch>,
    /// How much of a run the recording has, when the guest's run ended.
    extent: Option<RunCompleteness>,
}

impl RunRole<Machine> for Replayed {
    fn outputs(&mut self) -> &mut dyn OutputSink {
        &mut self.outputs
    }

    fn conclude(
        &mut self,
        machine: &Machine,
        inputs: &mut Inputs,
        result: Result<Ending, CommandError>,
    ) -> Result<Conclusion, CommandError> {
        let ending = result.map_err(|error| self.unreadable(error))?;
        let end = end_at(machine, &ending)?;
        let Some(log) = inputs.replayed() else { return Ok(Conclusion::new(ending, end)) };
        let recorded = match log.feed().was_stopped() {
            true => Ok(None),
            false => log.recorded_end(ending.first_incomplete()),
        };
        let extent = match (&recorded, log.feed().torn()) {
            _ if log.feed().was_stopped() => RunCompleteness::NotReached,
            (Ok(Some(_)) | Err(_), _) => RunCompleteness::Complete,
            (Ok(None), Some(_)) => RunCompleteness::Torn,
            (Ok(None), None) => RunCompleteness::Unfinished,
        };
        self.extent = Some(extent);
        // When a replay was stopped, or the log was used up, the guest has not ended.
        let is_over = ending.by_guest() || matches!(recorded, Ok(Some(_)));
        let why = match (extent, log.feed().torn()) {
            (RunCompleteness::Torn, Some(torn)) => Some(format!("its tail is damaged ({torn})")),
            (RunCompleteness::Unfinished, _) => Some("it does not say how the run ended".into()),
            _ => None,
        };
        let remark = why.map_or(Ok(()), |why| Err(self.is_not_complete(&why, &ending)));
        let verdict = recorded.map_err(CommandError::from).and_then(|recorded| {
            let both = recorded.zip(end);
            match both.and_then(|(recorded, end)| end.difference(&recorded)) {
                None => Ok(()),
                Some(difference) => {
                    Err(CommandError::Divergence(format!("at exit {}: {difference}", ending.at)))
                }
            }
        });
        Ok(Conclusion { is_over, verdict, remark, ..Conclusion::new(ending, end) })
    }

    fn report(&self, inputs: &mut Inputs, report: Report) -> Report {
        Report {
            outputs: self.outputs.frames(),
            log_bytes: inputs.replayed().map_or(0, |log| log.feed().bytes_read()),
            network: self.network.report(),
            recording: self.extent,
            ..report
        }
    }
}

impl Replayed {
    fn is_not_complete(&self, why: &str, ending: &Ending) -> CommandError {
        CommandError::GuestFailed(format!(
            "recording '{}' is not complete: {why}; what it has was replayed, up to exit {}",
            self.path.display(),
            ending.at
        ))
    }

    /// The error of a run that failed because of a file, with the file's name.
    fn unreadable(&self, error: CommandError) -> CommandError {
        match error {
            CommandError::Run(RunError::Input(
                cause @ (InputError::LogRead { .. }
                | InputError::LogOrder { .. }
                | InputError::SnapshotRead { .. }),
            )) => CommandError::Recording { path: self.path.clone(), why: cause.to_string() },
            error => error,
        }
    }
}

/// Replays a recording.
///
/// # Errors
/// When the recording or its guest cannot be had, and when the replay diverges.
pub fn replay(args: &ReplayArgs) -> Result<(), CommandError> {
    install_kick_handler()?;
    // Nobody writes it while it is replayed.
    let _unwritten = user_file::open_shared("recording", &args.file)?;
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

fn replay_log(args: &ReplayArgs, reader: LogReader<Box<dyn Read>>) -> Result<(), CommandError> {
    let header = reader.header().clone();
    let ReplayStart { snapshot, skip } = ReplayStart::of(args, &header)?;
    let config = config_from_header(
        &header,
        &PathOverrides {
            kernel: args.kernel.as_deref(),
            initramfs: args.initrd.as_deref(),
            cpu_template: args.cpu_template.as_deref(),
        },
    );
    let written = check_files(args, &config, snapshot.as_ref())?;
    let guest = Guest::assemble(&config)?;
    if let Some(difference) = header.fingerprint.first_difference(&guest.fingerprint) {
        let why = format!("was made with another guest: {difference}");
        return Err(CommandError::Recording { path: args.file.clone(), why });
    }
    let create = |path: &PathBuf| {
        let start = snapshot.as_ref().map(|snapshot| snapshot.start().clone());
        let header = LogHeader { start, ..guest.log_header(&config) };
        create_log(path, args.written.overwrite, OnRecordError::Stop, &header)
    };
    let recording = args.record.as_ref().map(create).transpose()?;
    let mut machine = guest.power_on(&config)?;
    if let Some(fault) = args.inject_fault {
        machine.schedule(fault, sleep_ms);
    }
    let network = Arc::<NetWatch>::default();
    machine.show_network(network.clone());
    let log = Replay::new(FileFeed::new(reader, args.until.map(Ordinal), skip));
    let record = |recording| Recorder::new(Some(recording), None, check_plan(args));
    let parts = snapshot.map(Snapshot::into_parts);
    let inputs = Inputs::new(Source::Recording(Box::new(log)))
        .recorded(recording.map(record))
        .restored(parts.map(|parts| Restore::new(parts, None)));
    let outputs = ReplayOutputs::default();
    let role = Replayed { path: args.file.clone(), outputs, network, extent: None };
    let (host, clock) = (HostSide::default(), HostClock::host_start());
    Run::new(machine, role, inputs, host, clock).go("replay", written, |_| Ok(()))
}

/// Slices refer to the recorder's copy of memory, so added checks must not renew it.
fn check_plan(args: &ReplayArgs) -> CheckPlan {
    CheckPlan {
        every_exits: args.check_every,
        memory_every_exits: args.check_memory_every,
        from: Ordinal(args.check_from),
        memory: MemoryCheckMode::Digest,
    }
}

/// Refuses files that would be lost, wherever the recording says they are. The reports' places.
fn check_files(
    args: &ReplayArgs,
    config: &GuestConfig,
    snapshot: Option<&Snapshot>,
) -> Result<Written, CommandError> {
    let named = Named::default()
        .read("the recording", Some(&args.file))
        .read("--snapshot", snapshot.map(Snapshot::path))
        .read("--kernel", Some(&config.kernel))
        .read("--initrd", config.initramfs.as_deref())
        .read("--cpu-template", Some(&config.cpu_template))
        .written("--record", args.record.as_deref())
        .written("--report", args.written.report.as_deref())
        .written("--profile", args.written.profile.as_deref());
    named.check()?;
    Written::places(&args.written)
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
