//! The properties of KVM that ftvmm rests on, each tried with a micro-guest, and the few that need
//! no guest.

mod cpu;
mod determinism;
mod dirty_log;
mod exits;
mod host;
mod speed;
mod x87;
mod xsave;

use std::path::Path;

use kvm_ioctls::Cap;

pub use host::Host;
pub use speed::NAMES as SPEED_NAMES;

use crate::micro_guest::{Findings, ProbeFailure, Ring};
use crate::{KvmError, nested_paging_is_off};

/// One check.
pub struct Probe {
    /// What is looked at.
    pub name: &'static str,
    /// Looks.
    pub examine: fn(&Host) -> Findings,
    /// What depends on it.
    pub weight: Weight,
}

/// What depends on a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Every guest: a host on which it does not hold is unsuitable.
    Needed,
    /// Only this would not work without it.
    Useful {
        /// In words, for people who read the diagnosis.
        without_it: &'static str,
    },
    /// Nothing.
    Informational,
}

const fn needed(name: &'static str, examine: fn(&Host) -> Findings) -> Probe {
    Probe { name, examine, weight: Weight::Needed }
}

const fn useful(
    name: &'static str,
    examine: fn(&Host) -> Findings,
    without_it: &'static str,
) -> Probe {
    Probe { name, examine, weight: Weight::Useful { without_it } }
}

const fn informational(name: &'static str, examine: fn(&Host) -> Findings) -> Probe {
    Probe { name, examine, weight: Weight::Informational }
}

/// The handler's first instruction is a NOP in every Linux kernel, and those are passed over
/// without a step.
const WITHOUT_STEPS: &str =
    "a #GP of a guest whose handler does not begin with a NOP, as Linux's does";
const WITHOUT_SPEED: &str =
    "nothing, but a guest runs slower here than on an emulated host (cargo xtask lab)";

/// Every check after the opening of `/dev/kvm`, in the order made and printed.
pub const PROBES: &[Probe] = &[
    needed("capabilities", capabilities),
    needed("nested paging", nested_paging),
    informational("optional capabilities", optional_capabilities),
    needed("CPUID mask (ring 0)", |host| cpu::cpuid_mask(host, Ring::Kernel)),
    needed("CPUID mask (ring 3)", |host| cpu::cpuid_mask(host, Ring::User)),
    needed("RDTSC with CR4.TSD", cpu::rdtsc_disabled),
    // The other half of the check before it; CR4.TSD is always set in a guest of ftvmm.
    useful("RDTSC without CR4.TSD", cpu::rdtsc_enabled, "nothing"),
    useful("single step (ring 0)", |host| cpu::single_step(host, Ring::Kernel), WITHOUT_STEPS),
    // ftvmm never steps a user program; only a debugger inside the guest does.
    useful("single step (ring 3)", |host| cpu::single_step(host, Ring::User), "nothing"),
    needed("MSR filter", cpu::msr_filter),
    informational("hidden instructions", cpu::hidden_instructions),
    needed("port exit", exits::port_read),
    needed("HLT exit", exits::halt),
    needed("MMIO exit", exits::mmio),
    needed("interrupt at an exit", exits::interrupt),
    needed("forced stop", exits::forced_stop),
    needed("FPU and SSE moved", exits::fpu_moved),
    needed("dirty log", dirty_log::complete),
    needed("INT3", cpu::int3),
    useful("POPCNT", cpu::popcnt, "the CPU templates sse4 and avx"),
    useful("CMPXCHG16B", cpu::cmpxchg16b, "the CPU templates sse4 and avx"),
    needed("FXRSTOR", cpu::fxrstor),
    useful("XRSTOR", cpu::xrstor, "the CPU template avx"),
    informational("XSAVE images", xsave::repeats),
    informational("FNSTENV addresses", x87::addresses_kept),
    needed("determinism (ring 0)", |host| determinism::repeats(host, Ring::Kernel)),
    needed("determinism (ring 3)", |host| determinism::repeats(host, Ring::User)),
    useful(speed::NAMES[0], |host| speed::instructions(host, Ring::Kernel), WITHOUT_SPEED),
    useful(speed::NAMES[1], |host| speed::instructions(host, Ring::User), WITHOUT_SPEED),
    informational("port exit cost", speed::port_exit),
    informational("PMU", pmu),
];

/// Dirty logging has no capability of its own; its probe tells.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
];

/// Without them: more system calls at an exit; no template avx; no single steps.
const OPTIONAL: [(Cap, &str); 3] = [
    (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG"),
];

fn capabilities(host: &Host) -> Findings {
    let missing = names(NEEDED.iter().filter(|(cap, _)| !host.kvm.check_extension(*cap)));
    if missing.is_empty() {
        return Ok(format!("all {} present", NEEDED.len()));
    }
    Err(ProbeFailure::Missing { names: missing })
}

fn optional_capabilities(host: &Host) -> Findings {
    let (present, absent): (Vec<_>, Vec<_>) =
        OPTIONAL.iter().partition(|(cap, _)| host.kvm.check_extension(*cap));
    Ok(match (names(present), names(absent)) {
        (present, absent) if absent.is_empty() => format!("present: {present}"),
        (present, absent) if present.is_empty() => format!("absent: {absent}"),
        (present, absent) => format!("present: {present}; absent: {absent}"),
    })
}

fn names<'a>(caps: impl IntoIterator<Item = &'a (Cap, &'a str)>) -> String {
    caps.into_iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

/// A slice changes the guest's page tables in memory, and shadow page tables would not follow.
fn nested_paging(_: &Host) -> Findings {
    match nested_paging_is_off() {
        None => Ok("on".into()),
        Some(parameter) => Err(KvmError::NoNestedPaging { parameter }.into()),
    }
}

/// perf registers the PMU `cpu` (on hybrid CPUs `cpu_core`) only when it found working counters.
fn pmu(_: &Host) -> Findings {
    let present = ["cpu", "cpu_core"]
        .into_iter()
        .any(|pmu| Path::new("/sys/bus/event_source/devices").join(pmu).exists());
    let words = if present { "hardware counters present" } else { "no hardware counters" };
    Ok(format!("{words}; ftvmm does not need them"))
}
