//! What the guest's CPU is and does: CPUID, RDTSC, single steps, instructions.

use ftvmm_machine::Cpu;
use ftvmm_machine::msr::MsrAccess;
use iced_x86::{Decoder, DecoderOptions};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_MAX_CPUID_ENTRIES, kvm_guest_debug, kvm_xcr,
    kvm_xcrs,
};

use super::host::Host;
use crate::call;
use crate::micro_guest::programs::{self, layout};
use crate::micro_guest::{
    CR4_OSXSAVE, CR4_TSD, Findings, MicroGuest, ProbeFailure, Ring, Stop, expect_equal,
};

/// Features no guest may see, by leaf, register (EAX 0 … EDX 3) and bit (AMD APM vol. 3, appendix
/// E). They are listed here and not taken from the template: some hypervisors change the table they
/// are given, and say so when asked for it.
const HIDDEN_FEATURES: [(u32, usize, u32, &str); 10] = [
    (1, 2, 21, "x2APIC"),
    (1, 2, 24, "TSC deadline timer"),
    (1, 2, 26, "XSAVE"),
    (1, 2, 27, "OSXSAVE"),
    (1, 2, 28, "AVX"),
    (1, 2, 30, "RDRAND"),
    (1, 2, 31, "hypervisor"),
    (1, 3, 4, "TSC"),
    (1, 3, 9, "APIC"),
    (0x8000_0001, 3, 27, "RDTSCP"),
];
/// Leaves no guest may see: features, XSAVE, TSC, hypervisor signature, memory encryption.
const HIDDEN_LEAVES: [u32; 5] = [7, 0xd, 0x15, 0x4000_0000, 0x8000_001f];
/// The highest basic leaf of the template; Intel CPUs answer a leaf that does not exist with this
/// one's data (SDM vol. 2A, CPUID), AMD CPUs with zeros.
const HIGHEST_BASIC_LEAF: u32 = 1;
/// CPUID.1:ECX.
const FEATURE_XSAVE: u32 = 1 << 26;
/// x87 and SSE.
const XCR0: u64 = 3;

/// The guest sees the leaves it was given, and no others.
pub fn cpuid_mask(host: &Host, ring: Ring) -> Findings {
    let mut guest = host.guest(programs::cpuid(), ring)?;
    let mut seen = Vec::new();
    for (leaf, register, bit, name) in HIDDEN_FEATURES {
        if execute_cpuid(&mut guest, leaf)?[register] >> bit & 1 == 1 {
            seen.push(name);
        }
    }
    if !seen.is_empty() {
        return Err(ProbeFailure::Differs {
            what: "features the guest sees although they are hidden".into(),
            got: seen.join(", "),
            expected: "none".into(),
        });
    }
    for leaf in host.cpuid.as_slice() {
        let got = execute_cpuid(&mut guest, leaf.function)?;
        let expected = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
        expect_leaf(leaf.function, got, &[expected])?;
    }
    let highest_basic = execute_cpuid(&mut guest, HIGHEST_BASIC_LEAF)?;
    for leaf in HIDDEN_LEAVES {
        expect_leaf(leaf, execute_cpuid(&mut guest, leaf)?, &[[0; 4], highest_basic])?;
    }
    Ok(format!("{} leaves as set, {} hidden", host.cpuid.as_slice().len(), HIDDEN_LEAVES.len()))
}

fn expect_leaf(leaf: u32, got: [u32; 4], allowed: &[[u32; 4]]) -> Result<(), ProbeFailure> {
    if allowed.contains(&got) {
        return Ok(());
    }
    let words = |leaf: &[u32; 4]| leaf.map(|register| format!("{register:08x}")).join(" ");
    Err(ProbeFailure::Differs {
        what: format!("CPUID leaf {leaf:#x} (EAX EBX ECX EDX)"),
        got: words(&got),
        expected: allowed.iter().map(words).collect::<Vec<_>>().join(" or "),
    })
}

/// EAX, EBX, ECX, EDX of a leaf's first subleaf.
fn execute_cpuid(guest: &mut MicroGuest, leaf: u32) -> Result<[u32; 4], ProbeFailure> {
    let mut regs = guest.vcpu.regs()?;
    (regs.rax, regs.rcx) = (leaf.into(), 0);
    guest.vcpu.set_regs(&regs)?;
    let regs = guest.run_to(Stop::Report)?;
    Ok([regs.rax, regs.rbx, regs.rcx, regs.rdx].map(|register| register as u32))
}

/// With CR4.TSD, RDTSC in ring 3 is #GP at the RDTSC, and ring 0 does not mind.
pub fn rdtsc_disabled(host: &Host) -> Findings {
    /// Offset of the saved RIP from the top of the stack: SS, RSP, RFLAGS, CS, RIP, error code.
    const SAVED_RIP: u64 = 40;
    let mut guest = MicroGuest::new(programs::rdtsc(), Ring::User, CR4_TSD, &host.cpuid)?;
    guest.run_to(Stop::Exception { vector: 13 })?;
    let rip = guest.read_u64(layout::KERNEL_STACK_TOP - SAVED_RIP)?;
    expect_equal("RIP in the frame of #GP", rip, layout::CODE)?;
    MicroGuest::new(programs::rdtsc(), Ring::Kernel, CR4_TSD, &host.cpuid)?.run_to(Stop::Report)?;
    Ok("#GP in ring 3, none in ring 0".into())
}

/// Without CR4.TSD, RDTSC is no fault.
pub fn rdtsc_enabled(host: &Host) -> Findings {
    host.guest(programs::rdtsc(), Ring::User)?.run_to(Stop::Report)?;
    Ok("runs in ring 3".into())
}

/// Every step is one instruction, and the program's result is not changed by stepping.
pub fn single_step(host: &Host, ring: Ring) -> Findings {
    let program = programs::steps();
    let mut guest = host.guest(program, ring)?;
    let debug = |control| kvm_guest_debug { control, ..Default::default() };
    guest
        .vcpu
        .fd()
        .set_guest_debug(&debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP))
        .map_err(call("KVM_SET_GUEST_DEBUG"))?;
    let addresses = instruction_addresses(program);
    for (step, address) in addresses.iter().enumerate().skip(1) {
        let regs = guest.run_to(Stop::Debug)?;
        expect_equal(format!("RIP after step {step}"), regs.rip, *address)?;
    }
    guest.vcpu.fd().set_guest_debug(&debug(0)).map_err(call("KVM_SET_GUEST_DEBUG"))?;
    let regs = guest.run_to(Stop::Report)?;
    expect_equal("RBX at the end", regs.rbx, 5)?;
    expect_equal("memory at the end", guest.read_u64(layout::DATA)?, 5)?;
    expect_equal("RSI at the end", regs.rsi, 7)?;
    Ok(format!("{} steps of one instruction each", addresses.len() - 1))
}

/// Where each instruction of a straight program starts.
fn instruction_addresses(program: &[u8]) -> Vec<u64> {
    Decoder::with_ip(64, program, layout::CODE, DecoderOptions::NONE)
        .into_iter()
        .map(|instruction| instruction.ip())
        .collect()
}

/// An access to an MSR outside the list is an exit, and gets the answer it is given: a value or
/// #GP.
pub fn msr_filter(host: &Host) -> Findings {
    const PAT: u32 = 0x277;
    const INDEX: u32 = 0x8b;
    const VALUE: u64 = 0x1122_3344_5566_7788;
    let asking = || -> Result<MicroGuest, ProbeFailure> {
        let mut guest = host.guest(programs::rdmsr(), Ring::Kernel)?;
        guest.vm.serve_only_msrs(&[PAT])?;
        let mut regs = guest.vcpu.regs()?;
        regs.rcx = INDEX.into();
        guest.vcpu.set_regs(&regs)?;
        guest.run_to(Stop::Msr(MsrAccess { index: INDEX, written: None }))?;
        Ok(guest)
    };
    let mut answered = asking()?;
    answered.vcpu.answer_msr(Some(VALUE));
    let regs = answered.run_to(Stop::Report)?;
    expect_equal("EDX:EAX after RDMSR", regs.rdx << 32 | regs.rax, VALUE)?;
    let mut refused = asking()?;
    refused.vcpu.answer_msr(None);
    refused.run_to(Stop::Exception { vector: 13 })?;
    Ok("a read is an exit; answered with a value and with #GP".into())
}

/// What instructions do that CPUID hides or that read counters: a guest that ignores CPUID may try
/// them.
pub fn hidden_instructions(host: &Host) -> Findings {
    let programs = [
        ("RDRAND", programs::rdrand()),
        ("RDSEED", programs::rdseed()),
        ("RDPID", programs::rdpid()),
        ("RDPMC", programs::rdpmc()),
    ];
    let mut findings = Vec::new();
    for (name, program) in programs {
        let mut guest = host.guest(program, Ring::Kernel)?;
        let stop = loop {
            match guest.run()? {
                Stop::Interrupted => {}
                stop => break stop,
            }
        };
        findings.push(match stop {
            Stop::Report => format!("{name} executes"),
            Stop::Exception { vector: 6 } => format!("{name} is #UD"),
            Stop::Exception { vector: 13 } => format!("{name} is #GP"),
            other => format!("{name} ends at {other}"),
        });
    }
    Ok(findings.join(", "))
}

/// INT3 reaches the guest's own handler.
pub fn int3(host: &Host) -> Findings {
    host.guest(programs::int3(), Ring::Kernel)?.run_to(Stop::Exception { vector: 3 })?;
    Ok("#BP in the guest".into())
}

/// POPCNT.
pub fn popcnt(host: &Host) -> Findings {
    gives_16(host.guest(programs::popcnt(), Ring::Kernel)?)
}

/// CMPXCHG16B.
pub fn cmpxchg16b(host: &Host) -> Findings {
    gives_16(host.guest(programs::cmpxchg16b(), Ring::Kernel)?)
}

/// FXRSTOR.
pub fn fxrstor(host: &Host) -> Findings {
    gives_16(host.guest(programs::fxrstor(), Ring::Kernel)?)
}

/// XRSTOR, with all the host's leaves because the template hides XSAVE.
pub fn xrstor(host: &Host) -> Findings {
    let cpuid = host
        .kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    if !cpuid.as_slice().iter().any(|e| e.function == 1 && e.ecx & FEATURE_XSAVE != 0) {
        return Ok("this CPU has none, and no guest is shown it".into());
    }
    let guest = MicroGuest::new(programs::xrstor(), Ring::Kernel, CR4_OSXSAVE, &cpuid)?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: XCR0, ..Default::default() };
    guest.vcpu.fd().set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))?;
    gives_16(guest)
}

fn gives_16(mut guest: MicroGuest) -> Findings {
    expect_equal("result in RAX", guest.run_to(Stop::Report)?.rax, 16)?;
    Ok("right result".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stepped_program_is_straight_and_ends_with_the_report() {
        let addresses = instruction_addresses(programs::steps());
        assert_eq!(addresses.len(), 13);
        assert_eq!(addresses[0], layout::CODE);
        let last = (addresses[12] - layout::CODE) as usize;
        assert_eq!(programs::steps()[last..], [0xe6, layout::REPORT]);
    }
}
