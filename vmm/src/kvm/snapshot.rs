//! The whole state of the vCPU, taken from one and given to another.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::state::{read_msrs, read_xcrs, write_xcrs};
use super::vcpu::{Vcpu, has_event};
use super::{KvmError, call};
use crate::msr::VCPU_MSRS;

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// Everything KVM keeps of a stopped vCPU that has no exit to complete.
///
/// The FPU goes by KVM_GET_XSAVE: KVM_SET_FPU on a vCPU that never ran is lost.
#[derive(Serialize, Deserialize)]
#[cfg_attr(test, derive(Default))]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    msrs: Vec<u64>,
    /// Exceptions and interrupts on their way, and the interrupt shadow.
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Takes the state.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(vcpu: &Vcpu) -> Result<Self, KvmError> {
        let fd = vcpu.fd();
        Ok(Self {
            regs: vcpu.regs()?,
            sregs: vcpu.sregs()?,
            xsave: Box::new(fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?),
            xcrs: read_xcrs(vcpu)?,
            debug: fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            msrs: read_msrs(vcpu)?,
            events: fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Gives the state to `vcpu`. Segments first, because KVM takes an interrupt on its way from
    /// them, which the events then say exactly.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, vcpu: &Vcpu) -> Result<(), KvmError> {
        let fd = vcpu.fd();
        vcpu.set_sregs(&self.sregs)?;
        vcpu.set_regs(&self.regs)?;
        write_xcrs(vcpu, &self.xcrs)?;
        // SAFETY: without dynamically enabled features KVM reads the 4096 bytes of a kvm_xsave
        // (api.rst 4.43), and no such feature is ever asked for.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        fd.set_debug_regs(&self.debug).map_err(call("KVM_SET_DEBUGREGS"))?;
        let entries: Vec<_> = VCPU_MSRS
            .iter()
            .zip(&self.msrs)
            .map(|(&(index, _), &data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        let refused =
            || KvmError::Call { call: "KVM_SET_MSRS", cause: kvm_ioctls::Error::new(libc::EINVAL) };
        let msrs = Msrs::from_entries(&entries).map_err(|_| refused())?;
        if fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))? != entries.len() {
            return Err(refused());
        }
        fd.set_vcpu_events(&self.events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// Whether the vCPU could take an interrupt here, as KVM decides it for
    /// `ready_for_interrupt_injection`: IF set, no shadow, nothing else on its way.
    pub fn takes_interrupt(&self) -> bool {
        self.interrupts_enabled() && self.events.interrupt.shadow == 0 && !has_event(&self.events)
    }

    /// RFLAGS.IF.
    pub fn interrupts_enabled(&self) -> bool {
        self.regs.rflags & INTERRUPT_FLAG != 0
    }
}

impl Vcpu {
    /// Takes the whole state of the vCPU, which must have no exit to complete, and gives it back:
    /// KVM does not take every value as it gave it (its AMD part cuts SYSENTER_ESP and
    /// SYSENTER_EIP to 32 bits, `svm_set_msr`), and whoever else restores the state is to stand
    /// where this vCPU stands.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&mut self) -> Result<VcpuState, KvmError> {
        let state = VcpuState::save(self)?;
        self.place(&state)?;
        Ok(state)
    }

    fn place(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        state.restore(self)?;
        self.stands_placed(state.interrupts_enabled(), state.takes_interrupt());
        Ok(())
    }

    /// Puts the vCPU into `state`, whatever it was doing.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        self.abandon()?;
        self.place(state)
    }

    /// Puts the vCPU back to where it stood before its first instruction. Between, it is without
    /// paging for a moment: KVM flushes the guest's TLB when CR0.PG changes, and only then
    /// surely (`__set_sregs`, arch/x86/kvm/x86.c).
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn reset(&mut self, power_on: &VcpuState) -> Result<(), KvmError> {
        const CR0_PE_ET: u64 = 0x11;
        const EFER_LME_LMA: u64 = 0x500;
        self.abandon()?;
        let mut sregs = self.sregs()?;
        sregs.cr0 = CR0_PE_ET;
        sregs.efer &= !EFER_LME_LMA;
        (sregs.cs.l, sregs.cs.db) = (0, 1);
        self.set_sregs(&sregs)?;
        self.place(power_on)
    }
}
