//! Every file of `fuzz/corpus` through its target: what a fuzzer starts from, and what one has
//! found. `FTVMM_RENEW_CORPUS=1` writes the seeds anew; a finding is added by hand, under another
//! name, and stays.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ftvmm_fuzz::{TARGETS, seeds};

/// What seeds are called; whatever has another name is a finding.
const SEED: &str = "seed-";
/// No larger file comes into the repository, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A target, a name, bytes.
type Seed = (&'static str, String, Vec<u8>);

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn corpus() -> PathBuf {
    here().join("corpus")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The golden file of this name, of whatever version.
fn golden(name: &str) -> PathBuf {
    let is_it = |path: &PathBuf| {
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        file.strip_prefix(name).is_some_and(|rest| rest.starts_with("-v"))
    };
    let all = files(&here().join("../replication/tests/golden"));
    all.into_iter().find(is_it).unwrap_or_else(|| panic!("no golden {name}"))
}

/// The examples of a golden file of text: a name with a colon, and lines of hexadecimal digits.
fn examples(name: &str) -> Vec<(String, Vec<u8>)> {
    let text = fs::read_to_string(golden(name)).unwrap();
    let mut examples: Vec<(String, Vec<u8>)> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("  "), examples.last_mut()) {
            (Some(digits), Some((_, bytes))) => {
                let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
                bytes.extend((0..digits.len()).step_by(2).map(byte));
            }
            _ => {
                let plain = line.trim_end_matches(':').to_lowercase();
                let name = plain.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
                examples.push((name, Vec::new()));
            }
        }
    }
    examples
}

/// Everything that a target can start from.
fn made() -> Vec<Seed> {
    let own = seeds::all().into_iter();
    let mut all: Vec<_> =
        own.map(|(target, name, bytes)| (target, name.to_owned(), bytes)).collect();
    for (name, message) in examples("messages") {
        // Behind length and checksum: tag and body, as the target takes them.
        if let Some(body) = message.get(8..).filter(|body| !body.is_empty()) {
            all.push(("wire", name, body.to_vec()));
        }
    }
    for (name, group) in examples("records") {
        // Behind a length of one byte and the checksum.
        all.push(("decode_group", name.clone(), group[5..].to_vec()));
        all.push(("log", name, group));
    }
    for (name, part) in examples("snapshot-parts") {
        all.push(("snapshot", name, part));
    }
    for (target, name) in [("log", "log"), ("snapshot", "snapshot")] {
        all.push((target, "whole".into(), fs::read(golden(name)).unwrap()));
    }
    all.push(("slice", "two-runs".into(), [&[1, 2, 0, 1][..], &[7; 8], &[3, 1], &[9; 8]].concat()));
    let page = [5; ftvmm_replication::PAGE_BYTES];
    all.push((
        "state_part",
        "page".into(),
        ftvmm_replication::state::pack([(1, &page[..])].into_iter()),
    ));
    all
}

/// What [`made`] has; it is in the repository too, or is written there now.
fn all_seeds() -> &'static [Seed] {
    static SEEDS: OnceLock<Vec<Seed>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let all = made();
        if std::env::var_os("FTVMM_RENEW_CORPUS").is_some() {
            renew(&all);
        }
        all
    })
}

#[test]
fn nothing_of_the_corpus_makes_a_target_panic() {
    all_seeds();
    let mut count = 0;
    for (target, run) in TARGETS {
        for file in files(&corpus().join(target)) {
            println!("{}", file.display());
            run(&fs::read(&file).unwrap());
            assert!(fs::metadata(&file).unwrap().len() <= FILE_BYTES_MAX, "{}", file.display());
            count += 1;
        }
    }
    assert!(count > 50, "only {count} files");
    for folder in files(&corpus()) {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        assert!(TARGETS.iter().any(|(target, _)| *target == name), "{name} is no target");
    }
}

#[test]
fn the_seeds_are_those_that_the_code_makes() {
    for (target, name, bytes) in all_seeds() {
        let file = corpus().join(target).join(format!("{SEED}{name}"));
        let kept = fs::read(&file).ok();
        let renew = "FTVMM_RENEW_CORPUS=1 cargo test -p ftvmm-fuzz --test corpus";
        assert_eq!(kept.as_ref(), Some(bytes), "{}: {renew}", file.display());
    }
}

fn renew(all: &[Seed]) {
    for (target, _) in TARGETS {
        for file in files(&corpus().join(target)) {
            if file.file_name().unwrap().to_string_lossy().starts_with(SEED) {
                fs::remove_file(file).unwrap();
            }
        }
    }
    for (target, name, bytes) in all {
        let folder = corpus().join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{SEED}{name}")), bytes).unwrap();
    }
}

#[test]
fn every_target_has_something_to_start_from() {
    let all = all_seeds();
    // The state of a machine is read by the same function as everything that postcard writes.
    for (target, _) in TARGETS.iter().filter(|(target, _)| *target != "machine_state") {
        assert!(all.iter().any(|(of, ..)| of == target), "{target} starts from nothing");
    }
}
