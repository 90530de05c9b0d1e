//! EFER, answered here as KVM would, so that every access to it is an exit.
//!
//! A kernel reads and writes it once while it starts. That is how a second kernel (kexec, kdump) is
//! noticed before it runs on ([`crate::tsc`]).

use crate::cpu::{Cpu, CpuError};
use crate::msr::MsrAccess;

/// The register's number (AMD APM vol. 2, 3.1.7).
pub const EFER: u32 = 0xc000_0080;
const SCE: u64 = 1;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;
const NXE: u64 = 1 << 11;
/// CR0.PG.
const PAGING: u64 = 1 << 31;

/// The value read, or 0 for a write that is done; `None` is #GP.
///
/// # Errors
/// When KVM refuses.
pub fn answer(access: MsrAccess, vcpu: &dyn Cpu) -> Result<Option<u64>, CpuError> {
    let mut sregs = vcpu.sregs()?;
    let Some(written) = access.written else { return Ok(Some(sregs.efer)) };
    let Some(efer) = after_write(sregs.efer, written, sregs.cr0 & PAGING != 0) else {
        return Ok(None);
    };
    if efer != sregs.efer {
        sregs.efer = efer;
        vcpu.set_sregs(&sregs)?;
    }
    Ok(Some(0))
}

/// EFER after a write, or `None` for one that is #GP (Linux, `set_efer` in arch/x86/kvm/x86.c):
/// bits of features that no template shows, and a change of LME under paging. LMA is the CPU's own;
/// a write leaves it as it is.
fn after_write(now: u64, written: u64, paging: bool) -> Option<u64> {
    let reserved = written & !(SCE | LME | LMA | NXE) != 0;
    if reserved || paging && (now ^ written) & LME != 0 {
        return None;
    }
    Some(written & !LMA | now & LMA)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_does_what_the_cpu_would() {
        let long = LME | LMA;
        assert_eq!(after_write(long, long | SCE | NXE, true), Some(long | SCE | NXE));
        assert_eq!(after_write(long, LME | NXE, true), Some(long | NXE), "LMA stays");
        assert_eq!(after_write(0, LME | LMA, false), Some(LME));
        assert_eq!(after_write(long, SCE, true), None, "LME under paging");
        assert_eq!(after_write(LME, SCE, false), Some(SCE));
        for bit in (0..64).map(|bit| 1 << bit).filter(|bit| (SCE | long | NXE) & bit == 0) {
            assert_eq!(after_write(0, bit, false), None, "{bit:#x}");
        }
    }

    #[test]
    fn a_write_that_changes_nothing_leaves_the_processor_alone() {
        let cpu = crate::tests::FakeCpu::default();
        cpu.state.borrow_mut().sregs.efer = LME;
        let access = |written| MsrAccess { index: EFER, written };
        assert_eq!(answer(access(None), &cpu).unwrap(), Some(LME));
        cpu.fails.set(Some("set_sregs"));
        assert_eq!(answer(access(Some(LME)), &cpu).unwrap(), Some(0));
        assert_eq!(answer(access(Some(1 << 20)), &cpu).unwrap(), None);
        assert!(answer(access(Some(LME | NXE)), &cpu).is_err());
        cpu.fails.set(Some("sregs"));
        assert!(answer(access(None), &cpu).is_err());
    }
}
