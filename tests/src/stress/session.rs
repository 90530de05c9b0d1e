//! Many cases, one after the other on each host; what failed is minimised and kept.

use std::fmt;
use std::fs;
use std::ops::Range;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::bare::Features;
use super::error::StressError;
use super::minimise::minimise;
use super::trial::{self, Trial};
use super::{Case, Kind};
use crate::clock;
use crate::guest_run::{GuestLab, Report};

/// How often fewer parts are tried before they count as sound: a failure may be random.
const ATTEMPTS: usize = 3;

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Decides all cases.
    pub seed: u64,
    /// Only this case, again and again: what differs once may not differ twice.
    pub case: Option<u64>,
    /// How many cases; 0 for no end.
    pub cases: u64,
    /// Only cases of this kind.
    pub only: Option<Kind>,
    /// What may come up.
    pub features: Features,
    /// Only these parts of each case.
    pub parts: Option<Vec<usize>>,
    /// More arguments for the recorded run, such as a fault.
    pub more: Vec<String>,
    /// Where failed cases are kept.
    pub kept: PathBuf,
}

/// How a session went.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Cases run.
    pub cases: u64,
    /// Cases in which all three runs were equal.
    pub equal: u64,
    /// Exits of all recordings.
    pub exits: u64,
    /// Inputs of all recordings.
    pub inputs: u64,
    /// Slices of all recordings.
    pub slices: u64,
    /// All it took.
    pub took: Duration,
    /// A folder for each failed case.
    pub failed: Vec<PathBuf>,
}

impl Summary {
    fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.equal += other.equal;
        self.exits += other.exits;
        self.inputs += other.inputs;
        self.slices += other.slices;
        self.failed.extend(other.failed);
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cases, equal, exits, inputs, slices, took, failed } = self;
        write!(
            f,
            "{equal} of {cases} cases equal in {:.0} s; {exits} exits, {inputs} inputs, {slices} \
             slices",
            took.as_secs_f32()
        )?;
        failed.iter().try_for_each(|folder| write!(f, "\n  failed: {}", folder.display()))
    }
}

/// Runs the cases, one at a time on each of the `sites`; `say` gets a line for each.
///
/// # Errors
/// When a lab or this program fails; a guest that comes out different is part of the summary.
pub fn run(
    sites: &[GuestLab],
    settings: &Settings,
    say: impl Fn(&str) + Sync,
) -> Result<Summary, StressError> {
    let began = clock::now();
    let end = if settings.cases == 0 { u64::MAX } else { settings.cases };
    let turns = Mutex::new(0..end);
    let next = || turns.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = |site| -> Result<Summary, StressError> {
        let _last = NoMoreTurns(&turns);
        let mut own = Summary::default();
        while let Some(turn) = next() {
            let number = settings.case.unwrap_or(turn);
            one(site, settings, number, &mut own, &say).inspect_err(|error| {
                say(&format!(
                    "case-{number}: {error}\nthe other hosts end with the case they are at"
                ));
            })?;
        }
        Ok(own)
    };
    let outcomes: Vec<_> = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = sites.iter().map(|site| scope.spawn(move || work(site))).collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let mut summary = Summary::default();
    for outcome in outcomes {
        summary.add(outcome.unwrap_or_else(|panic| resume_unwind(panic))?);
    }
    summary.took = began.elapsed();
    Ok(summary)
}

/// A host that is done, fails or panics ends the session: the others begin no case any more.
struct NoMoreTurns<'a>(&'a Mutex<Range<u64>>);

impl Drop for NoMoreTurns<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = 0..0;
    }
}

/// Runs a case and counts it.
fn one(
    site: &GuestLab,
    settings: &Settings,
    number: u64,
    summary: &mut Summary,
    say: &impl Fn(&str),
) -> Result<(), StressError> {
    let case = Case::random(settings.seed, number, settings.only, settings.features);
    let kept = settings.parts.clone().unwrap_or_else(|| case.all());
    let name = format!("case-{number}");
    let started = clock::now();
    let trial = Trial::run(site, &case, &kept, &name, &settings.more)?;
    let what = format!("{name}: {:?}, {} parts", case.kind(), kept.len());
    let seconds = started.elapsed().as_secs_f32();
    summary.cases += 1;
    if let Some(Report { exits, inputs, slices, .. }) = &trial.recorded.report {
        summary.exits += exits;
        summary.inputs += inputs;
        summary.slices += slices;
        say(&format!("{what}, {exits} exits, {inputs} inputs, {slices} slices, {seconds:.1} s"));
    } else {
        say(&format!("{what}, no report, {seconds:.1} s"));
    }
    match trial.difference() {
        None => summary.equal += 1,
        Some(difference) => {
            say(&format!("{name} DIFFERS: {difference}"));
            summary.failed.push(examine(site, settings, &case, kept, &difference, say)?);
        }
    }
    remove(site, &name)
}

/// Minimises a failed case and keeps it; returns its folder.
fn examine(
    site: &GuestLab,
    settings: &Settings,
    case: &Case,
    kept: Vec<usize>,
    difference: &str,
    say: &impl Fn(&str),
) -> Result<PathBuf, StressError> {
    let name = format!("case-{}", case.number);
    let folder = settings.kept.join(&name);
    keep(site, &folder, &name)?;
    let small = format!("{name}-min");
    let mut last = difference.to_owned();
    let fewest = minimise(kept, |fewer| {
        for _ in 0..ATTEMPTS {
            remove(site, &small)?;
            let trial = Trial::run(site, case, fewer, &small, &settings.more)?;
            if let Some(difference) = trial.difference() {
                last = difference;
                keep(site, &folder.join("minimised"), &small)?;
                return Ok(true);
            }
        }
        Ok::<_, StressError>(false)
    })?;
    let again = command(settings, case, &fewest);
    let names = case.parts();
    let parts: Vec<String> = fewest.iter().map(|&part| format!("{part} {}", names[part])).collect();
    let text = format!("{difference}\n\nminimised to: {}\n{last}\n\n{again}\n", parts.join(", "));
    let path = folder.join("README");
    fs::write(&path, &text).map_err(|source| StressError::Io { path, source })?;
    say(&format!("{name} kept in {}\n{}", folder.display(), text.trim_end()));
    Ok(folder)
}

/// What runs a case, or some parts of it, again.
fn command(settings: &Settings, case: &Case, parts: &[usize]) -> String {
    let mut words = format!("cargo xtask stress --seed {} --case {}", settings.seed, case.number);
    match settings.only {
        Some(Kind::Bare) => words += " --only bare",
        Some(Kind::Linux) => words += " --only linux",
        Some(Kind::Cloud) => words += " --only cloud",
        None => {}
    }
    if !settings.features.user_rdtsc {
        words += " --no-user-rdtsc";
    }
    if !parts.is_empty() {
        let list: Vec<String> = parts.iter().map(ToString::to_string).collect();
        words += &format!(" --parts {}", list.join(","));
    }
    if let [option, value] = &settings.more[..] {
        words += &format!(" {option} {value}");
    }
    words
}

fn keep(site: &GuestLab, folder: &std::path::Path, name: &str) -> Result<(), StressError> {
    let path = folder.to_owned();
    trial::keep(site, folder, name).map_err(|source| StressError::Io { path, source })
}

fn remove(site: &GuestLab, name: &str) -> Result<(), StressError> {
    let path = site.lab.share().to_owned();
    let gone = || trial::files(site, name)?.iter().try_for_each(fs::remove_file);
    gone().map_err(|source| StressError::Io { path, source })
}
