//! What a guest reads from a model-specific register that KVM does not keep: the template's answer,
//! or #GP.
//!
//! Linux probes registers that may be absent with instructions it has a fix-up for, so #GP is a
//! good answer to a register nobody has promised; it is the architecture's own. Such accesses are
//! counted.

use std::collections::BTreeMap;

use crate::cpu_template::MsrAnswer;

/// So many unknown registers are counted by number.
const UNKNOWN_MAX: usize = 1024;

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
