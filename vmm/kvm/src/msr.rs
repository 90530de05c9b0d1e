//! Model-specific registers: KVM serves those that it is told to, and an access to any other is an
//! exit.
//!
//! Without this, the result of RDMSR for an unlisted register depends on the host's CPU, its
//! kernel's version and the parameters of its KVM module (`ignore_msrs`). With it every access
//! outside a list is a synchronous exit (KVM api.rst, KVM_X86_SET_MSR_FILTER and
//! KVM_CAP_X86_USER_SPACE_MSR), and so is one KVM itself would refuse.

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::{KvmError, call};

/// MSRs one range of the filter may span.
const SPAN: u32 = 64;
type Bitmap = [u8; SPAN as usize / 8];

/// Has KVM serve the MSRs `served` and no others.
pub(super) fn serve_only(fd: &VmFd, served: &[u32]) -> Result<(), KvmError> {
    for (cap, name) in [
        (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
        (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
    ] {
        if !fd.check_extension(cap) {
            return Err(KvmError::MissingCapability { name });
        }
    }
    let reasons =
        KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
    enable(fd, KVM_CAP_X86_USER_SPACE_MSR, reasons)?;
    let bitmaps = bitmaps(served);
    let ranges: Vec<MsrFilterRange<'_>> = bitmaps
        .iter()
        .map(|(base, bitmap)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *base,
            msr_count: SPAN,
            bitmap,
        })
        .collect();
    fd.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(call("KVM_X86_SET_MSR_FILTER"))?;
    Ok(())
}

/// Takes the performance counters away, where KVM would give the guest some whatever its CPUID says
/// (AMD's first four need no CPUID bit) and can be told not to. Before the vCPU is made.
pub(super) fn hide_counters(fd: &VmFd) -> Result<(), KvmError> {
    if fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) as u32 & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    enable(fd, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE)
}

fn enable(fd: &VmFd, cap: u32, argument: u32) -> Result<(), KvmError> {
    let cap = kvm_enable_cap { cap, args: [argument.into(), 0, 0, 0], ..Default::default() };
    fd.enable_cap(&cap).map_err(call("KVM_ENABLE_CAP"))?;
    Ok(())
}

/// Bases and bitmaps that cover `served`.
fn bitmaps(served: &[u32]) -> Vec<(u32, Bitmap)> {
    let mut sorted = served.to_vec();
    sorted.sort_unstable();
    let mut bitmaps: Vec<(u32, Bitmap)> = Vec::new();
    for index in sorted {
        if bitmaps.last().is_none_or(|(base, _)| index - base >= SPAN) {
            bitmaps.push((index, Bitmap::default()));
        }
        if let Some((base, bitmap)) = bitmaps.last_mut() {
            let bit = index - *base;
            bitmap[bit as usize / 8] |= 1 << (bit % 8);
        }
    }
    bitmaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_msr_served_has_its_bit_and_no_other() {
        let served = [0xc000_0102, 0x174, 0x176, 0x277, 0xc000_0080];
        let mut covered = Vec::new();
        for (base, bitmap) in bitmaps(&served) {
            let bits = (0..SPAN).filter(|bit| bitmap[*bit as usize / 8] >> (bit % 8) & 1 == 1);
            covered.extend(bits.map(|bit| base + bit));
        }
        let mut sorted = served.to_vec();
        sorted.sort_unstable();
        assert_eq!(covered, sorted);
    }
}
