//! The vCPU: run it, read why it stopped, answer, inject an interrupt.

use std::cell::Cell;
use std::rc::Rc;

use ftvmm_machine::exit::{Direction, Exit};
use ftvmm_machine::memory::Memory;
use ftvmm_machine::msr::MsrAccess;
use ftvmm_machine::vcpu_state::{VcpuState, has_event};
use ftvmm_machine::{Cpu, CpuError};
use ftvmm_replication::PAGE_BYTES;
use kvm_bindings::{
    CpuId, KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVMIO,
    kvm_debugregs, kvm_guest_debug, kvm_interrupt, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::kick_target::ImmediateExit;
use super::kicker::{Kicker, Kicks};
use super::{call, forget_memory};

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// Longest instruction (AMD APM vol. 3, section 1.1).
const INSTRUCTION_BYTES_MAX: u64 = 15;

/// What the host's KVM can do with the vCPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct VcpuCaps {
    /// KVM_CAP_SYNC_REGS.
    pub(super) sync_regs: bool,
    /// KVM_CAP_XCRS: the host's CPU has XSAVE.
    pub(super) xcrs: bool,
}

/// The one virtual CPU.
pub struct Vcpu {
    fd: VcpuFd,
    /// The host's CPU has XSAVE, so that the vCPU has an XCR0.
    pub(super) has_xcrs: bool,
    kicks: Kicks,
    /// What the guest's memory is mapped to: KVM writes there while the guest runs.
    memory: Rc<Memory>,
    /// The segments and control registers in `kvm_run` are those of the stopped guest.
    sregs_synced: Cell<bool>,
    /// Set while the guest stands at a restored point, where KVM_RUN did not stop it: (IF, takes an
    /// interrupt).
    placed: Option<(bool, bool)>,
    /// The guest stands behind an instruction that made an exit, not between any two.
    at_exit: bool,
    /// The next exit of an instruction that makes several.
    next_exit: Option<Exit>,
}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd, has: VcpuCaps, memory: Rc<Memory>) -> Self {
        if has.sync_regs {
            fd.set_sync_valid_reg(SyncReg::SystemRegister);
        }
        // SAFETY: `fd` unmaps the vCPU when it is dropped with the Vcpu. Before that, Vcpu::drop
        // ends what others hold of these kicks, and they themselves belong to the Vcpu.
        let kicks = Kicks::new(unsafe { ImmediateExit::of(fd.get_kvm_run()) });
        Self {
            fd,
            has_xcrs: has.xcrs,
            kicks,
            memory,
            sregs_synced: Cell::new(false),
            placed: None,
            at_exit: false,
            next_exit: None,
        }
    }

    /// The KVM handle, for set-up and state.
    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    fn run_to_exit(&mut self, want_window: bool) -> Result<Exit, CpuError> {
        self.placed = None;
        self.kicks.run_here();
        self.fd.get_kvm_run().request_interrupt_window = want_window.into();
        self.sregs_synced.set(false);
        let answer = self.fd.run().map(drop);
        self.sregs_synced.set(self.fd.get_kvm_run().kvm_valid_regs != 0);
        match answer {
            Ok(()) => self.exit(),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.kicks.answer();
                Ok(Exit::Interrupted)
            }
            Err(cause) => Err(call("KVM_RUN")(cause)),
        }
    }

    /// What KVM_RUN returned for.
    fn exit(&mut self) -> Result<Exit, CpuError> {
        let run = self.fd.get_kvm_run();
        match run.exit_reason {
            KVM_EXIT_IO => {
                // SAFETY: the exit reason says that KVM filled the `io` member.
                let io = unsafe { run.__bindgen_anon_1.io };
                Ok(Exit::Pio {
                    port: io.port,
                    direction: direction(u32::from(io.direction) == KVM_EXIT_IO_OUT),
                    size_bytes: io.size,
                    count: io.count,
                })
            }
            KVM_EXIT_MMIO => {
                // SAFETY: the exit reason says that KVM filled the `mmio` member.
                let mmio = unsafe { run.__bindgen_anon_1.mmio };
                Ok(Exit::Mmio {
                    addr: mmio.phys_addr,
                    direction: direction(mmio.is_write != 0),
                    size_bytes: mmio.len as u8,
                })
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                // SAFETY: the exit reason says that KVM filled the `msr` member.
                let msr = unsafe { run.__bindgen_anon_1.msr };
                let written = (run.exit_reason == KVM_EXIT_X86_WRMSR).then_some(msr.data);
                Ok(Exit::Msr(MsrAccess { index: msr.index, written }))
            }
            KVM_EXIT_HLT => Ok(Exit::Hlt),
            KVM_EXIT_SHUTDOWN => Ok(Exit::Shutdown),
            KVM_EXIT_IRQ_WINDOW_OPEN => Ok(Exit::WindowOpen),
            _ => Err(self.unknown_exit()),
        }
    }

    fn unknown_exit(&mut self) -> CpuError {
        let run = self.fd.get_kvm_run();
        let reason = run.exit_reason;
        let suberror = match reason {
            // SAFETY: the exit reason says that KVM filled the `internal` member.
            KVM_EXIT_INTERNAL_ERROR => unsafe { run.__bindgen_anon_1.internal.suberror },
            // SAFETY: the exit reason says that KVM filled the `fail_entry` member.
            KVM_EXIT_FAIL_ENTRY => unsafe {
                run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason as u32
            },
            _ => 0,
        };
        let rip = self.regs().map_or(0, |regs| regs.rip);
        CpuError::UnknownExit { reason, suberror, rip }
    }

    /// As [`Cpu::complete_io`]; an instruction that makes several accesses may stop for the next.
    fn complete(&mut self) -> Result<Option<Exit>, CpuError> {
        self.sregs_synced.set(false);
        self.kicks.hold();
        let answer = self.fd.run().map(drop);
        self.kicks.let_go();
        match answer {
            Err(e) if e.errno() == libc::EINTR => Ok(None),
            Err(cause) => Err(call("KVM_RUN")(cause)),
            Ok(()) => self.exit().map(Some),
        }
    }

    fn debug(&self, control: u32) -> Result<(), CpuError> {
        let debug = kvm_guest_debug { control, ..Default::default() };
        self.fd.set_guest_debug(&debug).map_err(call("KVM_SET_GUEST_DEBUG"))
    }

    /// The guest now stands where a restored state put it. The interrupt shadow of that state
    /// counts, not that of the exit before.
    pub(super) fn stands_placed(&mut self, interrupts_enabled: bool, takes_interrupt: bool) {
        self.at_exit = false;
        self.placed = Some((interrupts_enabled, takes_interrupt));
    }

    /// Abandons the access the guest stopped for, and all further ones of its instruction. The
    /// caller must undo the effect on registers and memory.
    pub(super) fn abandon(&mut self) -> Result<(), CpuError> {
        self.next_exit = None;
        while self.complete()?.is_some() {}
        Ok(())
    }

    /// Gives the vCPU this CPUID table.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), CpuError> {
        self.fd.set_cpuid2(cpuid).map_err(call("KVM_SET_CPUID2"))
    }

    /// A handle with which another thread makes this vCPU's `KVM_RUN` return.
    pub fn kicker(&self) -> Kicker {
        self.kicks.kicker()
    }
}

// SAFETY: KVM touches guest memory only inside ioctls on this processor's descriptor (KVM_RUN and
// KVM_TRANSLATE), and only methods of this type make them, on their caller's thread. Besides KVM,
// `power_on_again` writes memory and `code_at_rip` reads it.
unsafe impl Cpu for Vcpu {
    fn run(&mut self, want_window: bool) -> Result<Exit, CpuError> {
        let exit = match self.next_exit.take() {
            Some(exit) => exit,
            None => self.run_to_exit(want_window)?,
        };
        self.at_exit = exit.is_synchronous();
        Ok(exit)
    }

    // KVM api.rst, KVM_RUN: `immediate_exit`. Where RIP was moved before, KVM leaves the access
    // alone (`kvm_is_linear_rip` in its `complete_fast_pio_in`, since Linux 5.1).
    fn complete_io(&mut self) -> Result<(), CpuError> {
        match self.complete()? {
            None => Ok(()),
            Some(_) => Err(self.unknown_exit()),
        }
    }

    fn step(&mut self) -> Result<(), CpuError> {
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        self.debug(control)?;
        self.kicks.run_here();
        let stepped = loop {
            self.sregs_synced.set(false);
            match self.fd.run().map(drop) {
                Ok(()) if self.fd.get_kvm_run().exit_reason == KVM_EXIT_DEBUG => break Ok(()),
                Ok(()) => break Err(self.unknown_exit()),
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.kicks.put_off();
                }
                Err(cause) => break Err(call("KVM_RUN")(cause)),
            }
        };
        self.kicks.let_go();
        self.debug(0)?;
        stepped
    }

    fn pio_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        assert_eq!(run.exit_reason, KVM_EXIT_IO);
        // SAFETY: the exit reason says that KVM filled the `io` member.
        let io = unsafe { run.__bindgen_anon_1.io };
        let length = usize::from(io.size) * io.count as usize;
        // SAFETY: KVM puts the data at `data_offset` of the vCPU's mapping (KVM api.rst,
        // KVM_EXIT_IO), which begins with kvm_run and which kvm-ioctls maps whole; the borrow of
        // self keeps the next KVM_RUN away.
        unsafe {
            let start = std::ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize);
            std::slice::from_raw_parts_mut(start, length)
        }
    }

    fn mmio_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        assert_eq!(run.exit_reason, KVM_EXIT_MMIO);
        // SAFETY: the exit reason says that KVM filled the `mmio` member.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        let length = (mmio.len as usize).min(mmio.data.len());
        &mut mmio.data[..length]
    }

    fn answer_msr(&mut self, answer: Option<u64>) {
        let run = self.fd.get_kvm_run();
        assert!(matches!(run.exit_reason, KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR));
        // SAFETY: the exit reason says that KVM filled the `msr` member, and reads it at the next
        // run.
        let msr = unsafe { &mut run.__bindgen_anon_1.msr };
        msr.error = answer.is_none().into();
        msr.data = answer.unwrap_or(0);
    }

    fn interrupts_enabled(&mut self) -> bool {
        self.placed.map_or(self.fd.get_kvm_run().if_flag != 0, |(enabled, _)| enabled)
    }

    // The instruction that made an exit is complete before the interrupt comes, which ends the
    // shadow, and not every CPU still shows one then that had to stop the guest meanwhile.
    fn can_take_interrupt(&mut self) -> Result<bool, CpuError> {
        if let Some((_, ready)) = self.placed {
            return Ok(ready);
        }
        let run = self.fd.get_kvm_run();
        let ready = run.ready_for_interrupt_injection != 0;
        if run.if_flag == 0 || ready || !self.at_exit {
            return Ok(ready && run.if_flag != 0);
        }
        let events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        Ok(!has_event(&events))
    }

    // The instruction may fault when it is completed, and KVM drops an interrupt it was given
    // before for the fault; or make another exit, which the next run returns.
    fn accepts_interrupt(&mut self) -> Result<bool, CpuError> {
        if self.at_exit && self.placed.is_none() && self.interrupts_enabled() {
            self.next_exit = self.complete()?;
        }
        Ok(self.next_exit.is_none() && self.can_take_interrupt()?)
    }

    fn inject(&mut self, vector: u8) -> Result<(), CpuError> {
        let interrupt = kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: KVM_INTERRUPT reads one kvm_interrupt, which lives for the call.
        let answer = unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
        if answer < 0 {
            let cause = std::io::Error::last_os_error();
            return Err(CpuError::Call { call: "KVM_INTERRUPT", cause });
        }
        Ok(())
    }

    // Nothing else may be on its way, none be served, and no instruction shadow it: then where it
    // comes is no matter of KVM's.
    fn accepts_nmi(&mut self) -> Result<bool, CpuError> {
        if self.at_exit && self.placed.is_none() && self.next_exit.is_none() {
            self.next_exit = self.complete()?;
        }
        if self.next_exit.is_some() {
            return Ok(false);
        }
        let events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        let shadowed = events.interrupt.shadow != 0 && !self.at_exit;
        Ok(!has_event(&events) && events.nmi.masked == 0 && !shadowed)
    }

    fn masks_nmis(&self) -> Result<bool, CpuError> {
        let events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        Ok(events.nmi.masked != 0)
    }

    fn inject_nmi(&mut self) -> Result<(), CpuError> {
        let mut events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        events.nmi.injected = 1;
        events.interrupt.shadow = 0;
        self.fd.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    fn raise(&self, vector: u8, error_code: Option<u32>) -> Result<(), CpuError> {
        let mut events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = error_code.is_some().into();
        events.exception.error_code = error_code.unwrap_or(0);
        self.fd.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    fn regs(&self) -> Result<kvm_regs, CpuError> {
        self.fd.get_regs().map_err(call("KVM_GET_REGS"))
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<(), CpuError> {
        self.fd.set_regs(regs).map_err(call("KVM_SET_REGS"))
    }

    fn sregs(&self) -> Result<kvm_sregs, CpuError> {
        self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))
    }

    // Without a call where KVM left them in `kvm_run` (KVM api.rst, KVM_CAP_SYNC_REGS). There KVM
    // sets the bit of an interrupt on its way and never clears it (`store_regs`, Linux 6.1), and
    // KVM_SET_SREGS would bring that interrupt again.
    fn exit_sregs(&self) -> Result<kvm_sregs, CpuError> {
        let sregs = if self.sregs_synced.get() { self.fd.sync_regs().sregs } else { self.sregs()? };
        Ok(kvm_sregs { interrupt_bitmap: Default::default(), ..sregs })
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), CpuError> {
        self.sregs_synced.set(false);
        self.fd.set_sregs(sregs).map_err(call("KVM_SET_SREGS"))
    }

    fn code_at_rip(&self, memory: &Memory) -> Result<Vec<u8>, CpuError> {
        let (regs, sregs) = (self.regs()?, self.sregs()?);
        let linear = sregs.cs.base.wrapping_add(regs.rip);
        let place = self.fd.translate_gva(linear).map_err(call("KVM_TRANSLATE"))?;
        let in_page = PAGE_BYTES as u64 - linear % PAGE_BYTES as u64;
        let mut code = vec![0; in_page.min(INSTRUCTION_BYTES_MAX) as usize];
        let read = memory.read_slice(&mut code, GuestAddress(place.physical_address));
        if place.valid == 0 || read.is_err() {
            code.clear();
        }
        Ok(code)
    }

    fn debug_regs(&self) -> Result<kvm_debugregs, CpuError> {
        self.fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))
    }

    fn set_debug_regs(&self, regs: &kvm_debugregs) -> Result<(), CpuError> {
        self.fd.set_debug_regs(regs).map_err(call("KVM_SET_DEBUGREGS"))
    }

    fn state(&self) -> Result<VcpuState, CpuError> {
        self.read_state()
    }

    // KVM does not take every value as it gave it (its AMD part cuts SYSENTER_ESP and SYSENTER_EIP
    // to 32 bits, `svm_set_msr`): the state is restored here too, so that another vCPU that
    // restores it stands where this vCPU stands.
    fn save(&mut self) -> Result<VcpuState, CpuError> {
        let state = self.read_state()?;
        self.place(&state)?;
        Ok(state)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), CpuError> {
        self.abandon()?;
        self.place(state)
    }

    // Between, it is without paging for a moment: KVM flushes the guest's TLB when CR0.PG changes,
    // and only then surely (`__set_sregs`, arch/x86/kvm/x86.c).
    fn power_on_again(&mut self, power_on: &VcpuState) -> Result<(), CpuError> {
        const CR0_PE_ET: u64 = 0x11;
        const EFER_LME_LMA: u64 = 0x500;
        self.abandon()?;
        let mut sregs = self.sregs()?;
        sregs.cr0 = CR0_PE_ET;
        sregs.efer &= !EFER_LME_LMA;
        (sregs.cs.l, sregs.cs.db) = (0, 1);
        self.set_sregs(&sregs)?;
        self.place(power_on)?;
        forget_memory(&self.memory)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kicks.end();
    }
}

fn direction(is_write: bool) -> Direction {
    if is_write { Direction::Write } else { Direction::Read }
}
