//! Which lines of a file are compiled for tests only.

use std::error::Error;
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

use super::modules::is_test;

/// The lines of a file that are under `#[cfg(test)]` or `#[test]`.
#[derive(Debug, Default)]
pub struct TestLines(Vec<RangeInclusive<usize>>);

impl TestLines {
    /// Those of this file.
    ///
    /// # Errors
    /// When it cannot be read, or is not Rust.
    pub fn of(path: &Path) -> Result<Self, Box<dyn Error>> {
        let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = fs::read_to_string(path).map_err(|error| at(&error))?;
        Ok(Self::of_file(&syn::parse_file(&text).map_err(|error| at(&error))?))
    }

    fn of_file(file: &syn::File) -> Self {
        let mut lines = Self::default();
        lines.visit_file(file);
        lines
    }

    /// Whether this line is one of them, counted from 1.
    pub fn contains(&self, line: usize) -> bool {
        self.0.iter().any(|range| range.contains(&line))
    }

    fn add(&mut self, attributes: &[syn::Attribute], span: proc_macro2::Span) {
        if is_test(attributes) {
            self.0.push(span.start().line..=span.end().line);
        }
    }
}

impl<'ast> Visit<'ast> for TestLines {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.add(&item.attrs, item.span());
        visit::visit_item_mod(self, item);
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.add(&item.attrs, item.span());
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        self.add(&item.attrs, item.span());
        visit::visit_item_impl(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.add(&item.attrs, item.span());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_left_out_and_nothing_else() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() {}\n}\n\
                    impl A {\n #[cfg(test)]\n fn c() {\n }\n fn d() {}\n}\n";
        let lines = TestLines::of_file(&syn::parse_file(text).unwrap());
        let tests: Vec<usize> = (1..=11).filter(|line| lines.contains(*line)).collect();
        assert_eq!(tests, [2, 3, 4, 5, 7, 8, 9]);
    }
}
