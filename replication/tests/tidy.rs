//! House rules of this crate: it decides and does no I/O.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};

/// What the crate may not reach for, and where it lives instead.
const BANNED: [(&str, &str); 8] = [
    ("std::net", "transports live in vmm"),
    ("std::fs", "files are opened in vmm; formats work over Read and Write"),
    ("std::thread", "one thread steps a session"),
    ("std::env", "configuration arrives as arguments"),
    ("std::process", "a stop is an action"),
    ("Instant", "time arrives as now_ns"),
    ("SystemTime", "time arrives as now_ns"),
    ("unsafe {", "there is none"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn offences(text: &str) -> Vec<&'static str> {
    // `use std::{fs, net}` would hide from a plain search.
    let grouped = text.trim_start().starts_with("use std::{");
    let flat = if grouped { text.replace(['{', ' '], " std::") } else { String::new() };
    BANNED
        .iter()
        .filter(|(name, _)| text.contains(name) || flat.contains(name))
        .map(|b| b.0)
        .collect()
}

#[test]
fn sources_do_no_io() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files.len() > 15, "the sources were not found");
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            let offences = offences(line);
            assert!(offences.is_empty(), "{}:{}: {offences:?}", file.display(), number + 1);
            assert!(line.chars().count() <= 100, "{}:{} is long", file.display(), number + 1);
        }
        assert!(text.lines().count() <= 500, "{} is more than one idea", file.display());
        assert!(text.starts_with("//!"), "{} has no header", file.display());
    }
}

#[test]
fn offences_are_found() {
    assert_eq!(offences("use std::fs::File;"), ["std::fs"]);
    assert_eq!(offences("use std::{io, net};"), ["std::net"]);
    assert_eq!(offences("use std::{thread, io};"), ["std::thread"]);
    assert_eq!(offences("let now = Instant::now();"), ["Instant"]);
    assert!(offences("use std::io::{Read, Write};").is_empty());
}
