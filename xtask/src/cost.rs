//! `cargo xtask cost`: what a run costs its host, in instructions.
//!
//! Unlike `bench` it measures no time: a busy machine takes longer and counts the same.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ftvmm_tests::cost::{Cost, Costs, WORKLOADS, grown, measure, read};
use ftvmm_tests::progress::Step;

use crate::hosts::log_folder;
use crate::{cargo, guest};

/// Where `--save` puts its files.
const SAVED: &str = "docs/bench";
/// The sides of a table, in the order of its columns.
const SIDES: [&str; 6] =
    ["solo", "recorded", "primary", "backup", "primary in clear", "backup in clear"];
/// The phases, in the order of a table's columns.
const PHASES: [&str; 9] =
    ["kvm", "handler", "inputs", "log", "session", "channel", "tap", "disk", "other"];

/// Arguments of `cargo xtask cost`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct CostArguments {
    /// Also write the result to docs/bench/cost.{json,md}
    #[arg(long)]
    save: bool,
    /// Folder for consoles and logs [default: out/cost/<time>]
    #[arg(long, value_name = "D")]
    log_dir: Option<PathBuf>,
}

/// Measures, and prints the table beside what was saved.
pub fn run(arguments: &CostArguments) -> Result<ExitCode, Box<dyn Error>> {
    guest::ensure()?;
    for (package, program) in
        [("ftvmm-tests", "lab-agent"), ("ftvmm-tests", "traffic"), ("ftvmm", "ftvmm")]
    {
        cargo::build(package, program)?;
    }
    let folder = log_folder("cost", arguments.log_dir.as_deref());
    let mut step = None;
    let costs = measure(&folder, |doing| step = Some(Step::start(doing.to_owned())))?;
    drop(step);
    println!("{}", table(&costs));
    let path = |extension: &str| Path::new(SAVED).join("cost").with_extension(extension);
    match read(&path("json")) {
        Ok(saved) => grown(&saved, &costs, 0).iter().for_each(|line| println!("more: {line}")),
        Err(error) => println!("nothing to compare with: {error}"),
    }
    if arguments.save {
        fs::write(path("json"), serde_json::to_string_pretty(&costs)? + "\n")?;
        fs::write(path("md"), format!("{HEAD}\n{}", table(&costs)))?;
        println!("saved: {SAVED}");
    }
    Ok(ExitCode::SUCCESS)
}

const HEAD: &str = "# What a run costs its host

`cargo xtask cost --save` writes this page. One lab host whose clocks count its instructions
(`-icount`) runs the guest alone (solo), with a recording (recorded), as both halves of a pair over
TLS (primary, backup) and of one in clear, and the client. Figures are thousands of instructions of
the process: the guest's own, those of KVM and of the host's kernel on its behalf, and ftvmm's.
Two runs differ by up to 2.5 % (echo, request), 5 % (MiB) and 7 % (idle).
";

fn table(costs: &Costs) -> String {
    let mut text = String::from("| thousands of instructions per | ");
    text += &SIDES.join(" | ");
    text += " | exits, solo |\n| --- |";
    text += &" ---: |".repeat(SIDES.len() + 1);
    text.push('\n');
    for workload in &WORKLOADS {
        let Some(sides) = costs.get(workload.title) else { continue };
        let _ = write!(text, "| {} ({}) |", workload.unit, workload.title);
        for side in SIDES {
            let cost = sides.get(side).map(|cost| thousands(cost.instructions));
            let _ = write!(text, " {} |", cost.unwrap_or_default());
        }
        let exits = sides.get(SIDES[0]).map_or(0.0, |cost| cost.exits);
        let _ = writeln!(text, " {exits:.1} |");
    }
    text += "\n## By phase\nA thread that is interrupted in a phase has what ran instead counted \
             there, so on one\nprocessor a pair's phases add up to more than its instructions.\n\n";
    let _ = writeln!(text, "| per | side | {} |", PHASES.join(" | "));
    let _ = writeln!(text, "| --- | --- |{}", " ---: |".repeat(PHASES.len()));
    for workload in &WORKLOADS {
        for side in SIDES {
            let Some(cost) = costs.get(workload.title).and_then(|sides| sides.get(side)) else {
                continue;
            };
            let _ = write!(text, "| {} ({}) | {side} |", workload.unit, workload.title);
            for phase in PHASES {
                let _ = write!(text, " {} |", of_phase(cost, phase));
            }
            text.push('\n');
        }
    }
    text
}

fn of_phase(cost: &Cost, phase: &str) -> String {
    cost.phases.get(phase).map(|ticks| thousands(*ticks)).unwrap_or_default()
}

fn thousands(count: u64) -> String {
    match count {
        0..10_000 => format!("{:.1}", count as f64 / 1e3),
        _ => format!("{:.0}", count as f64 / 1e3),
    }
}
