//! `cargo xtask demo`: a guest's host dies in the middle of a download that does not stop; with
//! `--rounds`, one host after the other, each replaced by a fresh one.

mod rounds;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use ftvmm_guest_images::GuestKernel;
use ftvmm_guest_programs::stream::{DEFAULT_SEED, hex, stream_sha256};
use ftvmm_tests::download::{Download, Downloaded};
use ftvmm_tests::guest_run::GUEST_ADDRESS;
use ftvmm_tests::lab::{Backend, Lab, LabProcess};
use ftvmm_tests::measure::boot_time;
use ftvmm_tests::pair::{GuestFiles, Pair, Report, RunOptions, read_report, start_solo};
use ftvmm_tests::progress::Step;
use indicatif::{ProgressBar, ProgressStyle};

use crate::hosts::Hosts;

const MIB: u64 = 1 << 20;
const SIZE_MIB: u64 = 24;

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct DemoArguments {
    /// Size of the download in MiB [default: 24, and enough for the rounds]
    #[arg(long, value_name = "MiB", value_parser = clap::value_parser!(u64).range(1..))]
    size: Option<u64>,
    /// How many times the active host dies; each time a fresh host joins
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..),
    )]
    rounds: u64,
    /// The guest's kernel: ours, or one of Debian's unmodified ones
    #[arg(long, value_name = "KERNEL", default_value = "tiny", value_parser = kernel_parser())]
    kernel: GuestKernel,
    /// Folder for consoles, logs and reports [default: out/demo/<time>]
    #[arg(long, value_name = "D")]
    log_dir: Option<PathBuf>,
}

fn kernel_parser() -> impl TypedValueParser<Value = GuestKernel> {
    let names = GuestKernel::ALL.map(GuestKernel::name);
    let named = |name: String| GuestKernel::ALL.into_iter().find(|kernel| kernel.name() == name);
    PossibleValuesParser::new(names).try_map(move |name| named(name).ok_or("no such kernel"))
}

/// Shows the demo and prints its report; fails when the download did.
pub fn run(arguments: &DemoArguments) -> Result<ExitCode, Box<dyn Error>> {
    let (kernel, folder) = (arguments.kernel, arguments.log_dir.as_deref());
    let Hosts { lab, backend, files } = Hosts::start("demo", kernel, folder, &[])?;
    if arguments.rounds > 1 {
        let options = RunOptions { memory_mib: kernel.memory_mib(), ..RunOptions::default() };
        let options = RunOptions { arguments: patience(backend), ..options };
        let bytes = arguments.size.unwrap_or(rounds::SIZE_MIB * arguments.rounds) * MIB;
        return rounds::run(&lab, &files, options, arguments.rounds, bytes);
    }
    let bytes = arguments.size.unwrap_or(SIZE_MIB) * MIB;

    let alone = RunOptions { memory_mib: kernel.memory_mib(), ..RunOptions::default() };
    let solo_boot = boot_solo(&lab, &files, &alone)?;
    let step = Step::start("booting the guest in lockstep");
    let options = RunOptions { arguments: patience(backend), ..alone };
    let pair = Pair::start(&lab, &files, &options)?;
    let pair_boot = booted(&lab, &pair.primary)?;
    drop(step);
    println!(
        "boot:  {:.1} s alone, {:.1} s in lockstep: {:.2} times",
        solo_boot.as_secs_f64(),
        pair_boot.as_secs_f64(),
        pair_boot.as_secs_f64() / solo_boot.as_secs_f64()
    );
    let downloaded = download_through_failure(&lab, &pair, bytes)?;
    let step = Step::start("asking the survivor for its report");
    pair.backup.signal(nix::libc::SIGTERM);
    pair.backup.wait()?;
    let report = read_report(&lab, &pair.backup_report)?;
    drop(step);
    Ok(conclude(&downloaded, &report, bytes))
}

/// The same boot on the same host without a backup, for comparison.
fn boot_solo(
    lab: &Lab,
    files: &GuestFiles,
    options: &RunOptions,
) -> Result<Duration, Box<dyn Error>> {
    let _step = Step::start("booting the guest alone");
    let solo = start_solo(lab, 0, files, options, "solo.json")?;
    let took = booted(lab, &solo)?;
    solo.signal(nix::libc::SIGTERM);
    solo.wait()?;
    Ok(took)
}

/// An emulated host may stand still for a second when this machine has other things to do; that is
/// not the death the backup is to look for.
fn patience(backend: Backend) -> Vec<String> {
    match backend {
        Backend::Lab => vec!["--failure-timeout-ms".into(), "3000".into()],
        Backend::Local => Vec::new(),
    }
}

fn booted(lab: &Lab, ftvmm: &LabProcess) -> Result<Duration, Box<dyn Error>> {
    let took = boot_time(ftvmm)?;
    Ok(took.ok_or_else(|| format!("the guest did not boot\n{}", lab.tails()))?)
}

/// Downloads from the guest and cuts the power of its primary's host half-way.
fn download_through_failure(
    lab: &Lab,
    pair: &Pair,
    bytes: u64,
) -> Result<Downloaded, Box<dyn Error>> {
    let url = format!("http://{GUEST_ADDRESS}/bytes/{bytes}");
    println!("curl:  {url}");
    let bar = download_bar(bytes);
    let mut download = Download::start(lab, &url)?;
    let before = download.read_through(bytes / 2, |n| bar.set_position(n))?;
    if pair.backup.ended().is_some() {
        return Err(format!("the backup left before the failure\n{}", lab.tails()).into());
    }
    lab.host(0).kill();
    bar.suspend(|| println!("kill:  the primary's host died after {before} bytes"));
    let downloaded = download.finish(|n| bar.set_position(n))?;
    bar.finish_and_clear();
    Ok(downloaded)
}

fn download_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    let style = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {msg}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

/// Prints what the client got; true when all of it is right.
fn print_download(downloaded: &Downloaded, bytes: u64) -> bool {
    let same = downloaded.sha256 == stream_sha256(DEFAULT_SEED, bytes);
    println!(
        "\ndownload   {} bytes in {:.1} s, curl ended with {}",
        downloaded.bytes,
        downloaded.total.as_secs_f64(),
        downloaded.status
    );
    println!("sha-256    {} ({})", hex(&downloaded.sha256), if same { "right" } else { "WRONG" });
    downloaded.status == 0 && downloaded.bytes == bytes && same
}

fn conclude(downloaded: &Downloaded, report: &Report, bytes: u64) -> ExitCode {
    let complete = print_download(downloaded, bytes);
    println!(
        "stall      {:.2} s, the longest the client saw",
        downloaded.longest_stall.as_secs_f64()
    );
    let takeover = report.takeover_seconds.unwrap_or(f64::NAN);
    println!("take-over  {takeover:.3} s from giving the primary up to the first live exit");
    println!("exits      {}", report.exits);
    println!("log        {:.1} kB/s", report.log_bytes as f64 / report.seconds / 1e3);
    println!("frames     {} sent, {} compared", report.outputs, report.frames_compared);
    let good = complete && report.takeovers == 1;
    println!("\n{}", if good { "The host died, the guest did not." } else { "FAILED" });
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
