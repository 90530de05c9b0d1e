//! What makes a guest stop, and what can be done to it while it stands.

use ftvmm_machine::{Cpu, Kick};

use super::host::Host;
use crate::micro_guest::programs::{self, layout};
use crate::micro_guest::{Findings, ProbeFailure, Ring, Stop, expect_equal};
use crate::{call, install_kick_handler};

/// A port read is answered in EAX, and RDX can be set on the way: what a patched kernel RDTSC does.
pub fn port_read(host: &Host) -> Findings {
    let mut guest = host.guest(programs::ask(), Ring::Kernel)?;
    let mut regs = guest.run_to(Stop::Ask)?;
    regs.rdx = 0x1234_5678;
    guest.vcpu.set_regs(&regs)?;
    guest.answer(0x9abc_def0);
    let regs = guest.run_to(Stop::Report)?;
    expect_equal("RAX after the port read", regs.rax, 0x9abc_def0)?;
    expect_equal("RDX after the port read", regs.rdx, 0x1234_5678)?;
    Ok("answered in EAX, RDX set".into())
}

/// HLT stops the machine, and it can go on after it.
pub fn halt(host: &Host) -> Findings {
    let mut guest = host.guest(programs::halt(), Ring::Kernel)?;
    guest.run_to(Stop::Hlt)?;
    guest.run_to(Stop::Report)?;
    Ok("stops and goes on".into())
}

/// Reads and writes beyond the memory stop the machine.
pub fn mmio(host: &Host) -> Findings {
    let mut guest = host.guest(programs::mmio(), Ring::Kernel)?;
    guest.run_to(Stop::MmioRead { addr: layout::MMIO })?;
    guest.vcpu.mmio_data().copy_from_slice(&41u32.to_le_bytes());
    guest.run_to(Stop::MmioWrite { addr: layout::MMIO + 8, value: 42 })?;
    guest.run_to(Stop::Report)?;
    Ok("read answered, write seen".into())
}

/// An interrupt handed over at an exit is taken at once after it, in either ring.
pub fn interrupt(host: &Host) -> Findings {
    /// Length of `in eax, imm8`, the first instruction of the program.
    const IN_BYTES: u64 = 2;
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = host.guest(programs::ask(), ring)?;
        guest.run_to(Stop::Ask)?;
        guest.answer(7);
        if !guest.vcpu.can_take_interrupt()? {
            return Err(ProbeFailure::Differs {
                what: format!("ring {ring}: readiness for an interrupt at a port exit with IF set"),
                got: "not ready".into(),
                expected: "ready".into(),
            });
        }
        guest.vcpu.inject(layout::INTERRUPT_VECTOR)?;
        let regs = guest.run_to(Stop::Report)?;
        expect_equal(format!("ring {ring}: RAX after the interrupt"), regs.rax, 7)?;
        let taken = guest.read_u64(layout::TICKS)?;
        expect_equal(format!("ring {ring}: interrupts taken"), taken, 1)?;
        let rip = guest.read_u64(layout::TICKS + 8)?;
        expect_equal(format!("ring {ring}: interrupted RIP"), rip, layout::CODE + IN_BYTES)?;
    }
    Ok("taken right after the exit in both rings".into())
}

/// A computing guest is stopped by a kick: before its first instruction when the kick comes first,
/// and in the middle of its loop when the watchdog kicks.
pub fn forced_stop(host: &Host) -> Findings {
    install_kick_handler()?;
    for ring in [Ring::Kernel, Ring::User] {
        // RCX starts at zero, so the loop is 2^64 rounds long.
        let mut guest = host.guest(programs::count_down(), ring)?;
        guest.vcpu.kicker().kick();
        let stop = guest.run()?;
        let regs = guest.vcpu.regs()?;
        if stop != Stop::Interrupted {
            let (got, rip, expected) = (stop, regs.rip, Stop::Interrupted);
            return Err(ProbeFailure::WrongStop { got, rip, expected });
        }
        expect_equal(format!("ring {ring}: rounds before the first kick"), regs.rcx, 0)?;
        guest.run_to_kick(1)?;
        let rounds = guest.vcpu.regs()?.rcx.wrapping_neg();
        if rounds == 0 {
            return Err(ProbeFailure::Differs {
                what: format!("ring {ring}: rounds between two kicks"),
                got: "none".into(),
                expected: "some".into(),
            });
        }
    }
    Ok("before the first instruction and in a loop, in both rings".into())
}

/// The registers of a halted guest, FPU and SSE included, work on in another machine. They move
/// with `KVM_SET_XSAVE`: `KVM_SET_FPU` leaves XSTATE_BV alone, which is zero in a vCPU that has
/// never run, and the values are lost (seen with Linux 6.1).
pub fn fpu_moved(host: &Host) -> Findings {
    let program = programs::fpu();
    let mut from = host.guest(program, Ring::Kernel)?;
    let regs = from.run_to(Stop::Hlt)?;
    let mut to = host.guest(program, Ring::Kernel)?;
    to.vcpu.set_sregs(&from.vcpu.sregs()?)?;
    to.vcpu.set_regs(&regs)?;
    let fpu = from.vcpu.fd().get_xsave().map_err(call("KVM_GET_XSAVE"))?;
    // SAFETY: KVM reads more than a kvm_xsave only for guests with AMX, and no guest is given that.
    unsafe { to.vcpu.fd().set_xsave(&fpu) }.map_err(call("KVM_SET_XSAVE"))?;
    to.run_to(Stop::Report)?;
    for (offset, what, expected) in [
        (0, "mantissa of ST0", 0x8000_0000_0000_0000),
        (16, "mantissa of ST1", 0xc90f_daa2_2168_c235),
        (32, "XMM0, low half", 0x0123_4567_89ab_cdef),
        (48, "XMM15, low half", 0x89ab_cdef_0123_4567),
        (64, "MXCSR", 0x7f80),
    ] {
        expect_equal(what, to.read_u64(layout::DATA + offset)?, expected)?;
    }
    Ok("x87, SSE and MXCSR are the same in another machine".into())
}
