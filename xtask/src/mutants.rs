//! `cargo xtask mutants`: breaks the decision core on purpose, once for each entry of
//! `xtask/mutants.toml`, and asks whether a test notices.
//!
//! Why: a test suite proves nothing about itself. The tracked files are copied below `out/`; there
//! one text of one file is replaced, and the unit tests, the model and the simulator of
//! `replication` run, the quickest first, until one fails. All breaks share a build folder, so that
//! only `replication` is built again. The tree is tested as it is first: tests that fail by
//! themselves would catch everything.

use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use ftvmm_host_programs::{Program, built};
use ftvmm_tests::clock;
use serde::Deserialize;

use crate::cargo::workspace;

/// Arguments of `cargo xtask mutants`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct MutantsArguments {
    /// Run only these: `--only skip-the-flush-gate,release-without-a-lease`
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Go on after the first test program that fails, to see which of them fail
    #[arg(long)]
    all_tests: bool,
}

/// Test programs of `replication`, and how cargo calls them.
const SUITES: [(&str, &[&str]); 3] =
    [("unit", &["--lib"]), ("model", &["--test", "model"]), ("sim", &["--test", "sim"])];
/// Longer than any of [`SUITES`] takes in a debug build of a busy machine; a break after which one
/// never ends is no break that a test has caught.
const SUITE_MAX: Duration = Duration::from_secs(600);
/// How often a test program is looked after.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Where the tree that is broken lies, from the workspace's root, and what its tests print.
const TREE: &str = "out/mutants/tree";
const LOGS: &str = "out/mutants/logs";

/// `xtask/mutants.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutants {
    #[serde(rename = "mutant")]
    all: Vec<Mutant>,
}

/// One break.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    /// What is wrong then, for people.
    breaks: String,
    /// From the workspace's root.
    file: String,
    /// Stands once in the file.
    search: String,
    replace: String,
}

/// What a test program says of a break.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Passed,
    /// The tests that failed; none is named when the program died.
    Failed(Vec<String>),
    Endless,
    NoBuild,
}

/// The test programs that were asked, and their answers.
struct Outcome(Vec<(&'static str, Verdict)>);

/// Runs them; fails when one survives.
pub fn run(arguments: &MutantsArguments) -> Result<ExitCode, Box<dyn Error>> {
    let mutants = chosen(read()?, &arguments.only)?;
    let tree = Tree::copy()?;
    let unbroken = tree.test("none", true)?;
    if unbroken.0.iter().any(|(_, verdict)| *verdict != Verdict::Passed) {
        return Err(format!("the tests fail by themselves: {unbroken}; see {LOGS}").into());
    }
    let mut survivors = Vec::new();
    for mutant in &mutants {
        let outcome = tree.strike(mutant, arguments.all_tests)?;
        println!("{:<36} {outcome}", mutant.name);
        if !outcome.is_caught() {
            survivors.push(mutant);
        }
    }
    println!("\n{} of {} are caught", mutants.len() - survivors.len(), mutants.len());
    for mutant in &survivors {
        println!("  {}: {} ({})", mutant.name, mutant.breaks, mutant.file);
    }
    Ok(ExitCode::from(u8::from(!survivors.is_empty())))
}

fn read() -> Result<Vec<Mutant>, Box<dyn Error>> {
    let text = fs::read_to_string(workspace().join("xtask/mutants.toml"))?;
    Ok(toml::from_str::<Mutants>(&text)?.all)
}

fn chosen(mut mutants: Vec<Mutant>, only: &[String]) -> Result<Vec<Mutant>, Box<dyn Error>> {
    if let Some(name) = only.iter().find(|name| !mutants.iter().any(|known| known.name == **name)) {
        let known: Vec<_> = mutants.iter().map(|mutant| mutant.name.as_str()).collect();
        return Err(format!("no mutant is called {name}; there are {}", known.join(", ")).into());
    }
    mutants.retain(|mutant| only.is_empty() || only.contains(&mutant.name));
    Ok(mutants)
}

impl Mutant {
    /// The text of its file with the break.
    fn apply(&self, text: &str) -> Result<String, String> {
        let Self { name, file, search, replace, .. } = self;
        match text.matches(search.as_str()).count() {
            1 => Ok(text.replacen(search.as_str(), replace, 1)),
            count => Err(format!("{name}: its text stands {count} times in {file}, not once")),
        }
    }
}

impl Outcome {
    fn is_caught(&self) -> bool {
        self.0.iter().any(|(_, verdict)| matches!(verdict, Verdict::Failed(_)))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let survives = self.0.iter().all(|(_, verdict)| *verdict == Verdict::Passed);
        if survives {
            return f.write_str("SURVIVED");
        }
        let shown = self.0.iter().filter(|(_, verdict)| *verdict != Verdict::Passed);
        for (index, (suite, verdict)) in shown.enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{suite} {verdict}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passes"),
            Self::Failed(tests) => match tests.as_slice() {
                [] => f.write_str("dies"),
                [test] => write!(f, "{test}"),
                [test, others @ ..] => write!(f, "{test} and {} more", others.len()),
            },
            Self::Endless => write!(f, "DOES NOT END in {} s", SUITE_MAX.as_secs()),
            Self::NoBuild => f.write_str("DOES NOT COMPILE"),
        }
    }
}

/// The copy that is broken and mended again.
struct Tree {
    root: PathBuf,
    logs: PathBuf,
    /// Built programs and libraries.
    target: PathBuf,
}

impl Tree {
    /// Copies what git tracks, as it is in the work tree. What is the same already stays, so that
    /// it is not built again.
    fn copy() -> Result<Self, Box<dyn Error>> {
        let root = workspace().join(TREE);
        let logs = workspace().join(LOGS);
        fs::create_dir_all(&logs)?;
        let mut list = Program::Git.command()?;
        let listed = list.args(["ls-files", "-z"]).current_dir(workspace()).output()?;
        if !listed.status.success() {
            return Err("git does not list the files of this checkout".into());
        }
        for path in String::from_utf8(listed.stdout)?.split_terminator('\0') {
            let new = match fs::read(workspace().join(path)) {
                // It is deleted, and git has not been told.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                read => read.map_err(|error| format!("{path}: {error}"))?,
            };
            let copy = root.join(path);
            if fs::read(&copy).is_ok_and(|old| old == new) {
                continue;
            }
            if let Some(folder) = copy.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(copy, new)?;
        }
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        let target = target.map_or_else(|| workspace().join("target"), |t| workspace().join(t));
        Ok(Self { root, logs, target })
    }

    /// Breaks the tree, tests it and mends it.
    fn strike(&self, mutant: &Mutant, all_tests: bool) -> Result<Outcome, Box<dyn Error>> {
        let file = self.root.join(&mutant.file);
        let whole = fs::read_to_string(&file)?;
        fs::write(&file, mutant.apply(&whole)?)?;
        let outcome = self.test(&mutant.name, all_tests);
        fs::write(&file, whole)?;
        outcome
    }

    fn test(&self, name: &str, all_tests: bool) -> Result<Outcome, Box<dyn Error>> {
        let mut outcome = Outcome(Vec::new());
        for (suite, target) in SUITES {
            let log = self.logs.join(format!("{name}-{suite}.log"));
            let verdict = match self.build(target, &log)? {
                Some(program) => self.ask(&program, &log)?,
                None => Verdict::NoBuild,
            };
            let goes_on = match verdict {
                Verdict::Passed => true,
                Verdict::Failed(_) | Verdict::Endless => all_tests,
                Verdict::NoBuild => false,
            };
            outcome.0.push((suite, verdict));
            if !goes_on {
                break;
            }
        }
        Ok(outcome)
    }

    /// Builds a test program; none when it does not compile.
    fn build(&self, target: &[&str], log: &Path) -> Result<Option<PathBuf>, Box<dyn Error>> {
        let mut command = Program::Cargo.command()?;
        let output = command
            .args(["test", "--quiet", "--locked", "--no-run", "--package", "ftvmm-replication"])
            .args(target)
            .args(["--message-format", "json-render-diagnostics", "--target-dir"])
            .arg(&self.target)
            .current_dir(&self.root)
            .stderr(File::create(log)?)
            .output()?;
        if !output.status.success() {
            return Ok(None);
        }
        let messages = String::from_utf8_lossy(&output.stdout);
        let mut programs = messages.lines().filter_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(PathBuf::from(message.get("executable")?.as_str()?))
        });
        programs.next_back().map(Some).ok_or_else(|| "cargo did not say what it built".into())
    }

    fn ask(&self, program: &Path, log: &Path) -> Result<Verdict, Box<dyn Error>> {
        let output = File::create(log)?;
        let mut child = built(program)
            .current_dir(self.root.join("replication"))
            .stdin(Stdio::null())
            .stderr(output.try_clone()?)
            .stdout(output)
            .spawn()?;
        Ok(match ended_well(&mut child)? {
            None => Verdict::Endless,
            Some(true) => Verdict::Passed,
            Some(false) => Verdict::Failed(failed_tests(&fs::read_to_string(log)?)),
        })
    }
}

/// Whether a program ended well; none when it was ended because it took too long.
fn ended_well(child: &mut Child) -> Result<Option<bool>, Box<dyn Error>> {
    let began = clock::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.success()));
        }
        if began.elapsed() > SUITE_MAX {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// The names of tests that failed, from what libtest prints.
fn failed_tests(log: &str) -> Vec<String> {
    let failed = log.lines().filter_map(|line| {
        line.strip_prefix("test ")?.strip_suffix(" ... FAILED").map(str::to_owned)
    });
    failed.collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_mutant_still_applies() {
        let mutants = read().unwrap();
        assert!(mutants.len() >= 14, "only {} are left", mutants.len());
        let names: BTreeSet<_> = mutants.iter().map(|mutant| &mutant.name).collect();
        assert_eq!(names.len(), mutants.len(), "two have the same name");
        for mutant in &mutants {
            let text = fs::read_to_string(workspace().join(&mutant.file)).unwrap();
            let broken = mutant.apply(&text).unwrap();
            assert_ne!(broken, text, "{} changes nothing", mutant.name);
            assert!(!mutant.breaks.is_empty(), "{} does not say what it breaks", mutant.name);
        }
    }

    #[test]
    fn a_text_that_is_not_there_or_twice_is_no_mutant() {
        let mutant = Mutant {
            name: "m".into(),
            breaks: "nothing".into(),
            file: "f".into(),
            search: "a".into(),
            replace: "b".into(),
        };
        assert_eq!(mutant.apply("xay").as_deref(), Ok("xby"));
        for text in ["xy", "aa"] {
            assert!(mutant.apply(text).is_err(), "{text}");
        }
        assert!(chosen(vec![mutant], &["n".into()]).is_err());
    }

    #[test]
    fn a_program_that_does_not_pass_names_its_tests_or_dies() {
        let log = "test a ... ok\ntest b::c ... FAILED\ntest d ... FAILED\n";
        let caught = Outcome(vec![("unit", Verdict::Failed(failed_tests(log)))]);
        assert!(caught.is_caught());
        assert_eq!(caught.to_string(), "unit b::c and 1 more");
        let died = Outcome(vec![("sim", Verdict::Failed(failed_tests("")))]);
        assert_eq!(died.to_string(), "sim dies");
        let late = Outcome(vec![("unit", Verdict::Passed), ("model", Verdict::Endless)]);
        assert!(!late.is_caught() && late.to_string().starts_with("model DOES NOT END"));
        let survivor = Outcome(SUITES.map(|(suite, _)| (suite, Verdict::Passed)).into());
        assert!(!survivor.is_caught());
        assert_eq!(survivor.to_string(), "SURVIVED");
    }
}
