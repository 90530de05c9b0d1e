//! What is looked at: the Rust files and the documents of the checkout.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::path::Path;

/// Folders that are not part of the checkout, wherever they lie.
const NOT_OURS: &[&str] = &["target", "out", "artifacts"];

/// A Rust file.
pub struct Source {
    /// Its path from the workspace's root.
    pub path: String,
    pub text: String,
    pub syntax: syn::File,
}

/// A document in Markdown.
pub struct Document {
    /// Its path from the workspace's root.
    pub path: String,
    pub text: String,
}

/// A package of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its folder from the workspace's root, without a slash at the end.
    pub folder: String,
}

/// Everything that the rules are about.
pub struct Workspace {
    pub rust: Vec<Source>,
    pub documents: Vec<Document>,
    pub packages: Vec<Package>,
    /// Every file and folder, by its path from the workspace's root.
    pub paths: BTreeSet<String>,
}

impl Workspace {
    /// Reads the checkout that this program was built from.
    pub fn read() -> Result<Self, Box<dyn Error>> {
        let mut paths = BTreeSet::new();
        collect(crate::cargo::workspace(), "", &mut paths)?;
        let mut workspace =
            Self { rust: Vec::new(), documents: Vec::new(), packages: Vec::new(), paths };
        for path in workspace.paths.clone() {
            let read = || fs::read_to_string(crate::cargo::workspace().join(&path));
            if path.ends_with(".rs") {
                let source = Source::new(&path, read()?).map_err(|e| format!("{path}: {e}"))?;
                workspace.rust.push(source);
            } else if path.ends_with(".md") {
                workspace.documents.push(Document { text: read()?, path });
            } else if let Some(folder) = path.strip_suffix("/Cargo.toml") {
                workspace.packages.push(Package { folder: folder.to_owned() });
            }
        }
        Ok(workspace)
    }

    /// The Rust file with this path.
    pub fn source(&self, path: &str) -> Option<&Source> {
        let at = self.rust.binary_search_by(|source| source.path.as_str().cmp(path)).ok()?;
        self.rust.get(at)
    }
}

impl Source {
    /// A file with its syntax.
    pub fn new(path: &str, text: String) -> syn::Result<Self> {
        let syntax = syn::parse_file(&text)?;
        Ok(Self { path: path.to_owned(), text, syntax })
    }
}

fn collect(root: &Path, folder: &str, paths: &mut BTreeSet<String>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        if name == ".git" || NOT_OURS.contains(&name.as_str()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(root, &path, paths)?;
        }
        paths.insert(path);
    }
    Ok(())
}
