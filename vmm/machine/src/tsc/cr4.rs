//! The guest's CR4: what it wrote, with time-stamp disable always set in the real one.

use ftvmm_replication::TscMode;
use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::cpu::{Cpu, CpuError};

/// CR4.TSD: RDTSC and RDTSCP are for ring 0 alone (AMD APM vol. 2, 3.1.3).
pub const TSD: u64 = 1 << 2;
const LA57: u64 = 1 << 12;
const PCIDE: u64 = 1 << 17;
/// The bits of CR3 that are the process context identifier while PCIDE is set.
const CR3_PCID: u64 = 0xfff;
const GP_VECTOR: u8 = 13;

type Field = fn(&mut kvm_regs) -> &mut u64;

/// General registers by their number in an instruction.
const REGISTERS: [Field; 16] = [
    |r| &mut r.rax,
    |r| &mut r.rcx,
    |r| &mut r.rdx,
    |r| &mut r.rbx,
    |r| &mut r.rsp,
    |r| &mut r.rbp,
    |r| &mut r.rsi,
    |r| &mut r.rdi,
    |r| &mut r.r8,
    |r| &mut r.r9,
    |r| &mut r.r10,
    |r| &mut r.r11,
    |r| &mut r.r12,
    |r| &mut r.r13,
    |r| &mut r.r14,
    |r| &mut r.r15,
];

fn register(regs: &mut kvm_regs, number: u8) -> &mut u64 {
    REGISTERS[usize::from(number) % REGISTERS.len()](regs)
}

/// `MOV reg, CR4` at the port read the guest stands at. Returns the value read.
pub fn read(vcpu: &mut dyn Cpu, number: u8, guest_tsd: bool) -> Result<u64, CpuError> {
    let shown = vcpu.sregs()?.cr4 & !TSD | if guest_tsd { TSD } else { 0 };
    let mut regs = vcpu.regs()?;
    *register(&mut regs, number) = shown;
    // KVM puts the data of the port read into AL afterwards.
    vcpu.pio_data()[0] = regs.rax as u8;
    vcpu.set_regs(&regs)?;
    Ok(shown)
}

/// `MOV CR4, reg` at the port write the guest stands at. Returns the value written, and whether the
/// CPU took it; otherwise the guest has a #GP.
///
/// KVM_SET_SREGS with another CR4 makes KVM drop the MMU's roots and flush the guest's TLB when it
/// makes new ones (`kvm_mmu_reset_context`, `kvm_mmu_load`), so that a kernel that toggles PGE to
/// flush gets its flush.
pub fn write(vcpu: &mut dyn Cpu, number: u8) -> Result<(u64, bool), CpuError> {
    let mut regs = vcpu.regs()?;
    let mut sregs = vcpu.sregs()?;
    let wanted = *register(&mut regs, number);
    let taken = !needs_more_than_a_valid_value(&sregs, wanted) && {
        sregs.cr4 = wanted | TSD;
        match vcpu.set_sregs(&sregs) {
            Ok(()) => true,
            // Reserved bits, and those CPUID does not offer; KVM has changed nothing.
            Err(error) if error.is_of_value() => false,
            Err(error) => return Err(error),
        }
    };
    if !taken {
        vcpu.complete_io()?;
        vcpu.set_regs(&regs)?;
        vcpu.raise(GP_VECTOR, Some(0))?;
        vcpu.complete_io()?;
    }
    Ok((wanted, taken))
}

/// What MOV refuses and KVM_SET_SREGS does not (AMD APM vol. 2, 3.1.3; Intel SDM vol. 3, 4.10.1).
fn needs_more_than_a_valid_value(sregs: &kvm_sregs, wanted: u64) -> bool {
    let changed = sregs.cr4 ^ wanted;
    changed & LA57 != 0 || changed & wanted & PCIDE != 0 && sregs.cr3 & CR3_PCID != 0
}

/// CR4 at power-on: what boot code wants, and TSD.
pub const fn at_power_on(cr4: u64) -> u64 {
    cr4 | TSD
}

/// Whether user mode's RDTSC is answered, as things stand.
pub fn answers_users(mode: TscMode, guest_tsd: bool) -> bool {
    mode == TscMode::Trap && !guest_tsd
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_the_numbers_instructions_use() {
        let mut regs = kvm_regs::default();
        (0..16).for_each(|number| *register(&mut regs, number) = u64::from(number) + 1);
        assert_eq!([regs.rax, regs.rcx, regs.rdx, regs.rbx], [1, 2, 3, 4]);
        assert_eq!([regs.rsp, regs.rbp, regs.rsi, regs.rdi], [5, 6, 7, 8]);
        assert_eq!([regs.r8, regs.r12, regs.r13, regs.r15], [9, 13, 14, 16]);
    }

    #[test]
    fn a_process_context_must_be_zero_when_contexts_begin() {
        let sregs = kvm_sregs { cr3: 0x1001, cr4: 0x20, ..Default::default() };
        assert!(needs_more_than_a_valid_value(&sregs, 0x20 | PCIDE));
        assert!(!needs_more_than_a_valid_value(&sregs, 0xa0));
        assert!(needs_more_than_a_valid_value(&sregs, 0x20 | LA57));
        let zero = kvm_sregs { cr3: 0x1000, ..sregs };
        assert!(!needs_more_than_a_valid_value(&zero, 0x20 | PCIDE));
        let on = kvm_sregs { cr4: 0x20 | PCIDE, ..sregs };
        assert!(!needs_more_than_a_valid_value(&on, 0x20 | PCIDE));
    }
}
