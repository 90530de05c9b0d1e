//! The CPU the guest sees: the host's, reduced to what behaves the same everywhere and at every run.
//!
//! What is hidden, and why: the TSC, RDRAND/RDSEED and RDPMC (every read is nondeterministic), the APIC
//! (interrupts come through the 8259), XSAVE and all it carries (images differ between hosts), and every
//! hypervisor leaf (a paravirtual clock would bypass the log).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::kvm::{KvmError, Vcpu, Vm, call};

/// Name of the only template so far; part of the fingerprint two hosts compare.
pub const NAME: &str = "minimal-v1";

/// One leaf of the template: `value & keep | set`, register by register.
struct Leaf {
    function: u32,
    keep: [u32; 4],
    set: [u32; 4],
}

const ALL: u32 = u32::MAX;

/// CPUID.1:EDX (AMD APM vol. 3, appendix E.3): FPU, PSE, MSR, PAE, CX8, SEP, PGE, CMOV, PAT, CLFSH, MMX,
/// FXSR, SSE, SSE2.
const FEATURES_EDX: u32 = bits(&[0, 3, 5, 6, 8, 11, 13, 15, 16, 19, 23, 24, 25, 26]);
/// CPUID.8000_0001:EDX: SYSCALL, NX, long mode.
const EXTENDED_EDX: u32 = bits(&[11, 20, 29]);
/// CPUID.8000_0001:ECX: LAHF/SAHF in 64-bit mode.
const EXTENDED_ECX: u32 = bits(&[0]);
/// CPUID.1:EBX: CLFLUSH line of 64 bytes; APIC id, CPU count and brand index zero.
const CLFLUSH_LINE: u32 = 0x0000_0800;
/// CPUID.8000_0008:EAX: 48 linear, 40 physical address bits.
const ADDRESS_BITS: u32 = 0x3028;

/// In EAX, EBX, ECX, EDX order; a leaf not named here does not exist for the guest.
const LEAVES: [Leaf; 8] = [
    Leaf { function: 0, keep: [0, ALL, ALL, ALL], set: [1, 0, 0, 0] },
    Leaf { function: 1, keep: [ALL, 0, 0, FEATURES_EDX], set: [0, CLFLUSH_LINE, 0, 0] },
    Leaf { function: 0x8000_0000, keep: [0, ALL, ALL, ALL], set: [0x8000_0008, 0, 0, 0] },
    Leaf { function: 0x8000_0001, keep: [0, 0, EXTENDED_ECX, EXTENDED_EDX], set: [0; 4] },
    Leaf { function: 0x8000_0002, keep: [ALL; 4], set: [0; 4] },
    Leaf { function: 0x8000_0003, keep: [ALL; 4], set: [0; 4] },
    Leaf { function: 0x8000_0004, keep: [ALL; 4], set: [0; 4] },
    Leaf { function: 0x8000_0008, keep: [0; 4], set: [ADDRESS_BITS, 0, 0, 0] },
];

const fn bits(positions: &[u32]) -> u32 {
    let mut value = 0;
    let mut i = 0;
    while i < positions.len() {
        value |= 1 << positions[i];
        i += 1;
    }
    value
}

/// The template cannot be had on this host.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// A feature every guest needs is missing.
    #[error(
        "this host's CPU lacks what the template {NAME} needs: CPUID leaf {leaf:#x} has EDX {got:#010x}, needed {needed:#010x}"
    )]
    MissingFeatures {
        /// The leaf.
        leaf: u32,
        /// What the host has.
        got: u32,
        /// What the template needs.
        needed: u32,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The CPUID table this host gives a guest, and the digest two hosts must agree on.
pub struct CpuTemplate {
    cpuid: CpuId,
    digest: [u8; 32],
}

impl CpuTemplate {
    /// Reduces what the host's KVM supports to the template.
    ///
    /// # Errors
    /// When the host lacks a feature the template promises.
    pub fn for_host(vm: &Vm) -> Result<Self, TemplateError> {
        let supported = vm.supported_cpuid()?;
        let entries = reduce(supported.as_slice())?;
        let mut hash = Sha256::new();
        for e in &entries {
            for word in [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx] {
                hash.update(word.to_le_bytes());
            }
        }
        let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError::Call {
            call: "KVM_SET_CPUID2",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        Ok(Self { cpuid, digest: hash.finalize().into() })
    }

    /// SHA-256 over every leaf the guest can see.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Gives the vCPU this CPUID table.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn apply(&self, vcpu: &Vcpu) -> Result<(), KvmError> {
        vcpu.fd().set_cpuid2(&self.cpuid).map_err(call("KVM_SET_CPUID2"))
    }
}

fn reduce(supported: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, TemplateError> {
    let mut reduced = Vec::with_capacity(LEAVES.len());
    for leaf in &LEAVES {
        let host = supported.iter().find(|e| e.function == leaf.function).copied();
        let host =
            host.unwrap_or(kvm_cpuid_entry2 { function: leaf.function, ..Default::default() });
        reduced.push(kvm_cpuid_entry2 {
            function: leaf.function,
            index: 0,
            flags: 0,
            eax: host.eax & leaf.keep[0] | leaf.set[0],
            ebx: host.ebx & leaf.keep[1] | leaf.set[1],
            ecx: host.ecx & leaf.keep[2] | leaf.set[2],
            edx: host.edx & leaf.keep[3] | leaf.set[3],
            padding: [0; 3],
        });
    }
    for (function, needed) in [(1, FEATURES_EDX), (0x8000_0001, EXTENDED_EDX)] {
        let got = reduced.iter().find(|e| e.function == function).map_or(0, |e| e.edx);
        if got != needed {
            return Err(TemplateError::MissingFeatures { leaf: function, got, needed });
        }
    }
    Ok(reduced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(edx_1: u32) -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, edx| kvm_cpuid_entry2 {
            function,
            eax: ALL,
            ebx: ALL,
            ecx: ALL,
            edx,
            ..Default::default()
        };
        vec![
            leaf(0, ALL),
            leaf(1, edx_1),
            leaf(7, ALL),
            leaf(0x4000_0000, ALL),
            leaf(0x8000_0001, ALL),
        ]
    }

    #[test]
    fn hides_everything_nondeterministic() {
        let leaves = reduce(&host(ALL)).unwrap();
        let one = leaves.iter().find(|e| e.function == 1).unwrap();
        assert_eq!(one.edx & (1 << 4 | 1 << 9), 0, "TSC and APIC");
        assert_eq!(one.ecx, 0, "RDRAND, XSAVE, x2APIC, hypervisor");
        assert!(leaves.iter().all(|e| e.function != 0x4000_0000 && e.function != 7));
    }

    #[test]
    fn refuses_a_host_without_sse2() {
        let answer = reduce(&host(ALL & !(1 << 26)));
        assert!(matches!(answer, Err(TemplateError::MissingFeatures { leaf: 1, .. })));
    }
}
