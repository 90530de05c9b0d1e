//! The vCPU: run it, read why it stopped, answer, inject an interrupt.

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use ftvmm_replication::PAGE_BYTES;
use kvm_bindings::{
    CpuId, KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVMIO,
    kvm_guest_debug, kvm_interrupt, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::kick_target::ImmediateExit;
use super::kicker::{Kicker, Kicks};
use super::{Direction, Exit, KvmError, Memory, call};
use crate::msr::MsrAccess;

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
    _memory: Rc<Memory>,
    /// The segments and control registers in `kvm_run` are those of the stopped guest.
    sregs_synced: Cell<bool>,
    /// Set while the guest stands where KVM_RUN did not stop it: (IF, takes an interrupt).
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
            _memory: memory,
            sregs_synced: Cell::new(false),
            placed: None,
            at_exit: false,
            next_exit: None,
        }
    }

    /// The KVM handle, for set-up and state.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Lets the guest run until it stops. With `want_window` it also stops as soon as it can take
    /// an interrupt.
    ///
    /// # Errors
    /// Any reason to stop that is not an [`Exit`] is fatal and named.
    pub fn run(&mut self, want_window: bool) -> Result<Exit, KvmError> {
        let exit = match self.next_exit.take() {
            Some(exit) => exit,
            None => self.run_to_exit(want_window)?,
        };
        self.at_exit = exit.is_synchronous();
        Ok(exit)
    }

    fn run_to_exit(&mut self, want_window: bool) -> Result<Exit, KvmError> {
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
            Err(cause) => Err(KvmError::Call { call: "KVM_RUN", cause }),
        }
    }

    /// What KVM_RUN returned for.
    fn exit(&mut self) -> Result<Exit, KvmError> {
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

    fn unknown_exit(&mut self) -> KvmError {
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
        KvmError::UnknownExit { reason, suberror, rip }
    }

    /// Completes the access the guest stopped for without letting it execute anything, and brings
    /// [`Self::can_take_interrupt`] up to date with registers set since (KVM api.rst, KVM_RUN:
    /// `immediate_exit`). The data of the exit is gone afterwards. Where RIP was moved before, KVM
    /// leaves the access alone (`kvm_is_linear_rip` in its `complete_fast_pio_in`, since Linux
    /// 5.1).
    ///
    /// # Errors
    /// When KVM refuses, or the instruction makes another exit.
    pub fn settle(&mut self) -> Result<(), KvmError> {
        match self.complete()? {
            None => Ok(()),
            Some(_) => Err(self.unknown_exit()),
        }
    }

    /// As [`Self::settle`]; an instruction that makes several accesses may stop for the next.
    fn complete(&mut self) -> Result<Option<Exit>, KvmError> {
        self.sregs_synced.set(false);
        self.kicks.hold();
        let answer = self.fd.run().map(drop);
        self.kicks.let_go();
        match answer {
            Err(e) if e.errno() == libc::EINTR => Ok(None),
            Err(cause) => Err(KvmError::Call { call: "KVM_RUN", cause }),
            Ok(()) => self.exit().map(Some),
        }
    }

    /// Lets the guest execute one instruction, which must not be one that makes an exit.
    ///
    /// # Errors
    /// When the guest stops for another reason.
    pub fn step(&mut self) -> Result<(), KvmError> {
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
                Err(cause) => break Err(KvmError::Call { call: "KVM_RUN", cause }),
            }
        };
        self.kicks.let_go();
        self.debug(0)?;
        stepped
    }

    fn debug(&self, control: u32) -> Result<(), KvmError> {
        let debug = kvm_guest_debug { control, ..Default::default() };
        self.fd.set_guest_debug(&debug).map_err(call("KVM_SET_GUEST_DEBUG"))
    }

    /// Has the guest take the exception `vector` before its next instruction. The access it stopped
    /// for must be settled, RIP be what the exception is to save.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn raise(&self, vector: u8, error_code: Option<u32>) -> Result<(), KvmError> {
        let mut events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = error_code.is_some().into();
        events.exception.error_code = error_code.unwrap_or(0);
        self.fd.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// The data of the last [`Exit::Pio`]: `size_bytes * count` bytes, to be read or filled.
    pub fn pio_data(&mut self) -> &mut [u8] {
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

    /// The data of the last [`Exit::Mmio`], to be read or filled.
    pub fn mmio_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        assert_eq!(run.exit_reason, KVM_EXIT_MMIO);
        // SAFETY: the exit reason says that KVM filled the `mmio` member.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        let length = (mmio.len as usize).min(mmio.data.len());
        &mut mmio.data[..length]
    }

    /// Answers the last [`Exit::Msr`]: with the value read, or anything for a write that is done;
    /// `None` is #GP.
    pub fn answer_msr(&mut self, answer: Option<u64>) {
        let run = self.fd.get_kvm_run();
        assert!(matches!(run.exit_reason, KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR));
        // SAFETY: the exit reason says that KVM filled the `msr` member, and reads it at the next
        // run.
        let msr = unsafe { &mut run.__bindgen_anon_1.msr };
        msr.error = answer.is_none().into();
        msr.data = answer.unwrap_or(0);
    }

    /// True when the guest can take an interrupt where it stands: IF is set and nothing else is
    /// waiting to be injected. The shadow of an STI or MOV SS counts between two exits only:
    /// the instruction that made an exit is complete before the interrupt comes, which ends the
    /// shadow, and not every CPU still shows one then that had to stop the guest meanwhile.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn can_take_interrupt(&mut self) -> Result<bool, KvmError> {
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

    /// As [`Self::can_take_interrupt`], once the instruction that made the exit is complete. It may
    /// fault then, and KVM drops an interrupt it was given before for the fault; or make
    /// another exit, which the next [`Self::run`] returns.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn accepts_interrupt(&mut self) -> Result<bool, KvmError> {
        if self.at_exit && self.placed.is_none() && self.interrupts_enabled() {
            self.next_exit = self.complete()?;
        }
        Ok(self.next_exit.is_none() && self.can_take_interrupt()?)
    }

    /// Whether a non-maskable interrupt would be taken here, once the instruction that made the
    /// exit is complete: nothing else is on its way, none is being served, and no instruction
    /// shadows it. Then where it comes is no matter of KVM's.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn accepts_nmi(&mut self) -> Result<bool, KvmError> {
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

    /// Whether the guest is serving a non-maskable interrupt.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn masks_nmis(&self) -> Result<bool, KvmError> {
        let events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        Ok(events.nmi.masked != 0)
    }

    /// Hands the guest a non-maskable interrupt; it takes it before its next instruction. Only
    /// valid while [`Self::accepts_nmi`].
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn inject_nmi(&mut self) -> Result<(), KvmError> {
        let mut events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        events.nmi.injected = 1;
        events.interrupt.shadow = 0;
        self.fd.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// RFLAGS.IF at the exit the guest stands at.
    pub fn interrupts_enabled(&mut self) -> bool {
        self.placed.map_or(self.fd.get_kvm_run().if_flag != 0, |(enabled, _)| enabled)
    }

    /// The guest stands where a state put it: the state's own interrupt shadow counts, wherever this
    /// vCPU stood before.
    pub(super) fn stands_placed(&mut self, interrupts_enabled: bool, takes_interrupt: bool) {
        self.at_exit = false;
        self.placed = Some((interrupts_enabled, takes_interrupt));
    }

    /// Gives up the access the guest stopped for, be it one of several of its instruction. What
    /// that does to registers and memory is for the caller to undo.
    pub(super) fn abandon(&mut self) -> Result<(), KvmError> {
        self.next_exit = None;
        while self.complete()?.is_some() {}
        Ok(())
    }

    /// Gives the vCPU this CPUID table.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmError> {
        self.fd.set_cpuid2(cpuid).map_err(call("KVM_SET_CPUID2"))
    }

    /// Hands the guest the interrupt `vector`; it takes it before its next instruction. Only valid
    /// while [`Self::accepts_interrupt`].
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn inject(&mut self, vector: u8) -> Result<(), KvmError> {
        let interrupt = kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: KVM_INTERRUPT reads one kvm_interrupt, which lives for the call.
        let answer = unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
        if answer < 0 {
            let cause = kvm_ioctls::Error::last();
            return Err(KvmError::Call { call: "KVM_INTERRUPT", cause });
        }
        Ok(())
    }

    /// General registers.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().map_err(call("KVM_GET_REGS"))
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd.set_regs(regs).map_err(call("KVM_SET_REGS"))
    }

    /// Segments, control registers and descriptor tables.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))
    }

    /// As [`Self::sregs`], without a call where KVM left them in `kvm_run` (KVM api.rst,
    /// KVM_CAP_SYNC_REGS). They name no interrupt on its way: in `kvm_run` KVM sets such a bit
    /// and never clears it (`store_regs`, Linux 6.1), and [`Self::set_sregs`] would bring that
    /// interrupt again.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn exit_sregs(&self) -> Result<kvm_sregs, KvmError> {
        let sregs = if self.sregs_synced.get() { self.fd.sync_regs().sregs } else { self.sregs()? };
        Ok(kvm_sregs { interrupt_bitmap: Default::default(), ..sregs })
    }

    /// Sets segments, control registers and descriptor tables.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.sregs_synced.set(false);
        self.fd.set_sregs(sregs).map_err(call("KVM_SET_SREGS"))
    }

    /// The bytes at the instruction pointer, at most 15 and none of another page; empty where
    /// nothing is mapped.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn code_at_rip(&self, memory: &Memory) -> Result<Vec<u8>, KvmError> {
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

    /// A handle with which another thread makes this vCPU's `KVM_RUN` return.
    pub fn kicker(&self) -> Kicker {
        self.kicks.kicker()
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kicks.end();
    }
}

impl AsRawFd for Vcpu {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

fn direction(is_write: bool) -> Direction {
    if is_write { Direction::Write } else { Direction::Read }
}

/// Whether an exception or interrupt is on its way to the guest.
pub(super) fn has_event(events: &kvm_vcpu_events) -> bool {
    events.interrupt.injected != 0
        || events.exception.injected != 0
        || events.exception.pending != 0
        || events.nmi.injected != 0
}
