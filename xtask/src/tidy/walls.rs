//! Walls between crates: what each may not reach for, and where that lives instead. A dependency
//! that a manifest does not have needs no wall; these keep it from being added.

use std::collections::BTreeSet;

use super::modules::Modules;
use super::sources::Workspace;
use super::{Breach, Rule};

/// A crate, and what is banned there.
struct Wall {
    /// The crate's root file.
    root: &'static str,
    banned: &'static [Ban],
}

/// The beginning of a path, and where it lives instead.
type Ban = (&'static str, &'static str);

const WALLS: &[Wall] = &[
    Wall { root: "devices/src/lib.rs", banned: SYSTEM },
    Wall { root: "devices/src/lib.rs", banned: KVM },
    Wall { root: "devices/src/lib.rs", banned: PURE },
    Wall { root: "devices/src/lib.rs", banned: ONE_THREAD },
    Wall { root: "replication/src/lib.rs", banned: SYSTEM },
    Wall { root: "replication/src/lib.rs", banned: KVM },
    Wall { root: "replication/src/lib.rs", banned: PURE },
    Wall { root: "replication/src/lib.rs", banned: ONE_THREAD },
    Wall { root: "vmm/machine/src/lib.rs", banned: SYSTEM },
    Wall { root: "vmm/machine/src/lib.rs", banned: KVM_CALLS },
    Wall { root: "vmm/machine/src/lib.rs", banned: PURE },
    Wall { root: "vmm/machine/src/lib.rs", banned: ABOVE_MACHINE },
    Wall { root: "vmm/kvm/src/lib.rs", banned: ABOVE_KVM },
    Wall { root: "vmm/etcd/src/lib.rs", banned: SYSTEM },
    Wall { root: "vmm/etcd/src/lib.rs", banned: KVM },
    Wall { root: "vmm/etcd/src/lib.rs", banned: ABOVE_ETCD },
    Wall { root: "vmm/host/src/lib.rs", banned: EXECUTOR },
    Wall { root: "vmm/runtime/src/lib.rs", banned: EXECUTOR },
    Wall { root: "vmm/cli/src/lib.rs", banned: EXECUTOR },
    Wall { root: "vmm/host/src/lib.rs", banned: KVM },
    Wall { root: "vmm/host/src/lib.rs", banned: ABOVE_HOST },
    Wall { root: "vmm/runtime/src/lib.rs", banned: KVM },
    Wall { root: "vmm/runtime/src/lib.rs", banned: ABOVE_RUNTIME },
    Wall { root: "vmm/cli/src/lib.rs", banned: KVM },
];

/// What reaches the system.
const SYSTEM: &[Ban] = &[
    ("event_manager", "the host is vmm/host's"),
    ("libc", "the host is vmm/host's"),
    ("nix", "the host is vmm/host's"),
    ("vmm_sys_util", "the host is vmm/host's"),
];

/// Calls to KVM.
const KVM_CALLS: &[Ban] = &[("kvm_ioctls", "KVM's calls are vmm/kvm's")];

/// Calls to KVM, and its structures.
const KVM: &[Ban] = &[
    ("kvm_bindings", "KVM's structures are vmm/machine's and vmm/kvm's"),
    ("kvm_ioctls", "KVM's calls are vmm/kvm's"),
];

/// What a function of its arguments has no use for.
const PURE: &[Ban] = &[
    ("std::env", "configuration arrives as arguments"),
    ("std::fs", "files are opened in vmm/host; formats work over Read and Write"),
    ("std::net", "transports live in vmm/host"),
    ("std::os", "descriptors live in vmm/host and vmm/kvm"),
    ("std::process", "a stop is a value that is returned"),
    ("std::thread", "threads are made in vmm/host and vmm/runtime"),
    ("std::time", "time arrives as an argument in nanoseconds"),
];

const ONE_THREAD: &[Ban] = &[("std::sync", "one thread steps it")];

const ABOVE_MACHINE: &[Ban] = &[
    ("ftvmm", "the machine is given what was asked for"),
    ("ftvmm_host", "the host comes in by inputs and goes out by outputs"),
    ("ftvmm_kvm", "the machine knows a Cpu, not what is behind it"),
    ("ftvmm_runtime", "the run loop steps the machine"),
];

const ABOVE_KVM: &[Ban] = &[
    ("ftvmm", "the processor is told what to do"),
    ("ftvmm_host", "the processor has no host but KVM"),
    ("ftvmm_runtime", "the processor is told what to do"),
];

/// What runs tasks: on the thread that asks the witness, and nowhere else.
const EXECUTOR: &[Ban] = &[
    ("etcd_client", "the etcd witness is vmm/etcd's"),
    ("tokio", "threads and one epoll loop; an executor is vmm/etcd's"),
];

const ABOVE_ETCD: &[Ban] = &[
    ("ftvmm", "the store is told where it is"),
    ("ftvmm_host", "the store knows entries and a cluster"),
    ("ftvmm_kvm", "the store knows no guest"),
    ("ftvmm_runtime", "the store decides nothing"),
];

const ABOVE_HOST: &[Ban] = &[
    ("ftvmm", "the host's side is told what to do"),
    ("ftvmm_kvm", "the host's side knows no guest"),
    ("ftvmm_runtime", "what arrives goes to whom it was told"),
];

const ABOVE_RUNTIME: &[Ban] = &[
    ("ftvmm", "the runtime is given what was asked for"),
    ("ftvmm_kvm", "the runtime knows a Cpu, not what is behind it"),
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
    fn each_crate_has_walls_of_its_own() {
        let found = breaches(&workspace(&[
            ("vmm/machine/src/lib.rs", "mod sync; use kvm_bindings::kvm_regs; use std::sync::Arc;"),
            ("vmm/machine/src/sync.rs", "use ftvmm_kvm::Vcpu; use std::fs;"),
            ("vmm/kvm/src/lib.rs", "use kvm_ioctls::Kvm; use std::fs; use ftvmm_machine::Cpu;"),
            ("vmm/host/src/lib.rs", "use nix::unistd; use ftvmm_runtime::peer;"),
            ("vmm/runtime/src/lib.rs", "use ftvmm_host::Tap; use ftvmm_kvm::Vcpu;"),
            ("vmm/cli/src/lib.rs", "use ftvmm_kvm::Vcpu; use kvm_ioctls::Kvm;"),
        ]));
        let subjects: Vec<_> = found.iter().map(|breach| breach.subject.as_str()).collect();
        let all = [
            "vmm/machine/src/sync.rs: std::fs",
            "vmm/machine/src/sync.rs: ftvmm_kvm",
            "vmm/host/src/lib.rs: ftvmm_runtime",
            "vmm/runtime/src/lib.rs: ftvmm_kvm",
            "vmm/cli/src/lib.rs: kvm_ioctls",
        ];
        assert_eq!(subjects, all);
    }

    #[test]
    fn every_wall_stands_around_something() {
        let workspace = Workspace::read().unwrap();
        for Wall { root, .. } in WALLS {
            assert!(Modules::of(&workspace, root).0.len() > 5, "{root}");
        }
    }
}
