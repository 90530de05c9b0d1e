//! Names the build: `FTVMM_BUILD_ID` is the version and a digest of the sources that the guest's
//! execution depends on.
//!
//! Two hosts of a pair must run the same program, so the name has to differ when the sources do,
//! and must not differ when the same sources are built elsewhere: by another user, in another
//! folder, from an unpacked archive without git. So it is made of file names and contents alone.
//!
//! Taken are the sources of the crates that the program is made of, the manifests, and the
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
    let root = manifest.ancestors().nth(2).ok_or("the crate is in no workspace")?;
    let sources = Sources::of(root)?;
    for path in sources.folders.iter().chain(&sources.files) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    let (version, digest) = (env::var("CARGO_PKG_VERSION")?, sources.digest(root)?);
    println!("cargo:rustc-env=FTVMM_BUILD_ID={version}+{digest:016x}");
    Ok(())
}

/// What the program is made of.
#[derive(Default)]
pub struct Sources {
    files: Vec<PathBuf>,
    /// Folders in which every file counts, a new one too.
    folders: Vec<PathBuf>,
}

impl Sources {
    /// Those of the workspace in `root`.
    pub fn of(root: &Path) -> Result<Self, Box<dyn Error>> {
        let mut sources = Self::default();
        sources.files.extend(WORKSPACE_FILES.iter().map(|file| root.join(file)));
        for folder in FOLDERS {
            sources.add_crate(&root.join(folder))?;
        }
        Ok(sources)
    }

    /// Adds the files of the crate in `folder`, if there is one, and of those below it.
    fn add_crate(&mut self, folder: &Path) -> Result<(), Box<dyn Error>> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_str().unwrap_or_default();
            if !entry.file_type()?.is_dir() {
                if CRATE_FILES.contains(&name) {
                    self.files.push(path);
                }
            } else if SOURCE_FOLDERS.contains(&name) {
                self.add_sources(&path)?;
                self.folders.push(path);
            } else if !OTHER_FOLDERS.contains(&name) && !name.starts_with('.') {
                self.add_crate(&path)?;
            }
        }
        Ok(())
    }

    fn add_sources(&mut self, folder: &Path) -> Result<(), Box<dyn Error>> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let path = entry.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            let is_source = extension.is_some_and(|extension| EXTENSIONS.contains(&extension));
            if entry.file_type()?.is_dir() {
                self.add_sources(&path)?;
            } else if is_source && !entry.file_name().to_string_lossy().starts_with('.') {
                self.files.push(path);
            }
        }
        Ok(())
    }

    /// Digest of names and contents, in the order of the names.
    pub fn digest(&self, root: &Path) -> Result<u64, Box<dyn Error>> {
        let mut named = Vec::with_capacity(self.files.len());
        for file in &self.files {
            let name = file.strip_prefix(root)?.to_str().ok_or("a file's name is no text")?;
            let content = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
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
}
