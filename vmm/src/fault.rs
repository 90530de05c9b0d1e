//! A single flipped bit, on purpose: how the tests show that a divergence is caught.

use std::str::FromStr;

use ftvmm_replication::Ordinal;
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{KvmError, Memory, Vcpu};

/// A bit of guest memory or of a register, and the exit before whose answer it flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub at: Ordinal,
    place: Place,
    bit: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Memory(u64),
    Register(usize),
}

type Field = fn(&mut kvm_regs) -> &mut u64;

const REGISTERS: [(&str, Field); 17] = [
    ("rax", |r| &mut r.rax),
    ("rbx", |r| &mut r.rbx),
    ("rcx", |r| &mut r.rcx),
    ("rdx", |r| &mut r.rdx),
    ("rsi", |r| &mut r.rsi),
    ("rdi", |r| &mut r.rdi),
    ("rsp", |r| &mut r.rsp),
    ("rbp", |r| &mut r.rbp),
    ("r8", |r| &mut r.r8),
    ("r9", |r| &mut r.r9),
    ("r10", |r| &mut r.r10),
    ("r11", |r| &mut r.r11),
    ("r12", |r| &mut r.r12),
    ("r13", |r| &mut r.r13),
    ("r14", |r| &mut r.r14),
    ("r15", |r| &mut r.r15),
    ("rip", |r| &mut r.rip),
];

impl Fault {
    /// Flips the bit.
    ///
    /// # Errors
    /// When KVM refuses the register; an address outside the guest's memory flips nothing.
    pub fn inject(self, vcpu: &Vcpu, memory: &Memory) -> Result<(), KvmError> {
        tracing::warn!(fault = ?self, "flipping a bit of this guest, as asked");
        match self.place {
            Place::Memory(address) => {
                let address = GuestAddress(address);
                if let Ok(byte) = memory.read_obj::<u8>(address) {
                    let _ = memory.write_obj(byte ^ 1 << self.bit, address);
                }
                Ok(())
            }
            Place::Register(index) => {
                let mut regs = vcpu.regs()?;
                *REGISTERS[index].1(&mut regs) ^= 1 << self.bit;
                vcpu.set_regs(&regs)
            }
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not mem:ADDR:BIT@EXIT or reg:NAME:BIT@EXIT");
        let (what, at) = text.split_once('@').ok_or_else(wrong)?;
        let at = Ordinal(at.parse().map_err(|_| wrong())?);
        let (kind, rest) = what.split_once(':').ok_or_else(wrong)?;
        let (place, bit) = rest.split_once(':').ok_or_else(wrong)?;
        let bit: u8 = bit.parse().map_err(|_| wrong())?;
        let (place, bits) = match kind {
            "mem" => {
                let digits = place.strip_prefix("0x").ok_or_else(wrong)?;
                (Place::Memory(u64::from_str_radix(digits, 16).map_err(|_| wrong())?), 8)
            }
            "reg" => {
                let index = REGISTERS.iter().position(|(name, _)| *name == place);
                (Place::Register(index.ok_or_else(wrong)?), 64)
            }
            _ => return Err(wrong()),
        };
        if bit >= bits {
            return Err(format!("'{text}': bits are numbered 0 to {}", bits - 1));
        }
        Ok(Self { at, place, bit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_kinds() {
        let memory: Fault = "mem:0x1000:7@42".parse().unwrap();
        assert_eq!(memory, Fault { at: Ordinal(42), place: Place::Memory(0x1000), bit: 7 });
        assert_eq!("reg:rip:63@1".parse::<Fault>().unwrap().place, Place::Register(16));
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        for text in ["", "mem:0x1000:8@1", "reg:rax:64@1", "reg:xyz:1@1", "mem:12:1@1", "mem:0x1:1"]
        {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }
}
