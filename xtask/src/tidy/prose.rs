//! The sentences and diagrams of documents and of comments.

use super::sources::Workspace;

/// A line that a person wrote for persons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    /// The file it is in.
    pub path: &'a str,
    /// Counted from 1.
    pub number: usize,
    pub text: &'a str,
    pub kind: Kind,
}

/// What kind of line it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Part of a sentence, a list or a table.
    Prose,
    /// Part of a diagram: a block of code that names no language, or `text`.
    Diagram,
    /// Part of an example in some language.
    Example,
}

/// Whether a line cannot be wrapped because of a link.
pub fn is_link(line: &str) -> bool {
    line.contains("://") || line.contains("](")
}

/// Every line of every document, and every comment of every Rust file.
pub fn lines(workspace: &Workspace) -> Vec<Line<'_>> {
    let mut lines = Vec::new();
    for document in &workspace.documents {
        add(&document.path, document.text.lines().enumerate(), &mut lines);
    }
    for source in &workspace.rust {
        let comments = source.text.lines().enumerate();
        let comments = comments.filter_map(|(at, line)| Some((at, comment(line)?)));
        add(&source.path, comments, &mut lines);
    }
    lines
}

fn comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    Some(text.strip_prefix(['!', '/']).unwrap_or(text))
}

fn add<'a>(
    path: &'a str,
    texts: impl Iterator<Item = (usize, &'a str)>,
    lines: &mut Vec<Line<'a>>,
) {
    let mut block = Kind::Prose;
    let mut before = None;
    for (at, text) in texts {
        // A block of one comment does not go on in another.
        if before.is_some_and(|before| before + 1 != at) {
            block = Kind::Prose;
        }
        before = Some(at);
        if let Some(language) = text.trim_start().strip_prefix("```") {
            block = match (block, language) {
                (Kind::Prose, "" | "text") => Kind::Diagram,
                (Kind::Prose, _) => Kind::Example,
                _ => Kind::Prose,
            };
        } else {
            lines.push(Line { path, number: at + 1, text, kind: block });
        }
    }
}

impl<'a> Line<'a> {
    /// Its words, in the alphabet of paths and of names.
    pub fn words(self) -> impl Iterator<Item = &'a str> {
        let is_part = |c: char| c.is_alphanumeric() || "_./:<>*$~{}-".contains(c);
        let words = self.text.split(move |c: char| !is_part(c));
        words.map(|word| word.trim_matches(['.', ':', '-'])).filter(|word| !word.is_empty())
    }

    /// What stands between backticks.
    pub fn code(self) -> impl Iterator<Item = &'a str> {
        self.text.split('`').skip(1).step_by(2)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The lines of one document or of one file's comments.
    pub fn lines_of<'a>(path: &'a str, text: &'a str) -> Vec<Line<'a>> {
        let mut lines = Vec::new();
        add(path, text.lines().enumerate(), &mut lines);
        lines
    }

    #[test]
    fn blocks_are_told_by_their_language() {
        let lines = lines_of("a.md", "x\n```text\ny\n```\nz\n```sh\nw\n```\n");
        let kinds: Vec<_> = lines.iter().map(|line| (line.text, line.kind)).collect();
        let expected = [("x", Kind::Prose), ("y", Kind::Diagram), ("z", Kind::Prose)];
        assert_eq!(kinds, [&expected[..], &[("w", Kind::Example)]].concat());
    }

    #[test]
    fn words_and_code_are_cut_out_of_punctuation() {
        let lines = lines_of("a.md", "See `a/b.rs` (and [c](docs/c.md)), or `T::f`.");
        let words: Vec<_> = lines[0].words().collect();
        assert_eq!(words, ["See", "a/b.rs", "and", "c", "docs/c.md", "or", "T::f"]);
        assert_eq!(lines[0].code().collect::<Vec<_>>(), ["a/b.rs", "T::f"]);
    }

    #[test]
    fn comments_are_told_from_code() {
        assert_eq!(comment("    /// text"), Some(" text"));
        assert_eq!(comment("//! text"), Some(" text"));
        assert_eq!(comment("let a = 1; // not alone"), None);
    }
}
