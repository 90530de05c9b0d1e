//! The end of a process one of whose threads made a call that its filter refuses.
//!
//! The kernel answers such a call with SIGSYS at the thread that made it (seccomp(2),
//! SECCOMP_RET_TRAP). The handler may only do what is async-signal-safe (signal-safety(7)): it
//! formats into its own stack, and calls write(2) and _exit(2), which every filter allows.

use std::cell::Cell;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction};

/// Exit status of a process that was ended for a call (docs/options.md).
const VIOLATION: i32 = 148;

thread_local! {
    /// Whose filter is installed. Constant at the start and without a destructor, so that reading
    /// it in a handler is a plain load.
    static NAME: Cell<&'static str> = const { Cell::new("unknown") };
}

/// Makes SIGSYS end the process with a message. Once for the process.
pub(super) fn report_violations() -> nix::Result<()> {
    let action = SigAction::new(
        SigHandler::SigAction(on_violation),
        SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER,
        SigSet::empty(),
    );
    // SAFETY: the handler does only what is async-signal-safe, as its comments show.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map(drop)
}

/// This thread's violations carry `name`. A thread may have all signals blocked; a blocked SIGSYS
/// would end the process without a word.
pub(super) fn name_thread(name: &'static str) -> nix::Result<()> {
    NAME.set(name);
    let mut ours = SigSet::empty();
    ours.add(Signal::SIGSYS);
    nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&ours), None)
}

extern "C" fn on_violation(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // What follows the three ints in a siginfo_t of SIGSYS: the address of the call, its number
    // (sigaction(2); si_call_addr at byte 16, si_syscall at 24 on x86-64).
    const SI_SYSCALL_AT: usize = 24;
    // SAFETY: with SA_SIGINFO the kernel hands a siginfo_t of 128 bytes, in which bytes 24 to 27
    // are an int for SIGSYS.
    let number = unsafe { info.cast::<u8>().add(SI_SYSCALL_AT).cast::<i32>().read_unaligned() };
    let mut line = Line { bytes: [0; 160], length: 0 };
    line.text("ftvmm: thread '");
    line.text(NAME.get());
    line.text("' made system call ");
    line.number(number.unsigned_abs());
    line.text(", which its seccomp filter does not allow; the process ends\n");
    // SAFETY: the bytes live for the call; write and _exit are async-signal-safe.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(VIOLATION)
    }
}

/// Text on the stack; what does not fit is left out.
struct Line {
    bytes: [u8; 160],
    length: usize,
}

impl Line {
    fn text(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, number: u32) {
        let mut divisor = 1;
        while number / divisor >= 10 {
            divisor *= 10;
        }
        while divisor > 0 {
            let digit = (number / divisor % 10) as u8;
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = b'0' + digit;
                self.length += 1;
            }
            divisor /= 10;
        }
    }
}
