//! `ftvmm replay FILE`: runs the recorded guest again and says whether it came out the same.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use ftvmm_devices::Output;
use ftvmm_replication::{LogReader, Ordinal};

use super::args::ReplayArgs;
use super::run::{digest_at, report, verdict};
use super::{CommandError, write_report};
use crate::guest::{Guest, GuestConfig};
use crate::host::clock::HostClock;
use crate::host::print_console;
use crate::input::{InputError, LogInputs};
use crate::kvm::install_kick_handler;
use crate::report::{Report, hex};
use crate::run_loop::{self, OutputSink, StopCause};

/// Opens a recording and reads its header.
///
/// # Errors
/// When the file is none, or from another version.
pub fn open_log(path: &Path) -> Result<LogReader<BufReader<File>>, CommandError> {
    let file = File::open(path).map_err(|source| CommandError::File {
        what: "recording",
        path: path.into(),
        source,
    })?;
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
    let header = reader.header().clone();
    let config = GuestConfig {
        kernel: args.kernel.clone().unwrap_or_else(|| header.kernel_path.clone().into()),
        initramfs: args.initrd.clone().or_else(|| header.initramfs_path.clone().map(Into::into)),
        cmdline: header.fingerprint.cmdline.clone(),
        cpu_template: args
            .cpu_template
            .clone()
            .unwrap_or_else(|| header.fingerprint.cpu_template.clone().into()),
        memory_mib: header.fingerprint.memory_mib,
        net_mac: header.fingerprint.net_mac,
        tsc: header.fingerprint.tsc,
        rtc_epoch_s: header.rtc_epoch_s,
        logged: true,
    };
    let guest = Guest::assemble(&config)?;
    if let Some(difference) = header.fingerprint.first_difference(&guest.fingerprint) {
        let why = format!("was made with another guest: {difference}");
        return Err(CommandError::Recording { path: args.file.clone(), why });
    }
    let mut machine = guest.power_on(&config);
    let mut inputs = LogInputs::new(reader, args.until.map(Ordinal));
    let mut outputs = Replayed::default();
    let clock = HostClock::host_start();
    let ending = run_loop::run(&mut machine, &mut inputs, &mut outputs)?;
    let seconds = clock.host_now_ns() as f64 / 1e9;
    let digest = digest_at(&machine, &ending)?;
    let report = Report {
        outputs: outputs.frames,
        log_bytes: inputs.bytes_read(),
        ..report("replay", &machine, &ending, digest, seconds)
    };
    write_report(args.report.as_deref(), &report)?;
    if let Some(torn) = inputs.torn() {
        eprintln!(
            "ftvmm: the recording's tail is damaged ({torn}); replayed up to exit {}",
            ending.at
        );
    }
    if ending.cause != StopCause::EndOfLog || args.until.is_none() {
        let recorded = inputs.recorded_end(ending.first_incomplete())?;
        if let (Some(recorded), Some(digest)) = (recorded, digest)
            && recorded.state_digest != digest
        {
            return Err(CommandError::Divergence(format!(
                "the state at exit {} has digest {}, recorded is {}",
                ending.at,
                hex(&digest),
                hex(&recorded.state_digest)
            )));
        }
    }
    verdict(&ending)
}

#[derive(Default)]
struct Replayed {
    frames: u64,
}

impl OutputSink for Replayed {
    fn emit(&mut self, _: Ordinal, _: u64, output: Output) -> Result<(), InputError> {
        match output {
            Output::Frame(_) => self.frames += 1,
            Output::Console(bytes) => print_console(&bytes),
        }
        Ok(())
    }
}
