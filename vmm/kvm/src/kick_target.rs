//! What a kick touches: a byte that KVM reads, and a thread.

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use ftvmm_machine::CpuError;
use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::call;

/// Offset of the real-time signal that makes `KVM_RUN` return.
const KICK_SIGNAL_OFFSET: i32 = 0;

/// `kvm_run.immediate_exit` of a vCPU: while it is set, `KVM_RUN` completes the exit it stopped for
/// and returns at once (KVM api.rst, section 5).
#[derive(Clone)]
pub(super) struct ImmediateExit(NonNull<u8>);

// SAFETY: KVM lets any thread set the byte, and here it is accessed atomically only.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    /// The byte of the vCPU whose mapping `run` is.
    ///
    /// # Safety
    /// Neither the value nor a clone may be used after the vCPU is unmapped.
    pub(super) unsafe fn of(run: &mut kvm_run) -> Self {
        Self(NonNull::from(&mut run.immediate_exit))
    }

    /// Sets or clears the byte.
    pub(super) fn set(&self, on: bool) {
        // SAFETY: the byte is mapped, as the caller of `of` promised, and a byte is always aligned.
        // Every access to it in this program is by this function; kvm-ioctls, which hands out the
        // whole mapping as `&mut kvm_run`, leaves it alone, and the kernel may read it at any time.
        let byte = unsafe { AtomicU8::from_ptr(self.0.as_ptr()) };
        byte.store(on.into(), Ordering::SeqCst);
    }
}

/// A thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ThreadId(libc::pid_t);

impl ThreadId {
    /// The calling thread. Cheap enough to be asked at every run.
    pub(super) fn current() -> Self {
        thread_local!(static OWN: Cell<libc::pid_t> = const { Cell::new(0) });
        if OWN.get() == 0 {
            OWN.set(nix::unistd::gettid().as_raw());
        }
        Self(OWN.get())
    }

    /// Interrupts the thread's call of the kernel. A thread that has ended is not found; another
    /// that has its number now runs the signal's empty handler.
    pub(super) fn interrupt(self) {
        let process = nix::unistd::getpid().as_raw();
        // SAFETY: tgkill takes numbers only.
        unsafe { libc::tgkill(process, self.0, SIGRTMIN() + KICK_SIGNAL_OFFSET) };
    }
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the empty handler of the kick signal, once per process.
///
/// # Errors
/// When the host refuses.
pub fn install_kick_handler() -> Result<(), CpuError> {
    register_signal_handler(SIGRTMIN() + KICK_SIGNAL_OFFSET, on_kick).map_err(call("sigaction"))
}
