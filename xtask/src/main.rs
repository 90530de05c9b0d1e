//! `cargo xtask …`: everything a newcomer types.
//!
//! One module per subcommand. A subcommand that runs somebody else's program ends with that
//! program's exit status; failures of its own end with 1, bad usage with 2.

mod bench;
mod cargo;
mod chaos;
mod cost;
mod coverage;
mod demo;
mod deny;
mod fresh;
mod fuzz;
mod guest;
mod hosts;
mod lab;
mod mutants;
mod report;
mod stress;
mod test;
mod tidy;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything a newcomer types")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure what lockstep costs, against the same guest alone
    Bench(bench::BenchArguments),
    /// Strike a pair with faults of all kinds while clients look on
    Chaos(chaos::ChaosArguments),
    /// Count the instructions that a run costs its host
    Cost(cost::CostArguments),
    /// Tell which lines of the product the tests reach that need no guest
    Coverage(coverage::CoverageArguments),
    /// Kill a guest's host under a download that does not stop
    Demo(demo::DemoArguments),
    /// Look into licences, sources and advisories of the dependencies
    Deny,
    /// Show that a machine with nothing installed is enough
    Fresh(fresh::FreshArguments),
    /// Feed bytes to whatever decodes them, as long as it is left
    Fuzz(fuzz::FuzzArguments),
    /// Run a command on a host with a working KVM, emulated where this machine has none
    Lab(lab::LabArguments),
    /// Break the decision core on purpose, and see whether a test notices
    Mutants(mutants::MutantsArguments),
    /// Make the guest images: kernels and initramfs
    Guest(guest::GuestArguments),
    /// Record and replay random guests, which must come out equal
    Stress(stress::StressArguments),
    /// Run all checks and tests
    Test(test::TestArguments),
    /// Look whether sources and documents keep the house rules
    Tidy(tidy::TidyArguments),
}

fn main() -> ExitCode {
    let outcome: Result<ExitCode, Box<dyn Error>> = match Arguments::parse().command {
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Chaos(arguments) => chaos::run(&arguments),
        Task::Cost(arguments) => cost::run(&arguments),
        Task::Coverage(arguments) => coverage::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Deny => deny::run(),
        Task::Fresh(arguments) => fresh::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Lab(arguments) => lab::run(&arguments),
        Task::Mutants(arguments) => mutants::run(&arguments),
        Task::Guest(arguments) => guest::run(&arguments),
        Task::Stress(arguments) => stress::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Tidy(arguments) => tidy::run(&arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("{error}");
        let mut source = error.source();
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        ExitCode::FAILURE
    })
}
