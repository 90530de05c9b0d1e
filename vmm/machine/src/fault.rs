//! A fault on purpose: a flipped bit, with which the tests show that a divergence is caught, or a
//! processor that the host holds.

use std::str::FromStr;

use ftvmm_replication::Ordinal;
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use crate::cpu::{Cpu, CpuError};
use crate::memory::Memory;

/// What happens, and the exit before whose answer it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When.
    pub at: Ordinal,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Flip {
        place: Place,
        bit: u8,
    },
    /// The thread sleeps, even when it is interrupted.
    Hang {
        for_ms: u64,
    },
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
    /// Flips the bit, or holds the thread by `sleep_ms`.
    ///
    /// # Errors
    /// When KVM refuses the register; an address outside the guest's memory flips nothing.
    pub fn inject(
        self,
        vcpu: &dyn Cpu,
        memory: &Memory,
        sleep_ms: fn(u64),
    ) -> Result<(), CpuError> {
        tracing::warn!(fault = ?self, "injecting a fault into this guest (--inject-fault)");
        let (place, bit) = match self.kind {
            Kind::Flip { place, bit } => (place, bit),
            Kind::Hang { for_ms } => {
                sleep_ms(for_ms);
                return Ok(());
            }
        };
        match place {
            Place::Memory(address) => {
                let address = GuestAddress(address);
                if let Ok(byte) = memory.read_obj::<u8>(address) {
                    let _ = memory.write_obj(byte ^ 1 << bit, address);
                }
                Ok(())
            }
            Place::Register(index) => {
                let mut regs = vcpu.regs()?;
                *REGISTERS[index].1(&mut regs) ^= 1 << bit;
                vcpu.set_regs(&regs)
            }
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("'{text}' is not mem:ADDR:BIT@EXIT, reg:NAME:BIT@EXIT or hang:MS@EXIT");
        let (what, at) = text.split_once('@').ok_or_else(wrong)?;
        let at = Ordinal(at.parse().map_err(|_| wrong())?);
        if let Some(for_ms) = what.strip_prefix("hang:") {
            let for_ms = for_ms.parse().map_err(|_| wrong())?;
            return Ok(Self { at, kind: Kind::Hang { for_ms } });
        }
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
        Ok(Self { at, kind: Kind::Flip { place, bit } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::FakeCpu;

    #[test]
    fn reads_both_kinds() {
        let memory: Fault = "mem:0x1000:7@42".parse().unwrap();
        let flip = |place, bit| Kind::Flip { place, bit };
        assert_eq!(memory, Fault { at: Ordinal(42), kind: flip(Place::Memory(0x1000), 7) });
        let register: Fault = "reg:rip:63@1".parse().unwrap();
        assert_eq!(register.kind, flip(Place::Register(16), 63));
        let hang: Fault = "hang:1500@9".parse().unwrap();
        assert_eq!(hang, Fault { at: Ordinal(9), kind: Kind::Hang { for_ms: 1500 } });
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        for text in [
            "",
            "mem:0x1000:8@1",
            "reg:rax:64@1",
            "reg:xyz:1@1",
            "mem:12:1@1",
            "mem:0x1:1",
            "hang:@1",
            "cpu:rax:1@1",
            "mem@1",
        ] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_flip_changes_one_bit_of_the_register_or_of_memory() {
        let (memory, cpu) = world();
        let inject = |text: &str| {
            let fault: Fault = text.parse().unwrap();
            fault.inject(&cpu, &memory, |_| panic!("nobody sleeps")).unwrap();
        };
        for (number, (name, field)) in REGISTERS.iter().enumerate() {
            inject(&format!("reg:{name}:{number}@1"));
            let mut regs = cpu.regs().unwrap();
            assert_eq!(*field(&mut regs), 1 << number, "{name}");
        }
        let mut wanted = cpu.regs().unwrap();
        inject("reg:rip:16@1");
        wanted.rip = 0;
        assert_eq!(cpu.regs().unwrap(), wanted, "a second flip takes the first back");
        inject("mem:0x1003:7@1");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0x80 << 24);
        inject("mem:0xffffffffffff:0@1");
    }

    #[test]
    fn a_hang_sleeps_and_changes_nothing() {
        thread_local!(static SLEPT_MS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
        let (memory, cpu) = world();
        let fault: Fault = "hang:1500@1".parse().unwrap();
        fault.inject(&cpu, &memory, |for_ms| SLEPT_MS.set(for_ms)).unwrap();
        assert_eq!(SLEPT_MS.get(), 1500);
        assert_eq!(cpu.regs().unwrap(), kvm_regs::default());
    }

    #[test]
    fn a_processor_that_refuses_the_register_is_told() {
        let (memory, cpu) = world();
        cpu.fails.set(Some("set_regs"));
        let fault: Fault = "reg:rax:0@1".parse().unwrap();
        assert!(fault.inject(&cpu, &memory, |_| {}).is_err());
    }

    fn world() -> (Memory, FakeCpu) {
        (Memory::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap(), FakeCpu::default())
    }
}
