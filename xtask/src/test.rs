//! `cargo xtask test`: everything that can be checked, the quick checks first.
//!
//! Runs one step after the other with its output in view. A step installs the packages it needs
//! when it needs them; the checks that need no guest need none, and no root. Steps that start
//! guests run two at a time, each line with the step's name before it. A step is a command; the
//! result lines of its tests are counted, and a step without tests counts as one.
//!
//! Builds and tests are of the whole workspace: a package alone has other features of libraries.

mod miri;

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::iter;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ftvmm_tests::guest_run::{GUEST_FOLDER, ftvmm_program};
use ftvmm_tests::{Program, clock};

use crate::cargo::workspace;
use crate::guest;
use crate::report::{MachineReport, Step};

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub struct TestArguments {
    /// Run only these steps, and what they need: `--only format,unit`
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    only: Vec<String>,
    /// Fewer repetitions, and no tests of the test machinery
    #[arg(long)]
    quick: bool,
}

/// A step's name and the arguments of cargo.
type CargoStep = (&'static str, &'static [&'static str]);

/// Steps that need no guest.
const CHECKS: &[CargoStep] = &[
    ("format", &["fmt", "--all", "--check"]),
    (BUILD, &["build", "--release", "--workspace", "--bins", "--tests"]),
    ("clippy", &["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    ("doc", DOC),
    (DENY, &["xtask", "deny"]),
    (UNIT, &["test", "--release", "--no-fail-fast", "--workspace", "--lib", "--bins"]),
    (ETCD, &["test", "--release", "--no-fail-fast", "--workspace", "--test", ETCD]),
    ("packages", &["xtask", "fresh", "--packages-only"]),
];
/// What rustdoc says of the comments. clippy has compiled what it needs.
const DOC: &[&str] = &[
    "doc",
    "--release",
    "--workspace",
    "--no-deps",
    "--document-private-items",
    "--config",
    "build.rustdocflags=['-D','warnings']",
];
const BUILD: &str = "build";
const DENY: &str = "deny";
const UNIT: &str = "unit";
const ETCD: &str = "etcd";
const MIRI: &str = "miri";
const GUEST: &str = "guest";
/// Where the end-to-end tests lie. Each file is a step, so a new one needs no entry here.
const END_TO_END: &str = "tests/tests";
/// No change of the product can break them.
const OF_THE_MACHINERY: &[&str] = &["lab"];
/// Tests of one guest at a time, seldom on two hosts, the longest first. Two of them fit on two
/// cores, and so does one beside a test of pairs, whose hosts wait for each other a quarter of the
/// time.
const OF_ONE_GUEST: &[&str] = &[
    "logs",
    "intel",
    "tsc",
    "stock_kernel",
    "power",
    "record_replay",
    "stress",
    "snapshot",
    "entropy",
    "cpu",
    "bad_input",
    "idle",
];
const QUICK_SETTINGS: &[(&str, &str)] = &[("FTVMM_PAIRS", "6")];

#[derive(Clone, Copy, Default)]
struct Counts {
    passed: u64,
    failed: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

type Settings = Vec<(&'static str, OsString)>;

/// What is run and what came out so far.
struct Session {
    only: Vec<String>,
    settings: Settings,
    began: Instant,
    summary: Vec<Outcome>,
    not_run: Vec<String>,
}

/// A step that was run.
struct Outcome {
    name: String,
    took: Duration,
    counts: Counts,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "=== {}: {}, {:.0} s", self.name, self.counts, self.took.as_secs_f32())
    }
}

/// Runs the steps; fails when any of them did.
pub fn run(arguments: &TestArguments) -> Result<ExitCode, Box<dyn Error>> {
    let programs = end_to_end_programs()?;
    let names = CHECKS.iter().map(|(name, _)| *name).chain([MIRI, GUEST]);
    let known: Vec<&str> = names.chain(programs.iter().map(String::as_str)).collect();
    if let Some(unknown) = arguments.only.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("there is no step {unknown:?}; there are: {}", known.join(", ")).into());
    }

    let mut session = Session::new(arguments);
    let end_to_end: Vec<&String> = programs
        .iter()
        .filter(|name| session.wants(name))
        .filter(|name| !arguments.quick || !OF_THE_MACHINERY.contains(&name.as_str()))
        .collect();
    for (name, words) in CHECKS {
        if *name == DENY && session.wants(name) && session.lacks(name, Program::CargoDeny) {
            continue;
        }
        let needed = *name == BUILD && !end_to_end.is_empty();
        if needed || session.wants(name) {
            let more = if *name == UNIT { beside_the_code()? } else { Vec::new() };
            let more = more.iter().flat_map(|test| ["--test", test]);
            let counts =
                session.step(name, &words.iter().copied().chain(more).collect::<Vec<_>>())?;
            if *name == BUILD && counts.failed > 0 {
                return Ok(session.finish());
            }
        }
    }
    if session.wants(MIRI) {
        session.miri()?;
    }
    if session.wants(GUEST) || !end_to_end.is_empty() {
        session.make_guest();
    }
    let is_wanted = |name: &&&str| end_to_end.iter().any(|wanted| wanted == *name);
    let of_pairs = end_to_end.iter().filter(|name| !OF_ONE_GUEST.contains(&name.as_str()));
    session.steps_at_once(
        of_pairs.map(|name| name.as_str()),
        OF_ONE_GUEST.iter().filter(is_wanted).copied(),
    )?;
    if !end_to_end.is_empty() {
        // Without it the tests have said what they had to say.
        if let Err(error) = session.write_report() {
            eprintln!("no report to send in: {error}");
        }
    }
    Ok(session.finish())
}

fn end_to_end_words(name: &str) -> Vec<&str> {
    let words = ["test", "--release", "--workspace", "--test", name];
    [&words[..], &["--", "--nocapture"]].concat()
}

fn end_to_end_programs() -> Result<Vec<String>, Box<dyn Error>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(workspace().join(END_TO_END))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// Test programs of the packages themselves, which need no guest; those of etcd start servers.
fn beside_the_code() -> Result<Vec<String>, Box<dyn Error>> {
    let asked = ["metadata", "--no-deps", "--format-version", "1"];
    let answer = Program::Cargo.command()?.args(asked).current_dir(workspace()).output()?;
    let metadata: Metadata = serde_json::from_slice(&answer.stdout)?;
    let packages = metadata.packages.into_iter().filter(|package| package.name != "ftvmm-tests");
    let targets = packages.flat_map(|package| package.targets);
    let tests = targets.filter(|target| target.kind.iter().any(|kind| kind == "test"));
    Ok(tests.map(|test| test.name).filter(|name| name != ETCD).collect())
}

/// What `cargo metadata` prints, as far as it is of use here.
#[derive(serde::Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(serde::Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(serde::Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Session {
    fn new(arguments: &TestArguments) -> Self {
        let quick = if arguments.quick { QUICK_SETTINGS } else { &[] };
        let settings = quick.iter().map(|&(name, value)| (name, value.into()));
        let (only, settings) = (arguments.only.clone(), settings.collect());
        Self { only, settings, began: clock::now(), summary: Vec::new(), not_run: Vec::new() }
    }

    fn wants(&self, step: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == step)
    }

    /// Whether this machine has not got the step's program. Then the step is not run; in CI that is
    /// a failure.
    fn lacks(&mut self, name: &str, program: Program) -> bool {
        let Err(error) = program.path() else { return false };
        println!("\n=== {name} is not run: {error}");
        if std::env::var_os("CI").is_some() {
            let counts = Counts::default().with_status(false);
            self.summary.push(Outcome { name: name.to_owned(), took: Duration::ZERO, counts });
        } else {
            self.not_run.push(name.to_owned());
        }
        true
    }

    fn step(&mut self, name: &str, words: &[&str]) -> io::Result<Counts> {
        println!();
        let outcome = run_step(name, words, &self.settings, &mut io::stdout())?;
        let counts = outcome.counts;
        self.summary.push(outcome);
        Ok(counts)
    }

    /// Runs what miri is for, where it is installed.
    fn miri(&mut self) -> io::Result<()> {
        match miri::command() {
            Ok(command) => {
                println!();
                let shown = &mut io::stdout();
                self.summary.push(run_command(MIRI, command, &self.settings, shown)?);
            }
            Err(why) => self.not_run.push(format!("{MIRI} ({why})")),
        }
        Ok(())
    }

    /// Two lanes: one has those of pairs first, so that there are never two of them; the other goes
    /// on with the rest.
    fn steps_at_once<'a>(
        &mut self,
        of_pairs: impl Iterator<Item = &'a str> + Send,
        of_one_guest: impl Iterator<Item = &'a str> + Send,
    ) -> io::Result<()> {
        let waiting = Mutex::new(of_one_guest);
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
        let settings = &self.settings;
        let lane = |steps: &mut dyn Iterator<Item = &'a str>| -> io::Result<Vec<Outcome>> {
            let run = |name| {
                let mut shown = Named { name, output: io::stdout() };
                run_step(name, &end_to_end_words(name), settings, &mut shown)
            };
            steps.map(run).collect()
        };
        let lanes = thread::scope(|scope| {
            let first = scope.spawn(|| lane(&mut of_pairs.chain(iter::from_fn(next))));
            let second = scope.spawn(|| lane(&mut iter::from_fn(next)));
            [first, second].map(thread::ScopedJoinHandle::join)
        });
        for outcomes in lanes {
            let outcomes = outcomes.map_err(|_| io::Error::other("a step's thread panicked"))??;
            self.summary.extend(outcomes);
        }
        Ok(())
    }

    fn make_guest(&mut self) {
        println!("\n=== {GUEST}: kernels and initramfs; the first time compiles a kernel");
        let began = clock::now();
        let made = guest::ensure();
        match &made {
            Ok(guest) => self.settings.push((GUEST_FOLDER, guest.folder.clone().into())),
            Err(error) => eprintln!("{error}"),
        }
        let counts = Counts::default().with_status(made.is_ok());
        let outcome = Outcome { name: GUEST.to_owned(), took: began.elapsed(), counts };
        println!("{outcome}");
        self.summary.push(outcome);
    }

    /// Writes what was run so far, for whoever wants to send it in.
    fn write_report(&self) -> Result<(), Box<dyn Error>> {
        let step = |Outcome { name, took, counts }: &Outcome| Step {
            name: name.clone(),
            seconds: took.as_secs_f64(),
            passed: counts.passed,
            failed: counts.failed,
        };
        let steps = self.summary.iter().map(step).collect();
        MachineReport::new("test", &ftvmm_program()?)?.with_steps(steps).write()
    }

    fn finish(self) -> ExitCode {
        let mut total = Counts::default();
        println!("\n{:>7}  {:<16} result", "seconds", "step");
        for Outcome { name, took, counts } in &self.summary {
            println!("{:>7.1}  {name:<16} {counts}", took.as_secs_f32());
            total.passed += counts.passed;
            total.failed += counts.failed;
        }
        self.not_run.iter().for_each(|name| println!("{:>7}  {name:<16} not run", "-"));
        println!("{:>7.1}  in all\n{total}", self.began.elapsed().as_secs_f32());
        ExitCode::from(u8::from(total.failed > 0))
    }
}

/// Shows the lines of a step that runs beside another.
struct Named<'a, W> {
    name: &'a str,
    output: W,
}

impl<W: Write> Write for Named<'_, W> {
    /// One line at a time, so that those of two steps do not mix.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let named = [self.name.as_bytes(), b" | ", line].concat();
        self.output.write_all(&named)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Runs cargo as a step.
fn run_step(
    name: &str,
    words: &[&str],
    settings: &Settings,
    shown: &mut impl Write,
) -> io::Result<Outcome> {
    let mut cargo = Program::Cargo.command().map_err(io::Error::other)?;
    cargo.args(words);
    run_command(name, cargo, settings, shown)
}

/// Runs one step and shows all it prints, a line in each write.
fn run_command(
    name: &str,
    mut command: Command,
    settings: &Settings,
    shown: &mut impl Write,
) -> io::Result<Outcome> {
    let program = command.get_program().to_string_lossy();
    let file = program.rsplit('/').next().unwrap_or_default();
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    shown.write_all(format!("=== {name}: {file} {}\n", words.join(" ")).as_bytes())?;
    let began = clock::now();
    let (output, input) = io::pipe()?;
    let mut running = command
        .envs(settings.iter().map(|(name, value)| (name, value)))
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stdout(input.try_clone()?)
        .stderr(input)
        .spawn()?;
    // It holds ends of the pipe, which is read until the last of them is closed.
    drop(command);
    let mut counts = Counts::default();
    for line in BufReader::new(output).split(b'\n') {
        let mut line = line?;
        counts.add_line(&String::from_utf8_lossy(&line));
        line.push(b'\n');
        shown.write_all(&line)?;
    }
    let counts = counts.with_status(running.wait()?.success());
    let outcome = Outcome { name: name.to_owned(), took: began.elapsed(), counts };
    shown.write_all(format!("{outcome}\n").as_bytes())?;
    Ok(outcome)
}

impl Counts {
    /// Adds up the line a test program ends with, `test result: ok. 3 passed; 1 failed; …`.
    fn add_line(&mut self, line: &str) {
        let Some(results) = line.strip_prefix("test result: ") else { return };
        let number = |what: &str| {
            let (before, _) = results.split_once(what)?;
            before.split_whitespace().next_back()?.parse::<u64>().ok()
        };
        self.passed += number(" passed").unwrap_or(0);
        self.failed += number(" failed").unwrap_or(0);
    }

    /// A step without tests is a test itself, and so is one that failed although its tests did not.
    fn with_status(mut self, succeeded: bool) -> Self {
        if !succeeded && self.failed == 0 {
            self.failed = 1;
        } else if succeeded && self.passed + self.failed == 0 {
            self.passed = 1;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn counted(lines: &[&str], succeeded: bool) -> (u64, u64) {
        let mut counts = Counts::default();
        lines.iter().for_each(|line| counts.add_line(line));
        let Counts { passed, failed } = counts.with_status(succeeded);
        (passed, failed)
    }

    #[test]
    fn results_of_all_test_programs_are_added_up() {
        let lines = [
            "test a_test ... ok",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        ];
        assert_eq!(counted(&lines, false), (15, 2));
    }

    #[test]
    fn a_step_that_ends_badly_never_counts_as_passed() {
        assert_eq!(counted(&[], true), (1, 0));
        assert_eq!(counted(&[], false), (0, 1));
        assert_eq!(counted(&["test result: ok. 5 passed; 0 failed; 0 ignored"], false), (5, 1));
    }

    #[test]
    fn lines_of_steps_at_once_are_named() {
        let mut shown = Named { name: "disk", output: Vec::new() };
        for line in ["a line\n", "another\n"] {
            shown.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(shown.output, b"disk | a line\ndisk | another\n");
    }

    /// Packages with their features, as cargo would build them.
    fn built(of: &[&str]) -> BTreeSet<String> {
        let words = ["tree", "--locked", "--no-dedupe", "--prefix", "none", "--format", "{p} {f}"];
        let mut command = Program::Cargo.command().unwrap();
        let output = command.args(words).args(of).current_dir(workspace()).output();
        let lines = String::from_utf8(output.unwrap().stdout).unwrap();
        lines.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
    }

    #[test]
    fn nothing_of_xtask_is_compiled_twice() {
        let alone = built(&["--package", "xtask", "--edges", "normal,build"]);
        let all = built(&["--workspace"]);
        let twice: Vec<_> = alone.difference(&all).collect();
        assert!(!alone.is_empty() && twice.is_empty(), "with other features: {twice:?}");
    }

    #[test]
    fn the_end_to_end_tests_are_found() {
        assert!(end_to_end_programs().unwrap().iter().any(|name| name == "record_replay"));
    }

    #[test]
    fn tests_beside_the_code_are_found() {
        let found = beside_the_code().unwrap();
        assert!(found.iter().any(|name| name == "sim"), "{found:?}");
        assert!(!found.iter().any(|name| name == "record_replay" || name == ETCD), "{found:?}");
    }
}
