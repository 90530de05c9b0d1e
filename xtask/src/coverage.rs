//! `cargo xtask coverage`: which lines of the product the tests reach that need no guest.
//!
//! cargo-llvm-cov builds and runs the unit tests and the test programs beside the code. Lines under
//! `#[cfg(test)]` and files of tests are left out: they would always be covered, and lift every
//! number.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use ftvmm_host_programs::Program;

use crate::cargo::workspace;
use crate::tidy::TestLines;

/// The product: a folder and the share of its lines that has to be covered, in percent. The longest
/// folder that a file lies in decides.
const FLOORS: &[(&str, f64)] =
    &[("replication/src", 90.0), ("vmm/machine/src", 90.0), ("devices/src", 60.0), ("vmm", 60.0)];

/// Folders and files of what only tests run, or share.
const OF_TESTS: &[&str] = &["/tests/", "/benches/", "/testing/", "/interleavings/"];
const OF_TESTS_FILES: &[&str] = &["tests.rs", "/testing.rs"];

/// Packages that no row of [`FLOORS`] asks about: they need not be built.
const NOT_PRODUCT: &[&str] = &[
    "ftvmm-fuzz",
    "ftvmm-guest-images",
    "ftvmm-guest-programs",
    "ftvmm-host-programs",
    "ftvmm-tests",
    "xtask",
];

/// Arguments of `cargo xtask coverage`.
#[derive(clap::Args)]
pub struct CoverageArguments {
    /// Count again what the last run wrote, without running anything
    #[arg(long)]
    again: bool,
}

/// Lines that can be executed, and those that were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Lines {
    all: u64,
    covered: u64,
}

impl Lines {
    fn percent(self) -> f64 {
        if self.all == 0 { 100.0 } else { 100.0 * self.covered as f64 / self.all as f64 }
    }
}

/// Runs the tests and prints the table; fails when a part of the product is below its floor.
pub fn run(arguments: &CoverageArguments) -> Result<ExitCode, Box<dyn Error>> {
    let report = workspace().join("out/coverage.lcov");
    if !arguments.again {
        measure(&report)?;
    }
    let mut files = BTreeMap::new();
    for (path, lines) in parse(&fs::read_to_string(&report)?) {
        let Ok(path) = Path::new(&path).strip_prefix(workspace()) else { continue };
        let path = path.to_string_lossy().into_owned();
        if let Some(floor) = floor_of(&path) {
            let tests = TestLines::of(&workspace().join(&path))?;
            let product = lines.into_iter().filter(|(line, _)| !tests.contains(*line));
            files.entry((floor, path)).or_insert_with(|| count(product));
        }
    }
    Ok(if print(&files) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn measure(report: &Path) -> Result<(), Box<dyn Error>> {
    let mut command = Program::CargoLlvmCov.command()?;
    if let Some(folder) = report.parent() {
        fs::create_dir_all(folder)?;
    }
    let others = NOT_PRODUCT.iter().flat_map(|package| ["--exclude", package]);
    command
        .args(["llvm-cov", "test", "--workspace", "--tests"])
        .args(others)
        .args(["--lcov", "--output-path"])
        .arg(report)
        .current_dir(workspace());
    if command.status()?.success() {
        return Ok(());
    }
    let advice = "the tests failed, or the toolchain has no llvm-profdata, which \
                  `rustup component add llvm-tools` brings";
    Err(advice.into())
}

/// Which row of [`FLOORS`] a file counts for; none for what is not of the product.
fn floor_of(path: &str) -> Option<usize> {
    let is_test = OF_TESTS.iter().any(|folder| path.contains(folder))
        || OF_TESTS_FILES.iter().any(|file| path.ends_with(file));
    let is_in = |folder: &str| path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    let rows = FLOORS.iter().enumerate().filter(|(_, (folder, _))| !is_test && is_in(folder));
    rows.max_by_key(|(_, (folder, _))| folder.len()).map(|(row, _)| row)
}

/// Each file of an lcov report, with its lines and how often each was executed.
fn parse(report: &str) -> Vec<(String, Vec<(usize, u64)>)> {
    let mut files: Vec<(String, Vec<(usize, u64)>)> = Vec::new();
    for line in report.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            files.push((path.to_owned(), Vec::new()));
        } else if let (Some(data), Some((_, lines))) = (line.strip_prefix("DA:"), files.last_mut())
        {
            let (number, times) = data.split_once(',').unwrap_or((data, "0"));
            lines.extend(number.parse().ok().zip(times.parse().ok()));
        }
    }
    files
}

fn count(lines: impl Iterator<Item = (usize, u64)>) -> Lines {
    lines.fold(Lines::default(), |sum, (_, times)| Lines {
        all: sum.all + 1,
        covered: sum.covered + u64::from(times > 0),
    })
}

/// Prints a line for each row of the floors and for each module below; true when no row is below
/// its floor.
fn print(files: &BTreeMap<(usize, String), Lines>) -> bool {
    let mut good = true;
    println!("{:>9} {:>9} {:>8}", "lines", "covered", "percent");
    for (row, (folder, floor)) in FLOORS.iter().enumerate() {
        let mut modules = BTreeMap::<&str, Lines>::new();
        let mut whole = Lines::default();
        for ((_, path), lines) in files.iter().filter(|((of, _), _)| *of == row) {
            let module = modules.entry(module(folder, path)).or_default();
            for sum in [module, &mut whole] {
                *sum = Lines { all: sum.all + lines.all, covered: sum.covered + lines.covered };
            }
        }
        if modules.is_empty() {
            continue;
        }
        let missed = whole.percent() < *floor;
        good &= !missed;
        let verdict = if missed { "BELOW" } else { "at least" };
        print_line(whole, &format!("{folder}, {verdict} {floor} %"));
        modules.into_iter().for_each(|(name, lines)| print_line(lines, &format!("    {name}")));
    }
    good
}

fn print_line(lines: Lines, name: &str) {
    println!("{:>9} {:>9} {:>8.1}  {name}", lines.all, lines.covered, lines.percent());
}

/// The module at the top of a file's path below the folder and its `src`.
fn module<'a>(folder: &str, path: &'a str) -> &'a str {
    let below = path.strip_prefix(folder).unwrap_or(path).trim_start_matches('/');
    let below = below.strip_prefix("src/").unwrap_or(below);
    let first = below.split('/').next().unwrap_or(below);
    first.strip_suffix(".rs").unwrap_or(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_counted_line_by_line() {
        let report =
            "SF:/w/a.rs\nFN:1,f\nDA:1,5\nDA:2,0\nDA:3,1\nend_of_record\nSF:/w/b.rs\nDA:1,0\n";
        let files = parse(report);
        let counted: Vec<_> =
            files.into_iter().map(|(_, lines)| count(lines.into_iter())).collect();
        assert_eq!(counted, [Lines { all: 3, covered: 2 }, Lines { all: 1, covered: 0 }]);
    }

    #[test]
    fn a_file_counts_for_the_longest_folder_around_it() {
        let folder = |path: &str| floor_of(path).map(|row| FLOORS[row].0);
        assert_eq!(folder("vmm/machine/src/lib.rs"), Some("vmm/machine/src"));
        assert_eq!(folder("vmm/runtime/src/peer/mod.rs"), Some("vmm"));
        assert_eq!(folder("replication/src/wire_tests.rs"), None);
        assert_eq!(folder("replication/tests/sim/main.rs"), None);
        for of_tests in ["testing.rs", "testing/fake.rs", "interleavings/sync.rs"] {
            assert_eq!(folder(&format!("vmm/runtime/src/{of_tests}")), None, "{of_tests}");
        }
        assert_eq!(folder("xtask/src/main.rs"), None);
    }

    #[test]
    fn modules_are_named_by_their_first_folder() {
        assert_eq!(module("vmm", "vmm/runtime/src/peer/mod.rs"), "runtime");
        assert_eq!(module("replication/src", "replication/src/wire.rs"), "wire");
        assert_eq!(module("vmm", "vmm/host/src/tap.rs"), "host");
    }
}
