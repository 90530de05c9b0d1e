//! The whole state of the vCPU, as data.

use kvm_bindings::{kvm_debugregs, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave};
use serde::{Deserialize, Serialize};

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// Everything KVM keeps of a stopped vCPU that has no exit to complete.
#[derive(Default, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers and descriptor tables.
    pub sregs: kvm_sregs,
    /// The image XSAVE makes: x87, SSE and AVX.
    pub xsave: Box<kvm_xsave>,
    /// Extended control registers: none where the host's CPU has no XSAVE.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// The registers of [`VCPU_MSRS`](crate::msr::VCPU_MSRS), in its order.
    pub msrs: Vec<u64>,
    /// Exceptions and interrupts on their way, and the interrupt shadow.
    pub events: kvm_vcpu_events,
}

impl VcpuState {
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

/// Whether an exception or interrupt is on its way to the guest.
pub fn has_event(events: &kvm_vcpu_events) -> bool {
    events.interrupt.injected != 0
        || events.exception.injected != 0
        || events.exception.pending != 0
        || events.nmi.injected != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_is_taken_where_nothing_is_in_its_way() {
        let changed = |change: fn(&mut VcpuState)| {
            let mut state = VcpuState::default();
            state.regs.rflags = INTERRUPT_FLAG;
            change(&mut state);
            state.takes_interrupt()
        };
        assert!(changed(|_| {}));
        assert!(changed(|state| state.events.interrupt.nr = 0x30), "a number alone is none");
        for change in [
            (|state| state.regs.rflags = !INTERRUPT_FLAG) as fn(&mut VcpuState),
            |state| state.events.interrupt.shadow = 1,
            |state| state.events.interrupt.injected = 1,
            |state| state.events.exception.injected = 1,
            |state| state.events.exception.pending = 1,
            |state| state.events.nmi.injected = 1,
        ] {
            assert!(!changed(change));
        }
    }
}
