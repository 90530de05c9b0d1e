//! `cargo xtask stress`: random guests, each recorded and replayed twice.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use ftvmm_tests::clock;
use ftvmm_tests::guest_run::GuestLab;
use ftvmm_tests::progress::Step;
use ftvmm_tests::stress::bare::Features;
use ftvmm_tests::stress::{Kind, Settings, run as run_cases};

use crate::hosts::log_folder;
use crate::{cargo, guest};

/// Arguments of `cargo xtask stress`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct StressArguments {
    /// How many cases; 0 goes on until it is stopped [default: 100, or 1 with --case]
    #[arg(long, value_name = "N")]
    cases: Option<u64>,
    /// Decides every case [default: drawn, and printed]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Run this case of the seed again, as often as --cases says
    #[arg(long, value_name = "K", requires = "seed")]
    case: Option<u64>,
    /// Only cases of this kind
    #[arg(long, value_name = "KIND")]
    only: Option<OnlyKind>,
    /// Only these parts of the case
    #[arg(long, value_name = "P,…", value_delimiter = ',', requires = "case")]
    parts: Option<Vec<usize>>,
    /// How many hosts run cases at the same time; each takes a CPU and 2 GiB
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=64),
        conflicts_with = "case",
    )]
    jobs: u8,
    /// Leave RDTSC in ring 3 out
    #[arg(long)]
    no_user_rdtsc: bool,
    /// Flip a bit of the recorded guest, as `ftvmm --inject-fault` takes it: every case must
    /// differ
    #[arg(long, value_name = "FAULT")]
    inject_fault: Option<String>,
    /// Folder for logs and failed cases [default: out/stress/<time>]
    #[arg(long, value_name = "D")]
    log_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum OnlyKind {
    Bare,
    Linux,
    Cloud,
}

/// Runs the cases; fails when one of them did.
pub fn run(arguments: &StressArguments) -> Result<ExitCode, Box<dyn Error>> {
    guest::ensure()?;
    cargo::build("ftvmm-tests", "lab-agent")?;
    cargo::build("ftvmm", "ftvmm")?;
    let folder = log_folder("stress", arguments.log_dir.as_deref());
    let fault = arguments.inject_fault.iter();
    let settings = Settings {
        seed: arguments.seed.unwrap_or_else(|| clock::since_epoch().as_millis() as u64),
        case: arguments.case,
        cases: arguments.cases.unwrap_or(if arguments.case.is_some() { 1 } else { 100 }),
        only: arguments.only.map(|only| match only {
            OnlyKind::Bare => Kind::Bare,
            OnlyKind::Linux => Kind::Linux,
            OnlyKind::Cloud => Kind::Cloud,
        }),
        features: Features { kernel_rdtsc: true, user_rdtsc: !arguments.no_user_rdtsc },
        parts: arguments.parts.clone(),
        more: fault.flat_map(|fault| ["--inject-fault".to_owned(), fault.clone()]).collect(),
        kept: folder.join("failed"),
    };
    println!("stress: --seed {}", settings.seed);
    let step = Step::start("starting the hosts");
    let start = |job| GuestLab::start(&folder.join(format!("lab-{job}")), 1);
    let sites = (0..arguments.jobs).map(start).collect::<Result<Vec<_>, _>>()?;
    drop(step);
    let summary = run_cases(&sites, &settings, |line| println!("{line}"))?;
    println!("stress: --seed {}: {summary}", settings.seed);
    Ok(ExitCode::from(u8::from(summary.equal < summary.cases)))
}
