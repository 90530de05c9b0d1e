//! Walls between crates: what each may not reach for, and where that lives instead.

use std::collections::BTreeSet;

use super::modules::Modules;
use super::sources::Workspace;
use super::{Breach, Rule};

/// A crate and what is banned there.
struct Wall {
    /// The crate's root file.
    root: &'static str,
    banned: &'static [Ban],
}

/// The beginning of a path, and where it lives instead.
type Ban = (&'static str, &'static str);

const HOST: &[Ban] = &[
    ("kvm_bindings", "KVM is vmm's"),
    ("kvm_ioctls", "KVM is vmm's"),
    ("libc", "the host is vmm's"),
    ("nix", "the host is vmm's"),
    ("vmm_sys_util", "the host is vmm's"),
];

const WALLS: &[Wall] = &[
    Wall { root: "devices/src/lib.rs", banned: HOST },
    Wall { root: "devices/src/lib.rs", banned: IO },
    Wall { root: "replication/src/lib.rs", banned: HOST },
    Wall { root: "replication/src/lib.rs", banned: IO },
];

const IO: &[Ban] = &[
    ("std::env", "configuration arrives as arguments"),
    ("std::fs", "files are opened in vmm; formats work over Read and Write"),
    ("std::net", "transports live in vmm"),
    ("std::os", "descriptors live in vmm"),
    ("std::process", "a stop is a value that is returned"),
    ("std::sync", "one thread steps it"),
    ("std::thread", "one thread steps it"),
    ("std::time", "time arrives as an argument in nanoseconds"),
];

/// Breaches of the walls, tests aside.
pub fn breaches(workspace: &Workspace) -> Vec<Breach> {
    WALLS.iter().flat_map(|wall| of(workspace, wall)).collect()
}

fn of(workspace: &Workspace, wall: &Wall) -> Vec<Breach> {
    let modules = Modules::of(workspace, wall.root);
    let mut found = BTreeSet::new();
    for module in &modules.0 {
        for named in &module.paths {
            for (banned, instead) in wall.banned {
                if is_inside(&named.segments, banned) {
                    let place = format!("{}:{}: {instead}", module.file, named.line);
                    found.insert((format!("{}: {banned}", module.file), place));
                }
            }
        }
    }
    let breach = |(subject, place)| Breach { rule: Rule::Wall, subject, amount: 1, place };
    found.into_iter().map(breach).collect()
}

fn is_inside(path: &[String], banned: &str) -> bool {
    let mut path = path.iter();
    banned.split("::").all(|segment| path.next().is_some_and(|own| own == segment))
}

#[cfg(test)]
mod tests {
    use super::super::modules::tests::workspace;
    use super::*;

    #[test]
    fn what_is_banned_is_found_however_it_is_written() {
        let text = "use std::{io, thread::sleep};\n\
                    use kvm_ioctls as kvm;\n\
                    fn f() { let now = std::time::Instant::now(); }\n\
                    #[cfg(test)] mod tests { use std::fs; }\n";
        let found = breaches(&workspace(&[("devices/src/lib.rs", text)]));
        let subjects: Vec<_> = found.iter().map(|breach| breach.subject.as_str()).collect();
        let all =
            ["kvm_ioctls", "std::thread", "std::time"].map(|b| format!("devices/src/lib.rs: {b}"));
        assert_eq!(subjects, all);
    }

    #[test]
    fn every_wall_stands_around_a_crate() {
        let workspace = Workspace::read().unwrap();
        for wall in WALLS {
            assert!(Modules::of(&workspace, wall.root).0.len() > 10, "{}", wall.root);
        }
    }
}
