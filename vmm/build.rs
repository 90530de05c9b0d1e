//! Names the build: `FTVMM_BUILD_ID` is the version and a digest of the sources that the guest's
//! execution depends on.
//!
//! Two hosts of a pair must run the same program, so the name has to differ when the sources do,
//! and must not differ when the same sources are built elsewhere: by another user, in another
//! folder, from an unpacked archive without git. So it is made of file names and contents alone.
//!
//! Taken are the sources of the three crates that the program is made of, the manifests, and the
//! lock file, which stands for every dependency. Tests and benches in folders of their own are left
//! out.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use xxhash_rust::xxh3::Xxh3Default;

/// The crates' folders; crates below them count too.
const FOLDERS: [&str; 3] = ["devices", "replication", "vmm"];
/// Files of the workspace that choose the dependencies.
const WORKSPACE_FILES: [&str; 2] = ["Cargo.toml", "Cargo.lock"];
/// Files of a crate besides its sources.
const CRATE_FILES: [&str; 2] = ["Cargo.toml", "build.rs"];
/// Folders of a crate that go into the program, whole.
const SOURCE_FOLDERS: [&str; 2] = ["src", "templates"];
/// Folders of a crate that do not.
const OTHER_FOLDERS: [&str; 6] =
    ["tests", "benches", "examples", "fuzz", "proptest-regressions", "target"];
/// What a source's name ends in; an editor's copies do not.
const EXTENSIONS: [&str; 2] = ["rs", "toml"];

fn main() -> Result<(), Box<dyn Error>> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = manifest.parent().ok_or("the crate is in no workspace")?;
    let mut files: Vec<PathBuf> = WORKSPACE_FILES.iter().map(|file| root.join(file)).collect();
    for folder in FOLDERS {
        add_crate(&root.join(folder), &mut files)?;
    }
    println!(
        "cargo:rustc-env=FTVMM_BUILD_ID={}+{:016x}",
        env::var("CARGO_PKG_VERSION")?,
        digest(root, files)?
    );
    Ok(())
}

/// Adds the files of the crate in `folder`, if there is one, and of those below it.
fn add_crate(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_str().unwrap_or_default();
        if !entry.file_type()?.is_dir() {
            if CRATE_FILES.contains(&name) {
                files.push(path);
            }
        } else if SOURCE_FOLDERS.contains(&name) {
            // The folder, so that a new file in it is seen.
            println!("cargo:rerun-if-changed={}", path.display());
            add_sources(&path, files)?;
        } else if !OTHER_FOLDERS.contains(&name) && !name.starts_with('.') {
            add_crate(&path, files)?;
        }
    }
    Ok(())
}

fn add_sources(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        let is_source = || {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
        };
        if entry.file_type()?.is_dir() {
            add_sources(&path, files)?;
        } else if !entry.file_name().to_string_lossy().starts_with('.') && is_source() {
            files.push(path);
        }
    }
    Ok(())
}

/// Digest of names and contents, in the order of the names.
fn digest(root: &Path, files: Vec<PathBuf>) -> Result<u64, Box<dyn Error>> {
    let mut named = Vec::with_capacity(files.len());
    for file in files {
        println!("cargo:rerun-if-changed={}", file.display());
        let name = file.strip_prefix(root)?.to_str().ok_or("a file's name is no text")?.to_owned();
        let content = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        named.push((name, content));
    }
    named.sort();
    let mut hasher = Xxh3Default::new();
    for (name, content) in &named {
        for bytes in [name.as_bytes(), content] {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
    }
    Ok(hasher.digest())
}
