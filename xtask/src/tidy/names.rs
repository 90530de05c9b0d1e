//! Names of types that documents and modules' diagrams use: each is in the code.

use std::collections::BTreeSet;

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens as _;

use super::prose::{Kind, Line, lines};
use super::sources::Workspace;
use super::{Breach, Rule};

/// Breaches, one for each file and each name.
pub fn breaches(workspace: &Workspace) -> Vec<Breach> {
    let mut known = BTreeSet::new();
    for source in &workspace.rust {
        identifiers(source.syntax.to_token_stream(), &mut known);
    }
    let mut found = Vec::new();
    for line in lines(workspace) {
        // rustdoc looks after a comment's links; its diagrams are nobody's but ours.
        let is_document = line.path.ends_with(".md");
        for name in names(&line).into_iter().filter(|_| is_document || line.kind == Kind::Diagram) {
            if name.split("::").any(|part| !known.contains(part)) {
                found.push(Breach {
                    rule: Rule::Name,
                    subject: format!("{}: {name}", line.path),
                    amount: 1,
                    place: format!("{}:{}", line.path, line.number),
                });
            }
        }
    }
    found
}

/// Every identifier of the code: comments are no tokens.
fn identifiers(tokens: TokenStream, known: &mut BTreeSet<String>) {
    for token in tokens {
        match token {
            TokenTree::Ident(ident) => {
                known.insert(ident.to_string().trim_start_matches("r#").to_owned());
            }
            TokenTree::Group(group) => identifiers(group.stream(), known),
            _ => {}
        }
    }
}

/// The names of types in a line: `Board` or `Board::mmio_write` between backticks, in a diagram
/// what can be no English word, such as `ReplayCursor`.
fn names<'a>(line: &Line<'a>) -> Vec<&'a str> {
    match line.kind {
        Kind::Example => Vec::new(),
        Kind::Diagram => {
            let parts = line.words().flat_map(|word| word.split(['<', '>', '/', '-']));
            parts.filter(|part| is_compound(part) || is_member(part)).collect()
        }
        Kind::Prose => {
            let bare = |code: &'a str| code.split('(').next().unwrap_or(code);
            line.code().map(bare).filter(|code| is_type(code) || is_member(code)).collect()
        }
    }
}

fn is_identifier(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// `Board`, but neither `KVM_RUN` nor `A`.
fn is_type(word: &str) -> bool {
    is_identifier(word)
        && word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.contains(|c: char| c.is_ascii_lowercase())
        && !word.contains('_')
}

/// `ReplayCursor`, but neither `Replay` nor `MiB` nor `DMA`.
fn is_compound(word: &str) -> bool {
    let starts = word.char_indices().filter(|(at, c)| {
        c.is_ascii_uppercase() && word[at + 1..].starts_with(|next: char| next.is_ascii_lowercase())
    });
    is_type(word) && starts.count() > 1
}

/// `Board::mmio_write`.
fn is_member(word: &str) -> bool {
    let Some((of, _)) = word.rsplit_once("::") else { return false };
    let starts = of.rsplit("::").next().unwrap_or(of);
    is_type(starts) && word.split("::").all(is_identifier)
}

#[cfg(test)]
mod tests {
    use super::super::modules::tests::workspace;
    use super::super::prose::tests::lines_of;
    use super::super::sources::Document;
    use super::*;

    fn names_of(text: &str) -> Vec<String> {
        let lines = lines_of("a.md", text);
        lines.iter().flat_map(names).map(str::to_owned).collect()
    }

    #[test]
    fn names_are_told_from_words() {
        let text =
            "The `Board` calls `Vcpu::run(mode)`, `KVM_RUN`, `kvm` and `README`. Board and Nobody.";
        assert_eq!(names_of(text), ["Board", "Vcpu::run"]);
        let text = "```text\nBoard ─► Recorded<LiveInputs, FileLog> of 3 MiB / PeerOutputs\n```";
        assert_eq!(names_of(text), ["LiveInputs", "FileLog", "PeerOutputs"]);
    }

    #[test]
    fn a_name_that_only_a_comment_has_is_missing() {
        let mut workspace = workspace(&[(
            "a.rs",
            "//! ```text\n//! Taken ─► LostThing\n//! ```\n\
             // struct Gone;\nstruct Taken { member: u8 }\n",
        )]);
        let text = "`Taken`, `Taken::member`, `Gone`, `Taken::none`".to_owned();
        workspace.documents.push(Document { path: "d.md".to_owned(), text });
        let subjects: Vec<_> = breaches(&workspace).into_iter().map(|b| b.subject).collect();
        assert_eq!(subjects, ["d.md: Gone", "d.md: Taken::none", "a.rs: LostThing"]);
    }
}
