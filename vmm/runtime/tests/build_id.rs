//! What a build's name depends on, and what it does not.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::Path;

use tempfile::TempDir;

#[path = "../build.rs"]
#[allow(dead_code, reason = "the script's main is not called here")]
mod script;

/// A workspace with the folders and files that count.
fn workspace() -> TempDir {
    let root = TempDir::new().unwrap();
    for file in [
        "Cargo.toml",
        "Cargo.lock",
        "devices/Cargo.toml",
        "devices/src/board.rs",
        "devices/src/board/power.rs",
        "replication/Cargo.toml",
        "replication/src/lib.rs",
        "vmm/runtime/Cargo.toml",
        "vmm/runtime/build.rs",
        "vmm/cli/src/main.rs",
        "vmm/machine/templates/minimal.toml",
        "vmm/kvm/Cargo.toml",
        "vmm/kvm/src/lib.rs",
    ] {
        write(root.path(), file, file);
    }
    root
}

fn write(root: &Path, file: &str, content: &str) {
    let path = root.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn digest(root: &Path) -> u64 {
    script::Sources::of(root).unwrap().digest(root).unwrap()
}

#[test]
fn the_same_sources_have_the_same_name_in_any_folder() {
    let (one, other) = (workspace(), workspace());
    assert_eq!(digest(one.path()), digest(other.path()));
}

#[test]
fn every_change_of_a_source_changes_the_name() {
    let unchanged = digest(workspace().path());
    for file in [
        "Cargo.toml",
        "Cargo.lock",
        "devices/src/board/power.rs",
        "devices/src/new.rs",
        "replication/src/lib.rs",
        "vmm/runtime/build.rs",
        "vmm/machine/templates/minimal.toml",
        "vmm/kvm/Cargo.toml",
        "vmm/kvm/src/lib.rs",
    ] {
        let root = workspace();
        write(root.path(), file, "something else");
        assert_ne!(digest(root.path()), unchanged, "{file}");
    }
    let moved = workspace();
    let from = moved.path().join("devices/src/board.rs");
    fs::rename(from, moved.path().join("devices/src/c.rs")).unwrap();
    assert_ne!(digest(moved.path()), unchanged, "another name of a file");
}

#[test]
fn what_does_not_go_into_the_program_has_no_say() {
    let unchanged = digest(workspace().path());
    for file in [
        ".git/HEAD",
        "README.md",
        "docs/log-format.md",
        "tests/src/lib.rs",
        "vmm/runtime/tests/openapi.rs",
        "vmm/runtime/benches/exit.rs",
        "devices/src/board.rs.orig",
        "devices/src/.#board.rs",
        "target/debug/build.rs",
    ] {
        let root = workspace();
        write(root.path(), file, "something");
        assert_eq!(digest(root.path()), unchanged, "{file}");
    }
}

#[test]
fn these_sources_are_found() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    assert_ne!(digest(root), 0);
    assert_eq!(
        format!("{:016x}", digest(root)),
        ftvmm_runtime::build::NAME.split_once('+').unwrap().1
    );
}
