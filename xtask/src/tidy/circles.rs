//! Circles of imports inside a crate.
//!
//! Modules are compared with their siblings: what anything below `a` names of anything below `b` is
//! an import of `b` by `a`. A module and the one around it are no circle: a folder's own file
//! builds on its parts, and the parts share what it declares.

use std::collections::{BTreeMap, BTreeSet};

use super::modules::{ModuleId, Modules};
use super::sources::Workspace;
use super::{Breach, Rule};

/// Imports among siblings, each with a place where one is written.
type Imports = BTreeMap<(ModuleId, ModuleId), String>;

/// Breaches in every crate of the workspace.
pub fn breaches(workspace: &Workspace) -> Vec<Breach> {
    let is_root = |path: &str| {
        path.ends_with("/src/lib.rs")
            || path.ends_with("/src/main.rs")
            || path.split_once("/src/bin/").is_some_and(|(_, name)| !name.contains('/'))
    };
    let roots = workspace.rust.iter().filter(|source| is_root(&source.path));
    roots.flat_map(|root| of_crate(workspace, &root.path)).collect()
}

fn of_crate(workspace: &Workspace, root: &str) -> Vec<Breach> {
    let modules = Modules::of(workspace, root);
    let imports = imports(&modules);
    let ids: BTreeSet<ModuleId> = imports.keys().flat_map(|&(from, to)| [from, to]).collect();
    let reached: BTreeMap<_, _> = ids.iter().map(|&id| (id, reached(id, &imports))).collect();
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for &id in &ids {
        let circle: BTreeSet<_> =
            reached[&id].iter().copied().filter(|other| reached[other].contains(&id)).collect();
        if circle.len() > 1 && seen.insert(circle.clone()) {
            found.push(breach(root, &modules, &imports, &circle));
        }
    }
    found
}

fn imports(modules: &Modules) -> Imports {
    let mut imports = Imports::new();
    for (id, module) in modules.0.iter().enumerate() {
        for named in module.paths.iter().filter(|named| named.segments.len() > 1) {
            let Some(target) = modules.resolve(id, &named.segments) else { continue };
            let (from, to) = (modules.line_of(id), modules.line_of(target));
            let differ = from.iter().zip(&to).find(|(from, to)| from != to);
            if let Some((&from, &to)) = differ {
                let place = format!("{}:{}", module.file, named.line);
                imports.entry((from, to)).or_insert(place);
            }
        }
    }
    imports
}

/// What a module imports, directly or not.
fn reached(from: ModuleId, imports: &Imports) -> BTreeSet<ModuleId> {
    let mut reached = BTreeSet::new();
    let mut waiting = vec![from];
    while let Some(at) = waiting.pop() {
        let next = imports.keys().filter(|(from, _)| *from == at).map(|(_, to)| *to);
        waiting.extend(next.filter(|&to| reached.insert(to)));
    }
    reached
}

fn breach(root: &str, modules: &Modules, imports: &Imports, circle: &BTreeSet<ModuleId>) -> Breach {
    let name = |id: &ModuleId| modules.0[*id].name.as_str();
    let mut names: Vec<_> = circle.iter().map(name).collect();
    names.sort_unstable();
    let around = circle.first().map(|&id| modules.line_of(id)).unwrap_or_default();
    let around: Vec<_> = around.iter().rev().skip(1).rev().skip(1).map(name).collect();
    let crate_folder = root.rsplit_once('/').map_or(root, |(folder, _)| folder);
    let folder = [&[crate_folder][..], &around].concat().join("/");
    let inside = imports.iter().filter(|((f, t), _)| circle.contains(f) && circle.contains(t));
    let places: Vec<_> =
        inside.map(|((f, t), place)| format!("{} -> {}: {place}", name(f), name(t))).collect();
    Breach {
        rule: Rule::Circle,
        subject: format!("{folder}: {}", names.join(", ")),
        amount: 1,
        place: places.join("\n    "),
    }
}

#[cfg(test)]
mod tests {
    use super::super::modules::tests::workspace;
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        breaches(&workspace(files)).into_iter().map(|breach| breach.subject).collect()
    }

    #[test]
    fn a_circle_through_a_re_export_and_a_child_is_found() {
        let found = circles(&[
            ("x/src/lib.rs", "mod a; mod b; mod c; pub use a::Thing;"),
            ("x/src/a.rs", "mod child; pub struct Thing;"),
            ("x/src/a/child.rs", "fn f() { crate::b::work() }"),
            ("x/src/b.rs", "use crate::{Thing, c};"),
            ("x/src/c.rs", ""),
        ]);
        assert_eq!(found, ["x/src: a, b"]);
    }

    #[test]
    fn a_circle_inside_a_folder_names_the_folder() {
        let found = circles(&[
            ("x/src/lib.rs", "mod session;"),
            ("x/src/session/mod.rs", "mod backup; mod primary;"),
            ("x/src/session/backup.rs", "use super::primary::P;"),
            ("x/src/session/primary.rs", "use crate::session::backup;"),
        ]);
        assert_eq!(found, ["x/src/session: backup, primary"]);
    }

    #[test]
    fn parents_and_tests_make_no_circle() {
        let found = circles(&[
            ("x/src/lib.rs", "mod a; mod b; fn f() { a::g() }"),
            ("x/src/a.rs", "use crate::f; use crate::b::B; pub fn g() {}"),
            ("x/src/b.rs", "pub struct B; #[cfg(test)] mod tests { use crate::a; }"),
        ]);
        assert_eq!(found, [""; 0]);
    }
}
