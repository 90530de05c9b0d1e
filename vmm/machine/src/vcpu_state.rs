//! The whole state of the vCPU, as data.

use kvm_bindings::{
    kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use crate::msr::VCPU_MSRS;

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
    /// The registers of [`VCPU_MSRS`], in its order.
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

    /// The model-specific registers, each with its number; `None` when the state is of a processor
    /// with other registers.
    pub fn msr_entries(&self) -> Option<Vec<kvm_msr_entry>> {
        let entry = |(&(index, _), &data)| kvm_msr_entry { index, data, ..Default::default() };
        let entries = VCPU_MSRS.iter().zip(&self.msrs).map(entry);
        (self.msrs.len() == VCPU_MSRS.len()).then(|| entries.collect())
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
    fn only_a_state_with_every_register_of_a_processor_has_them() {
        let with = |count: usize| {
            let msrs = (0..count as u64).collect();
            let entries = VcpuState { msrs, ..VcpuState::default() }.msr_entries();
            entries.map(|entries| entries.iter().map(|e| (e.index, e.data)).collect::<Vec<_>>())
        };
        let all = VCPU_MSRS.len();
        let expected = VCPU_MSRS.iter().map(|(index, _)| *index).zip(0..).collect();
        assert_eq!(with(all), Some(expected));
        assert_eq!([with(0), with(all - 1), with(all + 1)], [None, None, None]);
    }

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
