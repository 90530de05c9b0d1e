//! Whether the addresses of the last x87 instruction and its operand are the guest's own, whatever
//! the host does.
//!
//! FNSTENV and FNSAVE store them at any time. AMD's CPUs before Zen 2 save and load them at a
//! switch only while an exception is pending (APM vol. 2, 11.4.4; CPUID 8000_0008.EBX bit 2 says
//! that it is always done), and Linux there loads a value of its own instead, from an address of
//! its own (`restore_fpregs_from_fpstate`, arch/x86/kernel/fpu/core.c): that address is
//! what the guest then stores.

use std::arch::asm;

use super::host::Host;
use crate::micro_guest::programs::{self, layout};
use crate::micro_guest::{Findings, ProbeFailure, Ring, Stop};

const RUNS: usize = 10;
/// Where the program stores its environments, behind [`layout::DATA`].
const BEFORE: u64 = 0x40;
const BEHIND: u64 = 0x80;
/// FIP, its selector and the opcode, FDP and its selector within an environment (AMD APM vol. 2,
/// 11.4.4).
const POINTERS: u64 = 12;
const POINTERS_BYTES: usize = 16;

/// Stores them before an exit and behind it, in which this program has used the x87 too.
pub fn addresses_kept(host: &Host) -> Findings {
    for run in 1..=RUNS {
        let mut guest = host.guest(programs::x87_environments(), Ring::Kernel)?;
        guest.run_to(Stop::Report)?;
        use_x87();
        guest.run_to(Stop::Report)?;
        let pointers = |place| guest.read(layout::DATA + place + POINTERS, POINTERS_BYTES);
        let (before, behind) = (pointers(BEFORE)?, pointers(BEHIND)?);
        if before != behind {
            return Err(ProbeFailure::Differs {
                what: format!("FNSTENV's addresses behind an exit, in run {run}"),
                got: shown(&behind),
                expected: format!("{} as before it", shown(&before)),
            });
        }
    }
    Ok(format!("the same before and behind an exit in {RUNS} runs"))
}

fn shown(pointers: &[u8]) -> String {
    let word = |at: usize| {
        pointers
            .get(at..at + 4)
            .map_or(0, |raw| raw.iter().rev().fold(0u32, |word, byte| word << 8 | u32::from(*byte)))
    };
    format!("FIP {:#010x}, FDP {:#010x}", word(0), word(8))
}

fn use_x87() {
    // SAFETY: the x87 stack is as it was.
    unsafe {
        asm!("fldz", "fstp st(0)", out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _);
    }
}
