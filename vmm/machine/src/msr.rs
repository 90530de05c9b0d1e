//! Model-specific registers: which KVM keeps, and what a guest reads from the others, the
//! template's answer or #GP.
//!
//! Linux probes registers that may be absent with instructions it has a fix-up for, so #GP is a
//! defined answer for a register that CPUID does not promise. Such accesses are counted.

use std::collections::BTreeMap;

use serde::Deserialize;

/// So many unknown registers are counted by number.
const UNKNOWN_MAX: usize = 1024;

/// Model-specific registers a 64-bit kernel keeps state in (AMD APM vol. 2, appendix A). The others
/// are either in `kvm_sregs` (EFER, FS/GS base, APIC base) or hidden by the CPU template.
pub const VCPU_MSRS: [(u32, &str); 9] = [
    (0x0000_0174, "SYSENTER_CS"),
    (0x0000_0175, "SYSENTER_ESP"),
    (0x0000_0176, "SYSENTER_EIP"),
    (0x0000_0277, "PAT"),
    (0xc000_0081, "STAR"),
    (0xc000_0082, "LSTAR"),
    (0xc000_0083, "CSTAR"),
    (0xc000_0084, "SFMASK"),
    (0xc000_0102, "KERNEL_GS_BASE"),
];

/// Every MSR that is part of a saved state, in [`VCPU_MSRS`] or in `kvm_sregs`: EFER, FS and GS
/// base.
pub const STATE_MSRS: [u32; VCPU_MSRS.len() + 3] = {
    let mut all = [0xc000_0080, 0xc000_0100, 0xc000_0101, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut i = 0;
    while i < VCPU_MSRS.len() {
        all[i + 3] = VCPU_MSRS[i].0;
        i += 1;
    }
    all
};

/// Who answers a guest's access to a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MsrAnswer {
    /// KVM: the register is part of the vCPU's state.
    Kvm,
    /// Guest time in nanoseconds; what is written is ignored.
    Clock,
    /// A constant; what is written is ignored.
    Value(u64),
}

/// An access that KVM did not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrAccess {
    /// The register.
    pub index: u32,
    /// The value to write; `None` for a read.
    pub written: Option<u64>,
}

/// Answers for one guest.
#[derive(Debug, Default)]
pub struct MsrBank {
    answers: BTreeMap<u32, MsrAnswer>,
    unknown: BTreeMap<u32, u64>,
}

impl MsrBank {
    /// A bank with these registers.
    pub fn new(answers: impl Iterator<Item = (u32, MsrAnswer)>) -> Self {
        Self { answers: answers.collect(), unknown: BTreeMap::new() }
    }

    /// Whether the answer to a read of `index` is a time.
    pub fn reads_clock(&self, access: MsrAccess) -> bool {
        access.written.is_none() && self.answers.get(&access.index) == Some(&MsrAnswer::Clock)
    }

    /// The value read, or 0 for a write that is done; `None` is #GP.
    pub fn answer(&mut self, access: MsrAccess, now_ns: u64) -> Option<u64> {
        let value = match self.answers.get(&access.index) {
            Some(MsrAnswer::Clock) => now_ns,
            Some(MsrAnswer::Value(value)) => *value,
            // KVM keeps it and refuses this value.
            Some(MsrAnswer::Kvm) => return None,
            None => {
                self.count_unknown(access.index);
                return None;
            }
        };
        Some(if access.written.is_some() { 0 } else { value })
    }

    /// A guest can try four thousand million of them.
    fn count_unknown(&mut self, index: u32) {
        if self.unknown.len() < UNKNOWN_MAX || self.unknown.contains_key(&index) {
            *self.unknown.entry(index).or_default() += 1;
        }
    }

    /// Registers that no template names and how often the guest tried each.
    pub fn unknown(&self) -> &BTreeMap<u32, u64> {
        &self.unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_tries_every_register_costs_little() {
        let mut bank = MsrBank::new(std::iter::empty());
        for index in (0..100_000).chain([0]) {
            assert_eq!(bank.answer(MsrAccess { index, written: None }, 0), None);
        }
        assert_eq!((bank.unknown().len(), bank.unknown()[&0]), (UNKNOWN_MAX, 2));
    }

    #[test]
    fn each_kind_of_register_has_its_answer_and_others_are_counted() {
        let answers = [
            (0x10, MsrAnswer::Clock),
            (0x1b, MsrAnswer::Value(0xfee0_0100)),
            (0x277, MsrAnswer::Kvm),
        ];
        let mut bank = MsrBank::new(answers.into_iter());
        let read = |index| MsrAccess { index, written: None };
        let write = |index| MsrAccess { index, written: Some(7) };
        assert_eq!(bank.answer(read(0x10), 42), Some(42));
        assert_eq!(bank.answer(write(0x10), 42), Some(0));
        assert_eq!(bank.answer(read(0x1b), 42), Some(0xfee0_0100));
        assert_eq!(bank.answer(write(0x277), 42), None);
        assert!(bank.unknown().is_empty());
        assert_eq!(bank.answer(read(0x17), 42), None);
        assert_eq!(bank.answer(write(0x17), 42), None);
        assert_eq!(bank.unknown(), &BTreeMap::from([(0x17, 2)]));
        assert!(bank.reads_clock(read(0x10)));
        assert!(!bank.reads_clock(write(0x10)));
        assert!(!bank.reads_clock(read(0x1b)));
    }
}
