//! Paths that documents and comments name: each exists.

use super::prose::{Kind, Line, is_link, lines};
use super::sources::{Package, Workspace};
use super::{Breach, Rule};

/// A word that ends with one of these is the name of a file of ours.
const ENDINGS: &[&str] = &[".rs", ".md", ".toml", ".yaml"];
/// A path that begins here is made by a run.
const MADE: &[&str] = &["out/", "target/"];

/// Breaches, one for each file and each path that it names.
pub fn breaches(workspace: &Workspace) -> Vec<Breach> {
    let mut found = Vec::new();
    for line in lines(workspace).iter().filter(|line| line.kind != Kind::Example) {
        let words = line.words().filter(|word| !is_web(line, word));
        for word in words.filter(|word| is_path(word, workspace) && !exists(word, line, workspace))
        {
            found.push(Breach {
                rule: Rule::Path,
                subject: format!("{}: {word}", line.path),
                amount: 1,
                place: format!("{}:{}", line.path, line.number),
            });
        }
    }
    found
}

fn is_web(line: &Line, word: &str) -> bool {
    word.contains("://") || (is_link(line.text) && word.starts_with("//"))
}

/// Whether a word is meant as a path of this checkout.
fn is_path(word: &str, workspace: &Workspace) -> bool {
    let stands_for_others = word.contains(['<', '>', '*', '$', '~', '{', '}', ':']);
    if stands_for_others || word.starts_with('/') || MADE.iter().any(|made| word.starts_with(made))
    {
        return false;
    }
    let named = ENDINGS.iter().any(|ending| word.len() > ending.len() && word.ends_with(ending));
    let first = word.split_once('/').map(|(first, _)| first);
    // Words with a slash are no paths by that alone: read/write.
    let folder = first.is_some_and(|first| workspace.packages.iter().any(|p| top(p) == first))
        || first == Some("docs");
    named || folder
}

fn top(package: &Package) -> &str {
    package.folder.split('/').next().unwrap_or_default()
}

/// From the root, from the file's own folder, from its package's; a bare file name may be anywhere.
fn exists(word: &str, line: &Line, workspace: &Workspace) -> bool {
    let word = word.trim_end_matches('/').trim_start_matches("./");
    let mut own = line.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut rest = word;
    while let Some(up) = rest.strip_prefix("../") {
        own = own.rsplit_once('/').map_or("", |(folder, _)| folder);
        rest = up;
    }
    let package = workspace.packages.iter().map(|package| package.folder.as_str());
    let package = package.filter(|folder| line.path.starts_with(&format!("{folder}/"))).max();
    // A module's comment may name what lies below the module.
    let below = line.path.strip_suffix(".rs").map(str::to_owned);
    let folders = [Some(String::new()), Some(own.to_owned()), below];
    let of_package = package.filter(|_| line.path.ends_with(".rs"));
    let of_package = of_package.into_iter().flat_map(|p| [p.to_owned(), format!("{p}/src")]);
    let at = |folder: &str| {
        let path = if folder.is_empty() { rest.to_owned() } else { format!("{folder}/{rest}") };
        workspace.paths.contains(&path)
    };
    let anywhere = || workspace.paths.iter().any(|path| path.rsplit('/').next() == Some(word));
    folders.into_iter().flatten().chain(of_package).any(|folder| at(&folder))
        || (!word.contains('/') && anywhere())
}

#[cfg(test)]
mod tests {
    use super::super::modules::tests::workspace;
    use super::super::prose::tests::lines_of;
    use super::*;

    fn missing<'a>(path: &'a str, text: &'a str) -> Vec<&'a str> {
        let mut workspace = workspace(&[]);
        let paths = ["vmm", "vmm/src", "vmm/src/a", "vmm/src/a/b.rs", "docs/x.md", "docs/bench"];
        workspace.paths.extend(paths.map(str::to_owned));
        workspace.packages.push(Package { folder: "vmm".to_owned() });
        let lines = lines_of(path, text);
        let words = lines.into_iter().flat_map(|line| line.words().map(move |word| (line, word)));
        let words = words.filter(|(_, word)| is_path(word, &workspace));
        words.filter(|(line, word)| !exists(word, line, &workspace)).map(|(_, w)| w).collect()
    }

    #[test]
    fn a_document_names_paths_from_the_root_or_its_own_folder() {
        let text = "`vmm/src/a/b.rs`, [x](x.md), docs/x.md, `vmm/src/`, b.rs, and ../vmm/src/a";
        assert_eq!(missing("docs/y.md", text), [""; 0]);
        let text = "`a/b.rs`, design.md's, vmm/src/c and docs/none.md";
        assert_eq!(
            missing("docs/y.md", text),
            ["a/b.rs", "design.md", "vmm/src/c", "docs/none.md"]
        );
    }

    #[test]
    fn a_comment_may_name_paths_of_its_package() {
        assert_eq!(missing("vmm/src/c.rs", "a/b.rs src/a/b.rs"), [""; 0]);
        assert_eq!(missing("vmm/src/a.rs", "b.rs a/c.rs"), ["a/c.rs"]);
    }

    #[test]
    fn what_a_run_makes_or_a_word_stands_for_is_not_looked_for() {
        assert_eq!(
            missing("README.md", "out/x.md vmm/*.rs vmm/<run>.md 9.5/s read/write"),
            [""; 0]
        );
    }
}
