//! One micro-guest: a fresh virtual machine with a few kilobytes of code in 64-bit mode, run from
//! stop to stop.
//!
//! It is built from the same KVM adapter and CPU template as every guest of ftvmm, so what holds
//! here holds there. Start-up tries with it what a template rests on ([`xsave`]), `ftvmm doctor`
//! all the rest. Under doctor no run can hang: its watchdog interrupts `KVM_RUN` again and again,
//! and after [`KICKS_PER_RUN_MAX`] interruptions the guest is given up.

mod failure;
pub mod programs;
mod stop;
pub mod xsave;

use std::fmt;

use ftvmm_machine::{Cpu, CpuError};
use kvm_bindings::{
    CpuId, KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION,
    KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_dtable, kvm_regs, kvm_segment,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

pub use failure::{Findings, ProbeFailure, expect_equal, same_bytes};
pub use stop::Stop;

use ftvmm_machine::cpu_template::{CpuTemplate, DEFAULT_TEMPLATE};
use ftvmm_machine::exit::{Direction, Exit};
use ftvmm_machine::memory::Memory;

use self::programs::layout;
use crate::{KvmError, Vcpu, Vm, call};

/// Interruptions one run may take: about two seconds.
pub const KICKS_PER_RUN_MAX: u32 = 80;

/// PE, MP, ET, NE, WP, AM, PG (AMD APM vol. 2, 3.1.1).
const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT (AMD APM vol. 2, 3.1.3).
const CR4: u64 = 0x620;
/// Time-stamp disable: RDTSC is for ring 0 alone.
pub const CR4_TSD: u64 = 1 << 2;
/// XSAVE enabled.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// Long mode enabled and active.
const EFER: u64 = 0x500;
/// IOPL 3, interrupts allowed, and the bit that is always one.
const RFLAGS: u64 = 0x3202;
/// The enable bit of IA32_APIC_BASE; while it is set, KVM shows the guest an APIC whatever CPUID
/// says.
const APIC_BASE_ENABLE: u64 = 1 << 11;

/// CPUID.1:EDX, local APIC.
const CPUID_1_EDX_APIC: u32 = 1 << 9;

/// Null, kernel code, kernel data, user data, user code; accessed bits set, so the CPU writes
/// nothing.
const GDT: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_DATA: u16 = 0x1b;
const USER_CODE: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x28;

/// Present, writable, user, accessed (AMD APM vol. 2, 5.4); for a page also dirty and 2 MiB large.
/// Accessed and dirty are set beforehand so that the CPU has no reason to write to the tables.
const TABLE_ENTRY: u64 = 0x27;
const LARGE_PAGE: u64 = 0xe7;

/// Present, DPL 0, 64-bit interrupt gate.
const INTERRUPT_GATE: u64 = 0x8e;

/// Vectors the architecture keeps for exceptions.
const EXCEPTIONS: u8 = 32;

/// The privilege level a program runs at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// Ring 0.
    Kernel,
    /// Ring 3.
    User,
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "0",
            Self::User => "3",
        })
    }
}

/// KVM_CREATE_VM gives up when a signal is pending, and the watchdog's may be: tries again.
///
/// # Errors
/// Any other failure of `create`.
pub fn uninterrupted<T>(mut create: impl FnMut() -> Result<T, KvmError>) -> Result<T, KvmError> {
    loop {
        match create() {
            Err(KvmError::Cpu(CpuError::Call { cause, .. }))
                if cause.kind() == std::io::ErrorKind::Interrupted => {}
            answer => return answer,
        }
    }
}

/// The CPUID leaves every guest of ftvmm gets, as KVM keeps them.
///
/// # Errors
/// When KVM cannot be used or the host lacks a feature of the template.
pub fn template_cpuid() -> Result<CpuId, ProbeFailure> {
    let vm = uninterrupted(|| Vm::new(layout::MEMORY_BYTES, false))?;
    let vcpu = vm.create_vcpu()?;
    let template = CpuTemplate::built_in(&vm.supported_cpuid()?, DEFAULT_TEMPLATE)?;
    vcpu.set_cpuid(template.cpuid())?;
    let mut cpuid = vcpu.fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_CPUID2"))?;
    // Older kernels do not tell how many entries they filled; the others are zero, as no leaf is.
    cpuid.retain(|leaf| *leaf != kvm_cpuid_entry2::default());
    for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 1) {
        // KVM shows the APIC while IA32_APIC_BASE has it enabled, as it does in this fresh vCPU.
        leaf.edx &= !CPUID_1_EDX_APIC;
    }
    Ok(cpuid)
}

/// A virtual machine with one program in it. The vCPU comes first: it is dropped before its
/// machine.
pub struct MicroGuest {
    /// The CPU.
    pub vcpu: Vcpu,
    /// The machine.
    pub vm: Vm,
}

impl MicroGuest {
    /// Makes a machine that will run `program` in `ring`, with `cr4` in addition to what 64-bit
    /// code and SSE want, and with these CPUID leaves.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(program: &[u8], ring: Ring, cr4: u64, cpuid: &CpuId) -> Result<Self, ProbeFailure> {
        let vm = uninterrupted(|| Vm::new(layout::MEMORY_BYTES, false))?;
        let vcpu = vm.create_vcpu()?;
        load(vm.memory(), program)?;
        set_registers(vcpu.fd(), ring, cr4, cpuid)?;
        Ok(Self { vcpu, vm })
    }

    /// Reads `bytes` bytes of guest memory.
    ///
    /// # Errors
    /// When there is no memory at `addr`.
    pub fn read(&self, addr: u64, bytes: usize) -> Result<Vec<u8>, ProbeFailure> {
        let mut data = vec![0; bytes];
        self.vm.memory().read_slice(&mut data, GuestAddress(addr))?;
        Ok(data)
    }

    /// Reads eight bytes of guest memory.
    ///
    /// # Errors
    /// When there is no memory at `addr`.
    pub fn read_u64(&self, addr: u64) -> Result<u64, ProbeFailure> {
        Ok(self.vm.memory().read_obj(GuestAddress(addr))?)
    }

    /// Lets the guest run to its next stop, be it a signal.
    ///
    /// # Errors
    /// When KVM cannot go on.
    pub fn run(&mut self) -> Result<Stop, ProbeFailure> {
        Ok(match self.vcpu.run(false) {
            Ok(Exit::Pio { port, direction, .. }) => decode_port(port, direction),
            Ok(Exit::Mmio { addr, direction: Direction::Read, .. }) => Stop::MmioRead { addr },
            Ok(Exit::Mmio { addr, direction: Direction::Write, .. }) => {
                let data = self.vcpu.mmio_data();
                let value = data.iter().take(4).rev().fold(0, |v, byte| v << 8 | u32::from(*byte));
                Stop::MmioWrite { addr, value }
            }
            Ok(Exit::Msr(access)) => Stop::Msr(access),
            Ok(Exit::Hlt) => Stop::Hlt,
            Ok(Exit::Shutdown) => Stop::Shutdown,
            Ok(Exit::Interrupted | Exit::WindowOpen | Exit::Slice) => Stop::Interrupted,
            Err(CpuError::UnknownExit { reason: KVM_EXIT_DEBUG, .. }) => Stop::Debug,
            Err(CpuError::UnknownExit {
                reason: KVM_EXIT_INTERNAL_ERROR,
                suberror: KVM_INTERNAL_ERROR_EMULATION,
                rip,
            }) => return Err(ProbeFailure::EmulationFailure { rip }),
            Err(failure) => return Err(failure.into()),
        })
    }

    /// Lets the guest run until it stops, which must be at `expected`.
    ///
    /// # Errors
    /// When it stops elsewhere or not at all.
    pub fn run_to(&mut self, expected: Stop) -> Result<kvm_regs, ProbeFailure> {
        for _ in 0..KICKS_PER_RUN_MAX {
            match self.run()? {
                got if got == expected => return Ok(self.vcpu.regs()?),
                Stop::Interrupted => {}
                got => {
                    let rip = self.vcpu.regs()?.rip;
                    return Err(ProbeFailure::WrongStop { got, rip, expected });
                }
            }
        }
        Err(ProbeFailure::NoStop { rip: self.vcpu.regs()?.rip, expected })
    }

    /// Lets a program that never stops run until the watchdog has kicked `kicks` times.
    ///
    /// # Errors
    /// When it stops for another reason.
    pub fn run_to_kick(&mut self, kicks: u32) -> Result<(), ProbeFailure> {
        (0..kicks).try_for_each(|_| self.run_to(Stop::Interrupted).map(drop))
    }

    /// Answers [`Stop::Ask`].
    pub fn answer(&mut self, value: u32) {
        let data = self.vcpu.pio_data();
        let bytes = value.to_le_bytes();
        let length = data.len().min(bytes.len());
        data[..length].copy_from_slice(&bytes[..length]);
    }
}

/// Writes `program` and the tables 64-bit mode wants into a guest's memory.
///
/// # Errors
/// When the memory is smaller than [`layout::MEMORY_BYTES`].
pub fn load(memory: &Memory, program: &[u8]) -> Result<(), ProbeFailure> {
    let write = |addr, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(addr));
    let write_u64 = |addr, value: u64| write(addr, &value.to_le_bytes());
    let write_gate = |vector: u8, handler: u64| {
        let gate = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | INTERRUPT_GATE << 40;
        write_u64(layout::IDT + 16 * u64::from(vector), gate)
    };
    write(layout::CODE, program)?;
    for (i, descriptor) in GDT.iter().enumerate() {
        write_u64(layout::GDT + 8 * i as u64, *descriptor)?;
    }
    for vector in 0..EXCEPTIONS {
        let stub = layout::EXCEPTION_STUBS + 4 * u64::from(vector);
        write(stub, &exception_stub(vector))?;
        write_gate(vector, stub)?;
    }
    write(layout::INTERRUPT_HANDLER, programs::interrupt_handler())?;
    write_gate(layout::INTERRUPT_VECTOR, layout::INTERRUPT_HANDLER)?;
    write_u64(layout::TSS + 4, layout::KERNEL_STACK_TOP)?;
    let [pml4, pdpt, pd] = [0, 1, 2].map(|i| layout::PAGE_TABLES + i * 0x1000);
    write_u64(pml4, pdpt | TABLE_ENTRY)?;
    write_u64(pdpt, pd | TABLE_ENTRY)?;
    write_u64(pd, LARGE_PAGE)?;
    write_u64(pd + 8, layout::MMIO | LARGE_PAGE)?;
    Ok(())
}

/// Puts a vCPU at the start of the loaded program. The CPUID leaves come first: KVM checks control
/// registers against them.
///
/// # Errors
/// When KVM refuses.
pub fn set_registers(
    vcpu: &VcpuFd,
    ring: Ring,
    cr4: u64,
    cpuid: &CpuId,
) -> Result<(), ProbeFailure> {
    let (code, data, dpl) = match ring {
        Ring::Kernel => (KERNEL_CODE, KERNEL_DATA, 0),
        Ring::User => (USER_CODE, USER_DATA, 3),
    };
    let flat = |selector, type_, l| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    vcpu.set_cpuid2(cpuid).map_err(call("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    sregs.cs = flat(code, 11, 1);
    sregs.ds = flat(data, 3, 0);
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    sregs.tr = kvm_segment {
        base: layout::TSS,
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable { base: layout::GDT, limit: 0x27, ..Default::default() };
    sregs.idt = kvm_dtable { base: layout::IDT, limit: 0xfff, ..Default::default() };
    sregs.cr0 = CR0;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4 | cr4;
    sregs.efer = EFER;
    sregs.apic_base &= !APIC_BASE_ENABLE;
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: layout::CODE,
        rsp: layout::STACK_TOP,
        rflags: RFLAGS,
        ..Default::default()
    };
    Ok(vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?)
}

/// The entry of exception `vector`: it tells the vector and hangs.
fn exception_stub(vector: u8) -> [u8; 4] {
    [
        0xe6,
        layout::EXCEPTION + vector, // out EXCEPTION + vector, al
        0xeb,
        0xfe, // jmp $
    ]
}

/// What a port access of a program means.
pub fn decode_port(port: u16, direction: Direction) -> Stop {
    match (u8::try_from(port), direction) {
        (Ok(layout::REPORT), Direction::Write) => Stop::Report,
        (Ok(layout::ASK), Direction::Read) => Stop::Ask,
        (Ok(p), Direction::Write)
            if (layout::EXCEPTION..layout::EXCEPTION + EXCEPTIONS).contains(&p) =>
        {
            Stop::Exception { vector: p - layout::EXCEPTION }
        }
        _ => Stop::StrangePort { port },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_names_the_stop() {
        assert_eq!(decode_port(0x10, Direction::Write), Stop::Report);
        assert_eq!(decode_port(0x11, Direction::Read), Stop::Ask);
        assert_eq!(decode_port(0x8d, Direction::Write), Stop::Exception { vector: 13 });
        assert_eq!(decode_port(0x9f, Direction::Write), Stop::Exception { vector: 31 });
        assert_eq!(decode_port(0xa0, Direction::Write), Stop::StrangePort { port: 0xa0 });
        assert_eq!(decode_port(0x10, Direction::Read), Stop::StrangePort { port: 0x10 });
        assert_eq!(decode_port(0x110, Direction::Write), Stop::StrangePort { port: 0x110 });
    }
}
