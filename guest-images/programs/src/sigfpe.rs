//! Floating-point faults: `sigfpe` divides by zero in SSE, x87 and integer registers, again and
//! again, and takes the signal each time. What the handler is shown is printed as a hash.
//!
//! The x87 environment is left to FNINIT and FLDCW: what FNSTENV stores of the last instruction's
//! address is no business of the program's (docs/determinism.md), and `feclearexcept` uses it.

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::AppletError;
use crate::options::Options;
use crate::stream::mix;

const DEFAULT_COUNT: u64 = 1000;
/// Everything masked, as a program starts (AMD APM vol. 1, 4.2.2 and 6.2.2).
const MXCSR: u32 = 0x1f80;
const CONTROL_WORD: u16 = 0x37f;
/// Division by zero: bit 9 masks it in MXCSR, bit 2 in the x87 control word.
const MXCSR_TRAPS: u32 = MXCSR & !(1 << 9);
const CONTROL_WORD_TRAPS: u16 = CONTROL_WORD & !(1 << 2);

static HASH: AtomicU64 = AtomicU64::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// Notes what is shown and goes on where R15 says, with everything masked.
extern "C" fn on_fault(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: a handler with SA_SIGINFO gets both for itself until it returns.
    let (info, context) = unsafe { (&*info, &mut *context.cast::<libc::ucontext_t>()) };
    // SAFETY: likewise the floating-point state.
    let fpu = unsafe { context.uc_mcontext.fpregs.as_mut() };
    let registers = &mut context.uc_mcontext.gregs;
    let mut hash = HASH.load(Ordering::Relaxed) ^ info.si_code as u64;
    hash = mix(hash ^ registers[libc::REG_EFL as usize] as u64);
    if let Some(fpu) = fpu {
        hash =
            mix(hash ^ u64::from(fpu.swd) ^ u64::from(fpu.cwd) << 16 ^ u64::from(fpu.mxcsr) << 32);
        (fpu.swd, fpu.cwd, fpu.mxcsr) = (0, CONTROL_WORD, MXCSR);
    }
    HASH.store(hash, Ordering::Relaxed);
    FAULTS.fetch_add(1, Ordering::Relaxed);
    registers[libc::REG_RIP as usize] = registers[libc::REG_R15 as usize];
}

fn sse() {
    // SAFETY: the handler goes on at the label; what is changed is named, MXCSR is as it was behind
    // it.
    unsafe {
        asm!(
            "lea r15, [rip + 2f]",
            "ldmxcsr [{traps}]",
            "xorps xmm1, xmm1",
            "cvtsi2sd xmm0, {one:e}",
            "divsd xmm0, xmm1",
            "2:",
            "ldmxcsr [{masked}]",
            traps = in(reg) &MXCSR_TRAPS,
            masked = in(reg) &MXCSR,
            one = in(reg) 1,
            out("r15") _, out("xmm0") _, out("xmm1") _,
        );
    }
}

fn x87() {
    // SAFETY: as above; the x87 stack is empty before and behind.
    unsafe {
        asm!(
            "lea r15, [rip + 2f]",
            "fninit",
            "fldcw [{traps}]",
            "fldz",
            "fld1",
            "fdiv st(0), st(1)",
            "fwait",
            "2:",
            "fninit",
            traps = in(reg) &CONTROL_WORD_TRAPS,
            out("r15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

fn integer() {
    // SAFETY: as above.
    unsafe {
        asm!(
            "lea r15, [rip + 2f]",
            "xor ecx, ecx",
            "mov eax, 5",
            "xor edx, edx",
            "div ecx",
            "2:",
            out("r15") _, out("rax") _, out("rcx") _, out("rdx") _,
        );
    }
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let count = options.position(0, "a count")?.unwrap_or(DEFAULT_COUNT);
    let action =
        SigAction::new(SigHandler::SigAction(on_fault), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler touches two atomics and the context it is given.
    unsafe { sigaction(Signal::SIGFPE, &action) }
        .map_err(|errno| AppletError::io("sigaction")(errno.into()))?;
    for _ in 0..count {
        for fault in [sse, x87, integer] {
            fault();
        }
    }
    let (faults, wanted) = (FAULTS.load(Ordering::Relaxed), 3 * count);
    if faults != wanted {
        return Err(AppletError::Faults { faults, wanted });
    }
    println!("SIGFPE ok {:016x} count={count}", HASH.load(Ordering::Relaxed));
    Ok(())
}
