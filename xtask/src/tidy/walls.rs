//! Walls between crates, and between parts of `vmm`: what each may not reach for, and where that
//! lives instead.

use std::collections::BTreeSet;

use super::modules::Modules;
use super::sources::Workspace;
use super::{Breach, Rule};

/// A crate, or a part of one, and what is banned there.
struct Wall {
    /// The crate's root file.
    root: &'static str,
    /// The part: how the paths of its files begin.
    part: &'static [&'static str],
    /// What is no part of it: likewise.
    apart: &'static [&'static str],
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
    whole("devices/src/lib.rs", HOST),
    whole("devices/src/lib.rs", IO),
    whole("replication/src/lib.rs", HOST),
    whole("replication/src/lib.rs", IO),
    Wall { root: VMM, part: MACHINE, apart: &[], banned: BELOW_MACHINE },
    Wall { root: VMM, part: MACHINE, apart: &[], banned: ABOVE_MACHINE },
    Wall { root: VMM, part: &["vmm/src/host/"], apart: &[], banned: ABOVE_HOST },
    Wall { root: VMM, part: &["vmm/src/"], apart: KVM, banned: ONLY_KVM },
];

const fn whole(root: &'static str, banned: &'static [Ban]) -> Wall {
    Wall { root, part: &[""], apart: &[], banned }
}

const VMM: &str = "vmm/src/lib.rs";

/// What decides and computes.
const MACHINE: &[&str] = &[
    "vmm/src/boot/",
    "vmm/src/cpu_template/",
    "vmm/src/disk_answer.rs",
    "vmm/src/efer.rs",
    "vmm/src/exit_chain.rs",
    "vmm/src/machine.rs",
    "vmm/src/machine/",
    "vmm/src/machine_state.rs",
    "vmm/src/msr.rs",
    "vmm/src/net_watch.rs",
    "vmm/src/page_tracker.rs",
    "vmm/src/page_tracker/",
    "vmm/src/step.rs",
    "vmm/src/tsc/",
    "vmm/src/virtual_machine.rs",
];

const BELOW_MACHINE: &[Ban] = &[
    ("event_manager", "the host is vmm/src/host's"),
    ("kvm_ioctls", "KVM's calls are vmm/src/kvm's"),
    ("libc", "the host is vmm/src/host's"),
    ("nix", "the host is vmm/src/host's"),
    ("std::fs", "files are opened by who is asked to by the user"),
    ("std::net", "transports are vmm/src/peer's"),
    ("std::os", "descriptors are vmm/src/host's and vmm/src/kvm's"),
    ("std::process", "a stop is a value that is returned"),
    ("std::thread", "the machine is on one thread"),
    ("std::time", "time is an input"),
    ("vmm_sys_util", "the host is vmm/src/host's"),
];

const ABOVE_MACHINE: &[Ban] = &[
    ("crate::cli", "the machine is given what was asked for"),
    ("crate::control", "the machine is given what was asked for"),
    ("crate::disk", "outputs say what the disk is to do"),
    ("crate::host", "the host comes in by inputs and goes out by outputs"),
    ("crate::input", "inputs are given to the machine"),
    ("crate::peer", "the machine knows no other host"),
    ("crate::run_loop", "the run loop steps the machine"),
    ("crate::shipment", "who ships memory asks the machine"),
    ("crate::sources", "inputs are given to the machine"),
];

const ABOVE_HOST: &[Ban] = &[
    ("crate::cli", "the host's side is told what to do"),
    ("crate::control", "the host's side is told what to do"),
    ("crate::disk", "the disk is told what to do by outputs"),
    ("crate::input", "what arrives goes to whom it was told"),
    ("crate::kvm", "the host's side knows no guest"),
    ("crate::machine", "the host's side knows no guest"),
    ("crate::outputs", "outputs write to the host, not the other way round"),
    ("crate::peer", "what arrives goes to whom it was told"),
    ("crate::run_loop", "the host's side knows no guest"),
    ("crate::shipment", "the host's side knows no guest"),
    ("crate::sources", "what arrives goes to whom it was told"),
    ("crate::step", "the host's side knows no guest"),
];

/// Doctor examines KVM itself.
const KVM: &[&str] = &["vmm/src/doctor/", "vmm/src/kvm/", "vmm/src/micro_guest/"];

const ONLY_KVM: &[Ban] = &[("kvm_ioctls", "KVM's calls are vmm/src/kvm's")];

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

impl Wall {
    fn is_around(&self, file: &str) -> bool {
        let begins = |paths: &[&str]| paths.iter().any(|path| file.starts_with(path));
        begins(self.part) && !begins(self.apart)
    }
}

fn of(workspace: &Workspace, wall: &Wall) -> Vec<Breach> {
    let modules = Modules::of(workspace, wall.root);
    let mut found = BTreeSet::new();
    for module in modules.0.iter().filter(|module| wall.is_around(&module.file)) {
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
    fn a_wall_stands_around_its_part_alone() {
        let found = breaches(&workspace(&[
            ("vmm/src/lib.rs", "mod host; mod kvm; mod msr; mod run_loop;"),
            ("vmm/src/host/mod.rs", "use crate::{kvm, msr}; use std::fs;"),
            ("vmm/src/kvm/mod.rs", "use kvm_ioctls::Kvm;"),
            ("vmm/src/msr.rs", "use crate::host::clock; use std::fs;"),
            ("vmm/src/run_loop.rs", "use crate::host; use kvm_ioctls::Kvm; use std::fs;"),
        ]));
        let subjects: Vec<_> = found.iter().map(|breach| breach.subject.as_str()).collect();
        let all = [
            "vmm/src/msr.rs: std::fs",
            "vmm/src/msr.rs: crate::host",
            "vmm/src/host/mod.rs: crate::kvm",
            "vmm/src/run_loop.rs: kvm_ioctls",
        ];
        assert_eq!(subjects, all);
    }

    #[test]
    fn every_wall_stands_around_something() {
        let workspace = Workspace::read().unwrap();
        for Wall { root, part, apart, .. } in WALLS {
            let modules = Modules::of(&workspace, root).0;
            assert!(modules.len() > 10, "{root}");
            for path in part.iter().chain(*apart) {
                assert!(modules.iter().any(|module| module.file.starts_with(path)), "{path}");
            }
        }
    }
}
