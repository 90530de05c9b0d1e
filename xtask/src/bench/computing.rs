//! `cargo xtask bench --computing`: what lockstep costs a guest that computes, and what its clients
//! see meanwhile.
//!
//! The guest spins in registers (`ftguest spin`) or works over a 32 KiB table (`ftguest compute`);
//! neither makes an exit by itself, so everything it hears comes by slices.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ftvmm_guest_programs::compute::{line_after, spin_line};
use ftvmm_tests::Program;
use ftvmm_tests::clock;
use ftvmm_tests::pair::{GUEST_ADDRESS, READY, RunOptions};
use ftvmm_tests::ping::Ping;
use ftvmm_tests::progress::Step;
use serde::Serialize;

use super::{BenchArguments, Mode, SAVED, start};
use crate::hosts::Hosts;

/// The two that are compared.
const MODES: [Mode; 2] = [
    Mode { title: "solo", release: None, in_clear: false },
    Mode { title: "lockstep compare", release: Some("compare"), in_clear: false },
];
const ROUNDS: u32 = 3;
/// Both take longer than the pings.
const SPIN_ROUNDS: u64 = 120;
const TABLE_ROUNDS: u64 = 3000;
const PING_EVERY: Duration = Duration::from_millis(100);
const PINGS: usize = 80;
/// `--max-input-delay`, its default.
const MAX_INPUT_DELAY_MS: f64 = 5.0;

/// What one run of one mode showed.
#[derive(Debug, Clone, Serialize)]
struct Sample {
    mode: &'static str,
    program: &'static str,
    seconds: f64,
    ping_ms: Vec<f64>,
    pings_lost: usize,
    slices: u64,
    log_bytes: u64,
    run_seconds: f64,
}

/// Measures, prints and writes the result.
pub fn run(arguments: &BenchArguments) -> Result<ExitCode, Box<dyn Error>> {
    let kernel = ftvmm_guest_images::GuestKernel::Tiny;
    let Hosts { lab, files, .. } =
        Hosts::start("bench-computing", kernel, arguments.log_dir.as_deref(), &[])?;
    let programs = [
        ("spin", format!("spin {SPIN_ROUNDS}"), spin_line(SPIN_ROUNDS)),
        ("compute", format!("compute {TABLE_ROUNDS}"), line_after(TABLE_ROUNDS)),
    ];
    let mut samples = Vec::new();
    for round in 1..=arguments.rounds.unwrap_or(ROUNDS) {
        for (program, script, last_line) in &programs {
            for mode in &MODES {
                let step = Step::start(format!("round {round}: {program}, {}", mode.title));
                let cmdline = format!("ftguest.run=\"echo BEGIN; {script}\"");
                let options = RunOptions { cmdline, ..RunOptions::default() };
                let limit = arguments.failure_timeout_ms;
                let running = start(&lab, &files, mode, limit, options)?;
                let console = running.primary();
                console.wait_for_stdout(READY)?;
                lab.run_client(Program::Ip, &["neigh", "flush", "all"])?;
                console.wait_for_stdout("BEGIN")?;
                let began = clock::now();
                let ping = Ping::start(&lab, GUEST_ADDRESS, PING_EVERY, PINGS)?;
                if !console.wait_for_stdout(last_line)? {
                    return Err(format!("the guest did not finish\n{}", lab.tails()).into());
                }
                let seconds = began.elapsed().as_secs_f64();
                let pinged = ping.finish()?;
                let report = running.stop(&lab)?;
                drop(step);
                let milliseconds = |d: &Duration| d.as_secs_f64() * 1000.0;
                samples.push(Sample {
                    mode: mode.title,
                    program,
                    seconds,
                    // The first one pays for address resolution.
                    ping_ms: pinged.answered.iter().skip(1).map(milliseconds).collect(),
                    pings_lost: pinged.lost,
                    slices: report.slices,
                    log_bytes: report.log_bytes,
                    run_seconds: report.seconds,
                });
            }
        }
    }
    let text = markdown(&samples);
    println!("\n{text}");
    let mut folders = vec![lab.folder().to_owned()];
    if arguments.save {
        folders.push(Path::new(SAVED).to_owned());
    }
    for folder in folders {
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("computing.md"), &text)?;
        let json = serde_json::to_string_pretty(&samples)? + "\n";
        fs::write(folder.join("computing.json"), json)?;
        println!("result: {}", folder.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn markdown(samples: &[Sample]) -> String {
    let mut text = String::from(
        "# A guest that computes\n\n| program | mode | run time (ratio to solo) | ping p50 | p90 | \
         p99 | \
         longest | lost | slices/s | log |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for program in ["spin", "compute"] {
        let of = |mode: &'static str| {
            samples.iter().filter(move |s| s.mode == mode && s.program == program)
        };
        let solo = median(of(MODES[0].title).map(|s| s.seconds).collect());
        for mode in &MODES {
            let seconds = median(of(mode.title).map(|s| s.seconds).collect());
            let mut pings: Vec<f64> =
                of(mode.title).flat_map(|s| s.ping_ms.iter().copied()).collect();
            pings.sort_by(f64::total_cmp);
            let at = |share: f64| {
                let index = ((pings.len() as f64 - 1.0) * share).round() as usize;
                pings.get(index).copied().unwrap_or(f64::NAN)
            };
            let lost: usize = of(mode.title).map(|s| s.pings_lost).sum();
            let run: f64 = of(mode.title).map(|s| s.run_seconds).sum();
            let slices: u64 = of(mode.title).map(|s| s.slices).sum();
            let log: u64 = of(mode.title).map(|s| s.log_bytes).sum();
            let _ = writeln!(
                text,
                "| {program} | {} | {seconds:.2} s (x{:.3}) | {:.2} ms | {:.2} ms | {:.2} ms | \
                 {:.2} ms | \
                 {lost} | {:.0} | {:.0} kB/s |",
                mode.title,
                seconds / solo,
                at(0.5),
                at(0.9),
                at(0.99),
                at(1.0),
                slices as f64 / run,
                log as f64 / run / 1000.0,
            );
        }
    }
    let _ = writeln!(
        text,
        "\nMedians of the rounds, measured in turn. `--max-input-delay` is {MAX_INPUT_DELAY_MS} \
         ms: the bound for \
         a ping in lockstep is its solo time and {} ms.",
        3.0 * MAX_INPUT_DELAY_MS
    );
    text
}
