//! `cargo xtask chaos`: faults of all kinds strike a pair whose clients must not notice.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use ftvmm_tests::chaos::{Settings, run as run_rounds};
use ftvmm_tests::clock;
use ftvmm_tests::progress::Step;
use ftvmm_tests::site::{Site, Stage};

use crate::hosts::log_folder;
use crate::{cargo, guest};

/// Arguments of `cargo xtask chaos`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct ChaosArguments {
    /// How many faults
    #[arg(long, value_name = "N", default_value_t = 16)]
    rounds: u64,
    /// Decides every fault [default: drawn, and printed]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Begin with this round of the seed
    #[arg(long, value_name = "K", default_value_t = 0)]
    first: u64,
    /// Folder for logs [default: out/chaos/<time>]
    #[arg(long, value_name = "D")]
    log_dir: Option<PathBuf>,
}

/// Runs the rounds; fails when something was wrong in one of them.
pub fn run(arguments: &ChaosArguments) -> Result<ExitCode, Box<dyn Error>> {
    guest::ensure()?;
    cargo::build("ftvmm-tests", "lab-agent")?;
    cargo::build("ftvmm", "ftvmm")?;
    let folder = log_folder("chaos", arguments.log_dir.as_deref());
    let seed = arguments.seed.unwrap_or_else(|| clock::since_epoch().as_millis() as u64);
    let settings = Settings { rounds: arguments.rounds, seed, first: arguments.first };
    println!("chaos: --seed {seed} --first {}", arguments.first);
    let step = Step::start("starting the hosts");
    let site = Site::start(&folder).map_err(|failed| text_of(failed.message()))?;
    drop(step);
    let wrong = run_rounds(&site, settings, |line| println!("{line}"))
        .map_err(|failed| text_of(failed.message()))?;
    println!("chaos: --seed {seed}: {} rounds, wrong: {wrong:?}", arguments.rounds);
    Ok(ExitCode::from(u8::from(!wrong.is_empty())))
}

fn text_of(message: Option<&str>) -> String {
    message.unwrap_or("no reason given").to_owned()
}
