//! `cargo xtask tidy`: the house rules of the whole workspace.
//!
//! Each rule finds breaches; `tidy.toml` at the workspace's root lists those that are let pass,
//! each with its reason. The list may only shrink: a breach that is not listed fails, one that grew
//! fails, and so does an entry that nothing needs any more. `--write` takes such entries out and
//! lowers the numbers of the others.
//!
//! A unit test of this module does the same, so `cargo test` finds what `cargo xtask tidy` finds.
//! It reads sources only: no build, no root, no program of this machine.

mod circles;
mod exceptions;
mod modules;
mod names;
mod paths;
mod prose;
mod sizes;
mod sources;
mod test_lines;
mod walls;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use self::exceptions::Exceptions;
use self::sources::Workspace;
pub use self::test_lines::TestLines;

/// Arguments of `cargo xtask tidy`.
#[derive(clap::Args)]
pub struct TidyArguments {
    /// Take exceptions that nothing needs out of tidy.toml, and lower the numbers of the others
    #[arg(long)]
    write: bool,
    /// With --write: list every new breach too, with this reason
    #[arg(long, requires = "write", value_name = "TEXT")]
    reason: Option<String>,
}

/// A house rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    Circle,
    Wall,
    FileLines,
    FunctionLines,
    StructFields,
    Columns,
    Header,
    Path,
    Name,
}

impl Rule {
    const ALL: [Self; 9] = [
        Self::Circle,
        Self::Wall,
        Self::FileLines,
        Self::FunctionLines,
        Self::StructFields,
        Self::Columns,
        Self::Header,
        Self::Path,
        Self::Name,
    ];

    /// Its table in `tidy.toml`.
    fn name(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Wall => "walls",
            Self::FileLines => "file-lines",
            Self::FunctionLines => "function-lines",
            Self::StructFields => "struct-fields",
            Self::Columns => "columns",
            Self::Header => "headers",
            Self::Path => "paths",
            Self::Name => "names",
        }
    }

    /// What it asks for.
    fn text(self) -> &'static str {
        match self {
            Self::Circle => "the modules of a folder import each other in one direction only",
            Self::Wall => {
                "a crate reaches only for what its place allows (xtask/src/tidy/walls.rs)"
            }
            Self::FileLines => "a Rust file has at most 500 lines",
            Self::FunctionLines => "a function has at most 70 lines",
            Self::StructFields => {
                "a struct has at most 15 fields, unless it is plain data: read or written as it \
                 is, or options of a command"
            }
            Self::Columns => {
                "a line of Rust or of a document's prose has at most 100 columns; the number is \
                 how many lines of the file have more"
            }
            Self::Header => "a source file begins with a comment that says what it is for",
            Self::Path => "a path that a document or a comment names exists",
            Self::Name => "a type that a document or a module's diagram names exists",
        }
    }
}

/// A place where a rule is broken.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Breach {
    rule: Rule,
    /// What breaks it, as `tidy.toml` names it.
    subject: String,
    /// How much: lines of a file, say. 1 where a rule is kept or broken and nothing between.
    amount: usize,
    /// Where to look, for a person.
    place: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, subject, amount, place } = self;
        write!(f, "{}: {subject}", rule.name())?;
        if *amount > 1 {
            write!(f, " ({amount})")?;
        }
        if place.is_empty() { Ok(()) } else { write!(f, "\n    {place}") }
    }
}

/// Looks at everything; with `--write` renews the list of exceptions instead of failing.
pub fn run(arguments: &TidyArguments) -> Result<ExitCode, Box<dyn Error>> {
    let breaches = breaches(&Workspace::read()?);
    let mut exceptions = Exceptions::read()?;
    if arguments.write {
        exceptions.renew(&breaches, arguments.reason.as_deref());
        exceptions.write()?;
    }
    let faults = exceptions.faults(&breaches);
    faults.iter().for_each(|fault| println!("{fault}"));
    if faults.is_empty() {
        println!("tidy: {} exceptions in tidy.toml, nothing beside them", exceptions.len());
        return Ok(ExitCode::SUCCESS);
    }
    println!("\ntidy: {} faults. The rules:", faults.len());
    Rule::ALL.iter().for_each(|rule| println!("  {:<15} {}", rule.name(), rule.text()));
    Ok(ExitCode::FAILURE)
}

/// Every breach of every rule; those of one subject are one.
fn breaches(workspace: &Workspace) -> Vec<Breach> {
    let mut found = sizes::breaches(workspace);
    found.extend(circles::breaches(workspace));
    found.extend(walls::breaches(workspace));
    found.extend(paths::breaches(workspace));
    found.extend(names::breaches(workspace));
    let mut merged = BTreeMap::<(Rule, String), Breach>::new();
    for breach in found {
        let key = (breach.rule, breach.subject.clone());
        let known = merged.entry(key).or_insert_with(|| breach.clone());
        known.amount = known.amount.max(breach.amount);
    }
    merged.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_tidy() {
        let workspace = Workspace::read().unwrap();
        assert!(workspace.rust.len() > 100, "the sources were not found");
        let faults = Exceptions::read().unwrap().faults(&breaches(&workspace));
        let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
        assert!(faults.is_empty(), "cargo xtask tidy says:\n{}", faults.join("\n"));
    }
}
