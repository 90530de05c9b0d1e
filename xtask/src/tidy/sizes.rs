//! Lengths of files, functions and lines, and the header of each file.

use proc_macro2::Span;
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

use super::prose::is_link;
use super::sources::{Document, Source, Workspace};
use super::{Breach, Rule};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;
const FIELDS_MAX: usize = 15;
/// What only plain data derives.
const OF_PLAIN_DATA: [&str; 3] = ["Serialize", "Deserialize", "Args"];

/// Breaches of the rules about lengths and headers.
pub fn breaches(workspace: &Workspace) -> Vec<Breach> {
    let mut found = Vec::new();
    for source in &workspace.rust {
        found.extend(file(source));
        found.extend(functions(source));
        found.extend(columns(&source.path, code(source)));
    }
    for document in &workspace.documents {
        found.extend(columns(&document.path, prose(document)));
    }
    found
}

fn file(source: &Source) -> Vec<Breach> {
    let mut found = Vec::new();
    let lines = source.text.lines().count();
    let breach = |rule, amount| {
        let (subject, place) = (source.path.clone(), String::new());
        Breach { rule, subject, amount, place }
    };
    if lines > FILE_LINES_MAX {
        found.push(breach(Rule::FileLines, lines));
    }
    if !source.text.starts_with("//!") {
        found.push(breach(Rule::Header, 1));
    }
    found
}

/// The first lines with too many columns are named, and all are counted.
fn columns<'a>(path: &str, lines: impl Iterator<Item = (usize, &'a str)>) -> Option<Breach> {
    let is_long = |line: &str| line.chars().count() > COLUMNS_MAX && !is_link(line);
    let long: Vec<usize> = lines.filter(|(_, l)| is_long(l)).map(|(at, _)| at + 1).collect();
    let first: Vec<String> = long.iter().take(5).map(|line| format!("{path}:{line}")).collect();
    (!long.is_empty()).then(|| Breach {
        rule: Rule::Columns,
        subject: path.to_owned(),
        amount: long.len(),
        place: first.join(" "),
    })
}

/// The lines of a source but the rows of tables in its comments.
fn code(source: &Source) -> impl Iterator<Item = (usize, &str)> {
    let is_row = |line: &str| line.trim_start().starts_with("//! |");
    source.text.lines().enumerate().filter(move |(_, line)| !is_row(line))
}

/// What a document says in sentences: no table, no block of code.
fn prose(document: &Document) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    document.text.lines().enumerate().filter(move |(_, line)| {
        let line = line.trim_start();
        let fence = line.starts_with("```");
        in_code ^= fence;
        !fence && !in_code && !line.starts_with('|')
    })
}

fn functions(source: &Source) -> Vec<Breach> {
    let mut functions = Functions { path: &source.path, place: Vec::new(), found: Vec::new() };
    functions.visit_file(&source.syntax);
    functions.found
}

/// Measures functions, from `fn` to the closing brace, and counts the fields of structs.
struct Functions<'a> {
    path: &'a str,
    /// The types and modules around the function.
    place: Vec<String>,
    found: Vec<Breach>,
}

impl Functions<'_> {
    fn measure(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let first = signature.fn_token.span().start().line;
        let lines = Span::end(&body.brace_token.span.close()).line - first + 1;
        if lines <= FUNCTION_LINES_MAX {
            return;
        }
        let name = signature.ident.to_string();
        let name = self.place.iter().chain([&name]).cloned().collect::<Vec<_>>().join("::");
        self.found.push(Breach {
            rule: Rule::FunctionLines,
            subject: format!("{} {name}", self.path),
            amount: lines,
            place: format!("{}:{first}", self.path),
        });
    }

    fn inside(&mut self, name: String, visit: impl FnOnce(&mut Self)) {
        self.place.push(name);
        visit(self);
        self.place.pop();
    }
}

/// Whether a derive says that the struct is plain data.
fn is_plain_data(attributes: &[syn::Attribute]) -> bool {
    let derives = attributes.iter().filter(|attribute| attribute.path().is_ident("derive"));
    derives.into_iter().any(|derive| {
        let mut is_plain = false;
        // Only a macro's argument that is no list of paths fails, and derives nothing.
        let _ = derive.parse_nested_meta(|meta| {
            let last = meta.path.segments.last();
            is_plain |= last.is_some_and(|last| OF_PLAIN_DATA.iter().any(|d| last.ident == d));
            Ok(())
        });
        is_plain
    })
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        if item.fields.len() > FIELDS_MAX && !is_plain_data(&item.attrs) {
            let first = item.struct_token.span().start().line;
            self.found.push(Breach {
                rule: Rule::StructFields,
                subject: format!("{} {}", self.path, item.ident),
                amount: item.fields.len(),
                place: format!("{}:{first}", self.path),
            });
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.measure(&item.sig, &item.block);
        self.inside(item.sig.ident.to_string(), |inner| visit::visit_item_fn(inner, item));
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.measure(&item.sig, &item.block);
        self.inside(item.sig.ident.to_string(), |inner| visit::visit_impl_item_fn(inner, item));
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.measure(&item.sig, body);
        }
        self.inside(item.sig.ident.to_string(), |inner| visit::visit_trait_item_fn(inner, item));
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let name = match &*item.self_ty {
            syn::Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()),
            _ => None,
        };
        let name = name.unwrap_or_else(|| "impl".to_owned());
        self.inside(name, |inner| visit::visit_item_impl(inner, item));
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.inside(item.ident.to_string(), |inner| visit::visit_item_trait(inner, item));
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.inside(item.ident.to_string(), |inner| visit::visit_item_mod(inner, item));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(Rule, String, usize)> {
        let source = Source::new("a.rs", text.to_owned()).unwrap();
        let all = [file(&source), functions(&source)].concat();
        let all = all.into_iter().chain(columns("a.rs", text.lines().enumerate()));
        all.map(|breach| (breach.rule, breach.subject, breach.amount)).collect()
    }

    #[test]
    fn a_function_is_measured_from_fn_to_its_brace() {
        let with = |lines: usize| {
            let body = "        call();\n".repeat(lines - 2);
            format!("//! A.\nimpl Fits for Thing {{\n    fn work() {{\n{body}    }}\n}}\n")
        };
        assert_eq!(found(&with(70)), []);
        let expected = (Rule::FunctionLines, "a.rs Thing::work".to_owned(), 71);
        assert_eq!(found(&with(71)), [expected]);
    }

    #[test]
    fn only_plain_data_has_many_fields() {
        let with = |derive: &str, fields: usize| {
            let fields: String = (0..fields).map(|field| format!("    f{field}: u8,\n")).collect();
            format!("//! A.\n#[derive(Debug{derive})]\nstruct Thing {{\n{fields}}}\n")
        };
        assert_eq!(found(&with("", 15)), []);
        assert_eq!(found(&with(", serde::Serialize", 16)), []);
        let expected = (Rule::StructFields, "a.rs Thing".to_owned(), 16);
        assert_eq!(found(&with("", 16)), [expected]);
    }

    #[test]
    fn a_long_file_without_header_breaks_two_rules() {
        let text = "const _: () = ();\n".repeat(501);
        let of = |rule, amount| (rule, "a.rs".to_owned(), amount);
        assert_eq!(found(&text), [of(Rule::FileLines, 501), of(Rule::Header, 1)]);
    }

    #[test]
    fn columns_are_characters_and_links_may_be_long() {
        let line = |text: &str| found(&format!("//! {text}\n")).len();
        assert_eq!([line(&"é".repeat(96)), line(&"é".repeat(97))], [0, 1]);
        assert_eq!(line(&format!("see https://example.org/{}", "x".repeat(100))), 0);
    }

    #[test]
    fn tables_and_code_of_a_document_are_not_prose() {
        let text = "| cell |\ntext\n```text\ncode\n```\nmore\n".to_owned();
        let document = Document { path: "a.md".to_owned(), text };
        let lines: Vec<_> = prose(&document).collect();
        assert_eq!(lines, [(1, "text"), (5, "more")]);
    }
}
