//! The whole state of the vCPU, read and written.

use ftvmm_machine::cpu_state::{XCR0_RESET, xcr0};
use ftvmm_machine::msr::VCPU_MSRS;
use ftvmm_machine::vcpu_state::VcpuState;
use ftvmm_machine::{Cpu, CpuError};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_xcr, kvm_xcrs};

use super::call;
use super::vcpu::Vcpu;

impl Vcpu {
    pub(super) fn read_state(&self) -> Result<VcpuState, CpuError> {
        let fd = self.fd();
        Ok(VcpuState {
            regs: self.regs()?,
            sregs: self.sregs()?,
            xsave: Box::new(fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?),
            xcrs: read_xcrs(self)?,
            debug: fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            msrs: read_msrs(self)?,
            events: fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts the vCPU, which must have no exit to complete, into `state`.
    pub(super) fn place(&mut self, state: &VcpuState) -> Result<(), CpuError> {
        self.write_state(state)?;
        self.stands_placed(state.interrupts_enabled(), state.takes_interrupt());
        Ok(())
    }

    /// Segments first, because KVM takes an interrupt on its way from them, which the events then
    /// say exactly. The FPU goes by KVM_SET_XSAVE: KVM_SET_FPU on a vCPU that never ran is lost.
    fn write_state(&self, state: &VcpuState) -> Result<(), CpuError> {
        let fd = self.fd();
        // A state that is refused leaves the vCPU as it was.
        let (got, expected) = (state.msrs.len(), VCPU_MSRS.len());
        let entries = state.msr_entries().ok_or(CpuError::MsrCount { got, expected })?;
        self.set_sregs(&state.sregs)?;
        self.set_regs(&state.regs)?;
        write_xcrs(self, &state.xcrs)?;
        // SAFETY: without dynamically enabled features KVM reads the 4096 bytes of a kvm_xsave
        // (api.rst 4.43), and no such feature is ever asked for.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        fd.set_debug_regs(&state.debug).map_err(call("KVM_SET_DEBUGREGS"))?;
        let refused = || CpuError::Call {
            call: "KVM_SET_MSRS",
            cause: std::io::Error::from_raw_os_error(libc::EINVAL),
        };
        let msrs = Msrs::from_entries(&entries).map_err(|_| refused())?;
        if fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))? != entries.len() {
            return Err(refused());
        }
        fd.set_vcpu_events(&state.events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }
}

fn read_msrs(vcpu: &Vcpu) -> Result<Vec<u64>, CpuError> {
    let entries: Vec<_> =
        VCPU_MSRS.iter().map(|&(index, _)| kvm_msr_entry { index, ..Default::default() }).collect();
    let refused = || CpuError::Call {
        call: "KVM_GET_MSRS",
        cause: std::io::Error::from_raw_os_error(libc::EINVAL),
    };
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| refused())?;
    let read = vcpu.fd().get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
    if read != VCPU_MSRS.len() {
        return Err(refused());
    }
    Ok(msrs.as_slice().iter().map(|m| m.data).collect())
}

/// The extended control registers: none where the host's CPU has no XSAVE.
fn read_xcrs(vcpu: &Vcpu) -> Result<kvm_xcrs, CpuError> {
    if !vcpu.has_xcrs {
        return Ok(kvm_xcrs::default());
    }
    vcpu.fd().get_xcrs().map_err(call("KVM_GET_XCRS"))
}

/// Gives the vCPU its extended control registers. A CPU without XSAVE has none and KVM refuses the
/// call there, so what a CPU with XSAVE has at reset is not told to one without.
fn write_xcrs(vcpu: &Vcpu, xcrs: &kvm_xcrs) -> Result<(), CpuError> {
    match (vcpu.has_xcrs, xcr0(xcrs)) {
        (true, value) => {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0] = kvm_xcr { xcr: 0, value, ..Default::default() };
            vcpu.fd().set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))
        }
        (false, XCR0_RESET) => Ok(()),
        (false, xcr0) => Err(CpuError::NoXsave { xcr0 }),
    }
}
