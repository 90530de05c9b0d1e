//! The modules of a crate, and what each names.
//!
//! Only what the product compiles: whatever is under `#[cfg(test)]` is left out, with the files it
//! brings in.

use std::collections::BTreeMap;

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use quote::ToTokens as _;
use syn::Item;

use super::sources::Workspace;

/// Names are followed through at most this many `use`.
const DEPTH_MAX: usize = 16;

/// A module's place in [`Modules`].
pub type ModuleId = usize;

/// A path as it is written: `crate::a::B`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Named {
    pub segments: Vec<String>,
    pub line: usize,
}

/// One module.
#[derive(Debug, Default)]
pub struct Module {
    pub name: String,
    /// The file it is written in.
    pub file: String,
    pub parent: Option<ModuleId>,
    children: BTreeMap<String, ModuleId>,
    /// What `use` brings in, by the name it has here.
    aliases: BTreeMap<String, Vec<String>>,
    globs: Vec<Vec<String>>,
    /// Every path that is written in it, imports among them.
    pub paths: Vec<Named>,
}

/// All modules of one crate; the first is its root.
#[derive(Debug, Default)]
pub struct Modules(pub Vec<Module>);

impl Modules {
    /// The crate whose root is this file.
    pub fn of(workspace: &Workspace, root: &str) -> Self {
        let mut modules = Self::default();
        if let Some(source) = workspace.source(root) {
            let folder = root.rsplit_once('/').map_or("", |(folder, _)| folder);
            modules.add(workspace, "crate", root, folder, None, &source.syntax.items);
        }
        modules
    }

    /// Adds a module; `folder` is where the files of its children lie.
    fn add(
        &mut self,
        workspace: &Workspace,
        name: &str,
        file: &str,
        folder: &str,
        parent: Option<ModuleId>,
        items: &[Item],
    ) -> ModuleId {
        let id = self.0.len();
        let (name_here, file_here) = (name.to_owned(), file.to_owned());
        self.0.push(Module { name: name_here, file: file_here, parent, ..Module::default() });
        for item in items.iter().filter(|item| !is_test(attributes(item))) {
            match item {
                Item::Mod(inner) => {
                    let name = inner.ident.to_string();
                    let below = format!("{folder}/{name}");
                    let child = if let Some((_, items)) = &inner.content {
                        Some(self.add(workspace, &name, file, &below, Some(id), items))
                    } else {
                        let files = [format!("{below}.rs"), format!("{below}/mod.rs")];
                        files.iter().find_map(|file| workspace.source(file)).map(|source| {
                            let items = &source.syntax.items;
                            self.add(workspace, &name, &source.path, &below, Some(id), items)
                        })
                    };
                    self.0[id].children.extend(child.map(|child| (name, child)));
                }
                Item::Use(import) => self.import(id, &[], &import.tree),
                _ => {}
            }
            if !matches!(item, Item::Mod(_)) {
                written(without_tests(item), &mut self.0[id].paths);
            }
        }
        id
    }

    fn import(&mut self, id: ModuleId, before: &[String], tree: &syn::UseTree) {
        let with = |ident: &syn::Ident| [before, &[ident.to_string()]].concat();
        let (name, path) = match tree {
            syn::UseTree::Path(path) => return self.import(id, &with(&path.ident), &path.tree),
            syn::UseTree::Group(group) => {
                return group.items.iter().for_each(|tree| self.import(id, before, tree));
            }
            syn::UseTree::Glob(_) => return self.0[id].globs.push(before.to_vec()),
            syn::UseTree::Name(name) if name.ident == "self" => {
                (before.last().cloned().unwrap_or_default(), before.to_vec())
            }
            syn::UseTree::Name(name) => (name.ident.to_string(), with(&name.ident)),
            syn::UseTree::Rename(rename) => (rename.rename.to_string(), with(&rename.ident)),
        };
        self.0[id].aliases.insert(name, path);
    }

    /// The module that has what this path names; none when it is of another crate.
    pub fn resolve(&self, from: ModuleId, segments: &[String]) -> Option<ModuleId> {
        self.resolve_in(from, segments, DEPTH_MAX)
    }

    fn resolve_in(&self, from: ModuleId, segments: &[String], depth: usize) -> Option<ModuleId> {
        let depth = depth.checked_sub(1)?;
        let (first, mut rest) = segments.split_first()?;
        let mut at = match first.as_str() {
            "crate" => 0,
            "self" => from,
            "super" => self.0[from].parent?,
            _ => {
                let found = self.member(from, first, depth)?;
                // An item of this very module: nobody else is named.
                if found == from {
                    return None;
                }
                found
            }
        };
        while let Some((next, after)) = rest.split_first() {
            at = match next.as_str() {
                "super" => self.0[at].parent?,
                _ => self.member(at, next, depth).unwrap_or(at),
            };
            rest = after;
        }
        Some(at)
    }

    /// The module that a name inside a module leads to: a child, or where an import comes from.
    fn member(&self, at: ModuleId, name: &str, depth: usize) -> Option<ModuleId> {
        let module = &self.0[at];
        if let Some(child) = module.children.get(name) {
            return Some(*child);
        }
        if let Some(path) = module.aliases.get(name) {
            return self.resolve_in(at, path, depth);
        }
        module.globs.iter().find_map(|glob| {
            let from = self.resolve_in(at, glob, depth)?;
            (from != at).then(|| self.0[from].children.get(name).copied()).flatten()
        })
    }

    /// A module and all around it, the root first.
    pub fn line_of(&self, id: ModuleId) -> Vec<ModuleId> {
        let mut line: Vec<_> = std::iter::successors(Some(id), |&at| self.0[at].parent).collect();
        line.reverse();
        line
    }
}

fn attributes(item: &Item) -> &[syn::Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether these attributes leave the item out of the product.
pub fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::List(list) if list.path.is_ident("cfg") => list
            .tokens
            .to_string()
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|word| word == "test"),
        _ => false,
    })
}

fn without_tests(item: &Item) -> TokenStream {
    let Item::Impl(block) = item else { return item.to_token_stream() };
    let mut block = block.clone();
    block.items.retain(|item| match item {
        syn::ImplItem::Fn(item) => !is_test(&item.attrs),
        syn::ImplItem::Const(item) => !is_test(&item.attrs),
        _ => true,
    });
    block.to_token_stream()
}

/// Every path in these tokens, inside macros too; a group in braces after `::` makes one for each
/// of its parts.
fn written(tokens: TokenStream, found: &mut Vec<Named>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            TokenTree::Ident(_) => at = path(&tokens, at, &[], found),
            TokenTree::Group(group) => {
                written(group.stream(), found);
                at += 1;
            }
            _ => at += 1,
        }
    }
}

/// Reads one path from `at` on; returns what follows it.
fn path(tokens: &[TokenTree], mut at: usize, before: &[String], found: &mut Vec<Named>) -> usize {
    let mut segments = before.to_vec();
    let mut line = 0;
    while let Some(TokenTree::Ident(ident)) = tokens.get(at) {
        segments.push(ident.to_string());
        line = ident.span().start().line;
        at += 1;
        if !is_colons(tokens, at) {
            break;
        }
        at += 2;
        if let Some(TokenTree::Group(group)) = tokens.get(at)
            && group.delimiter() == Delimiter::Brace
        {
            let inner: Vec<TokenTree> = group.stream().into_iter().collect();
            let mut from = 0;
            while from < inner.len() {
                let is_ident = matches!(inner[from], TokenTree::Ident(_));
                from = if is_ident { path(&inner, from, &segments, found) } else { from + 1 };
            }
            return at + 1;
        }
    }
    found.push(Named { segments, line });
    at
}

fn is_colons(tokens: &[TokenTree], at: usize) -> bool {
    let is_colon = |at: usize| match tokens.get(at) {
        Some(TokenTree::Punct(punct)) => punct.as_char() == ':',
        _ => false,
    };
    is_colon(at) && is_colon(at + 1)
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::tidy::sources::Source;

    /// A workspace of these files.
    pub fn workspace(files: &[(&str, &str)]) -> Workspace {
        let rust = files.iter().map(|(path, text)| Source::new(path, (*text).to_owned()).unwrap());
        let mut rust: Vec<_> = rust.collect();
        rust.sort_by(|a, b| a.path.cmp(&b.path));
        let (documents, packages, paths) = (Vec::new(), Vec::new(), BTreeSet::new());
        Workspace { rust, documents, packages, paths }
    }

    fn paths_of(text: &str) -> Vec<String> {
        let workspace = workspace(&[("src/lib.rs", text)]);
        let modules = Modules::of(&workspace, "src/lib.rs");
        modules.0[0].paths.iter().map(|named| named.segments.join("::")).collect()
    }

    #[test]
    fn paths_are_found_in_groups_bodies_and_macros_but_not_in_tests() {
        let found = paths_of(
            "use std::{fs::File, net};\n\
             fn f() { assert!(crate::a::B == 1); }\n\
             #[cfg(test)] fn g() { std::thread::sleep(x) }\n\
             impl T { #[cfg(test)] fn h() { std::env::args(); } }\n",
        );
        for wanted in ["std::fs::File", "std::net", "crate::a::B"] {
            assert!(found.iter().any(|path| path == wanted), "{wanted} in {found:?}");
        }
        assert!(!found.iter().any(|path| path.contains("thread") || path.contains("env")));
    }

    #[test]
    fn a_name_is_followed_through_re_exports_to_its_module() {
        let workspace = workspace(&[
            ("src/lib.rs", "mod a;\nmod b;\npub use b::Thing as Other;\n"),
            ("src/a.rs", "use crate::Other;\n"),
            ("src/b.rs", "mod inner;\npub use self::inner::Thing;\n"),
            ("src/b/inner.rs", "pub struct Thing;\n"),
        ]);
        let modules = Modules::of(&workspace, "src/lib.rs");
        let find = |name: &str| modules.0.iter().position(|module| module.name == name).unwrap();
        let path = |text: &str| text.split("::").map(str::to_owned).collect::<Vec<_>>();
        let from = find("a");
        assert_eq!(modules.resolve(from, &path("crate::Other")), Some(find("inner")));
        assert_eq!(modules.resolve(from, &path("super::b::Absent")), Some(find("b")));
        assert_eq!(modules.resolve(from, &path("serde::Serialize")), None);
    }
}
