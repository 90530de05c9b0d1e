//! Whether this host's XSAVE writes the same image in every run, with all the leaves it has.

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

use super::host::Host;
use crate::call;
use crate::micro_guest::Findings;
use crate::micro_guest::xsave::is_deterministic;

/// CPUID.1:ECX.XSAVE and AVX.
const XSAVE_AND_AVX: u32 = 1 << 26 | 1 << 28;

/// The check of `ftvmm doctor`.
pub fn repeats(host: &Host) -> Findings {
    let cpuid = host
        .kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    let has_avx = |e: &&kvm_bindings::kvm_cpuid_entry2| {
        e.function == 1 && e.ecx & XSAVE_AND_AVX == XSAVE_AND_AVX
    };
    if !cpuid.as_slice().iter().any(|e| has_avx(&e)) {
        return Ok("no AVX here; the template avx is refused".into());
    }
    is_deterministic(&cpuid)
        .or_else(|failure| Ok(format!("{failure}; the template avx is refused")))
}
