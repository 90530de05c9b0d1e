//! The whole architectural state of the vCPU, for digests and incident reports.

use kvm_bindings::{kvm_segment, kvm_xcrs};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::vcpu_state::VcpuState;

/// Where XSAVE's image has the x87 control, status and tag words, MXCSR, and the registers of x87
/// and SSE (SDM vol. 1, table 10-2); the instruction and data pointers are left out, which not
/// every CPU keeps.
const FPU_AND_SSE: [std::ops::Range<usize>; 3] = [0..5, 24..28, 32..416];
/// Where it has XSTATE_BV, and the upper halves of the YMM registers (SDM vol. 1, 13.4).
const XSTATE_BV: std::ops::Range<usize> = 512..520;
const YMM_HIGH: std::ops::Range<usize> = 576..832;
/// XCR0 at reset, and as good as that of a CPU without XSAVE: x87 state (SDM vol. 1, 13.3).
pub const XCR0_RESET: u64 = 1;

/// Registers as bytes in a fixed order, each part under its name.
pub struct CpuState {
    general: [u64; 18],
    parts: Vec<(&'static str, Vec<u8>)>,
}

impl CpuState {
    /// The part of `state` that counts.
    pub fn of(state: &VcpuState) -> Self {
        let r = &state.regs;
        let regs = [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15, r.rip, r.rflags,
        ];
        let s = &state.sregs;
        let mut segments = Vec::new();
        for seg in [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt] {
            segments.extend(segment_bytes(&seg));
        }
        for table in [s.gdt, s.idt] {
            segments.extend(table.base.to_le_bytes());
            segments.extend(table.limit.to_le_bytes());
        }
        let control = [s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base];
        // Not KVM_GET_FPU: it shows what is left in KVM's buffer for a component that is in its
        // initial state.
        let image: Vec<u8> =
            state.xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        let fpu = FPU_AND_SSE.map(|range| &image[range]).concat();
        let d = &state.debug;
        let debug = [d.db[0], d.db[1], d.db[2], d.db[3], d.dr6, d.dr7];
        Self {
            general: regs,
            parts: vec![
                ("general registers", words(&regs)),
                ("segments", segments),
                ("control registers", words(&control)),
                ("FPU and SSE", fpu),
                ("debug registers", words(&debug)),
                ("MSRs", words(&state.msrs)),
                ("XCR0 and AVX", extended(&state.xcrs, &image)),
            ],
        }
    }

    /// The general registers, in the order of [`ftvmm_replication::check::REGISTER_NAMES`].
    pub fn registers(&self) -> &[u64; 18] {
        &self.general
    }

    /// Digest of all parts.
    pub fn digest(&self) -> u64 {
        self.parts.iter().fold(0, |seed, (_, bytes)| xxh3_64_with_seed(bytes, seed))
    }

    /// The parts, in a fixed order.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        self.parts.iter().map(|(name, bytes)| (*name, bytes.as_slice()))
    }
}

/// A segment without its attributes where it is not present: what they are then is undefined (SDM
/// vol. 3, 24.4.1), the CPU leaves others after a null selector than KVM gives a segment it is told
/// of (`vmx_segment_access_rights`), and it is told of them when a snapshot is taken, which a
/// replay does not do.
fn segment_bytes(seg: &kvm_segment) -> Vec<u8> {
    let attributes = match seg.present {
        0 => [0; 7],
        present => [seg.type_, present, seg.dpl, seg.db, seg.s, seg.l, seg.g],
    };
    let (base, limit) = (seg.base.to_le_bytes(), seg.limit.to_le_bytes());
    [&base[..], &limit, &seg.selector.to_le_bytes(), &attributes].concat()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// What XSAVE keeps beyond FXSAVE; nothing while the guest has not set XCR0. XSTATE_BV belongs to
/// it: the guest's next XSAVE shows it.
fn extended(xcrs: &kvm_xcrs, image: &[u8]) -> Vec<u8> {
    let xcr0 = xcr0(xcrs);
    if xcr0 == XCR0_RESET {
        return Vec::new();
    }
    [&xcr0.to_le_bytes(), &image[XSTATE_BV], &image[YMM_HIGH]].concat()
}

/// XCR0; that of a CPU at reset where none is named.
pub fn xcr0(xcrs: &kvm_xcrs) -> u64 {
    let named = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0);
    named.map_or(XCR0_RESET, |xcr| xcr.value)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_xcr;

    use super::*;

    #[test]
    fn attributes_count_where_a_segment_is_present() {
        let null = kvm_segment { unusable: 1, type_: 1, s: 1, ..Default::default() };
        let told = kvm_segment { unusable: 1, ..Default::default() };
        assert_eq!(segment_bytes(&null), segment_bytes(&told));
        let based = kvm_segment { base: 0x7000, ..told };
        assert_ne!(segment_bytes(&based), segment_bytes(&told), "the base of FS and GS counts");
        let data = kvm_segment { present: 1, type_: 3, s: 1, ..Default::default() };
        assert_ne!(segment_bytes(&data), segment_bytes(&kvm_segment { type_: 1, ..data }));
    }

    #[test]
    fn a_state_that_names_no_xcr0_is_that_of_a_cpu_at_reset() {
        let mut xcrs = kvm_xcrs::default();
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: 7, ..Default::default() };
        assert_eq!(xcr0(&xcrs), XCR0_RESET);
        xcrs.nr_xcrs = 1;
        assert_eq!(xcr0(&xcrs), 7);
        // A count no KVM gives.
        xcrs.nr_xcrs = u32::MAX;
        assert_eq!(xcr0(&xcrs), 7);
    }

    #[test]
    fn every_register_counts_and_what_not_every_cpu_keeps_does_not() {
        let digest = |change: fn(&mut VcpuState)| {
            let mut state = VcpuState { msrs: vec![0; 9], ..Default::default() };
            change(&mut state);
            CpuState::of(&state).digest()
        };
        let zero = digest(|_| {});
        let changes: [fn(&mut VcpuState); 12] = [
            |state| state.regs.r15 = 1,
            |state| state.regs.rflags = 2,
            |state| state.sregs.ldt.base = 1,
            |state| state.sregs.idt.limit = 1,
            |state| state.sregs.cr3 = 0x1000,
            |state| state.sregs.efer = 1,
            |state| state.msrs[8] = 1,
            |state| state.debug.db[3] = 1,
            |state| state.debug.dr7 = 1,
            // MXCSR, and the registers of SSE.
            |state| state.xsave.region[6] = 1,
            |state| state.xsave.region[40] = 1,
            |state| {
                state.xcrs.nr_xcrs = 1;
                state.xcrs.xcrs[0].value = 7;
            },
        ];
        let digests = changes.map(digest);
        for (number, one) in digests.iter().enumerate() {
            assert!(*one != zero && !digests[..number].contains(one), "{number}");
        }
        // The instruction pointer of x87, and AVX while XCR0 has none of it.
        assert_eq!(digest(|state| state.xsave.region[2] = 1), zero);
        assert_eq!(digest(|state| state.xsave.region[150] = 1), zero);
    }

    #[test]
    fn vector_registers_count_once_the_guest_has_enabled_them() {
        let extended = |word: usize| {
            let mut state = VcpuState::default();
            state.xcrs.nr_xcrs = 1;
            state.xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: 7, ..Default::default() };
            if word > 0 {
                state.xsave.region[word] = 1;
            }
            CpuState::of(&state).digest()
        };
        assert_ne!(extended(150), extended(0), "the upper half of a YMM register");
        assert_ne!(extended(128), extended(0), "XSTATE_BV");
        assert_eq!(extended(300), extended(0));
    }

    #[test]
    fn parts_have_the_names_an_incident_gives_them() {
        let mut state = VcpuState::default();
        (state.regs.rax, state.regs.rip) = (1, 2);
        let cpu = CpuState::of(&state);
        let names: Vec<_> = cpu.parts().map(|(name, _)| name).collect();
        assert_eq!((names.len(), names[0], names[6]), (7, "general registers", "XCR0 and AVX"));
        assert_eq!((cpu.registers()[0], cpu.registers()[16]), (1, 2));
    }
}
