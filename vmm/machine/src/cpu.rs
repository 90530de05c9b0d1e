//! The virtual processor as the machine sees it. `Vcpu` in `vmm/kvm` implements it.

use kvm_bindings::{kvm_debugregs, kvm_regs, kvm_sregs};
use thiserror::Error;

use crate::exit::Exit;
use crate::memory::Memory;
use crate::vcpu_state::VcpuState;

/// A failure of the processor or of what executes it.
#[derive(Debug, Error)]
pub enum CpuError {
    /// The host has not enough memory for the copy of a logged guest's.
    #[error("cannot map {bytes} bytes for the copy of a logged guest's memory: {cause}")]
    Copy {
        /// Size asked for.
        bytes: u64,
        /// The cause.
        cause: vm_memory::mmap::MmapRegionError,
    },
    /// A call to KVM failed.
    #[error("{call} failed: {cause}")]
    Call {
        /// The ioctl, by its name in KVM api.rst.
        call: &'static str,
        /// The cause.
        cause: std::io::Error,
    },
    /// The state is of a guest that uses XSAVE.
    #[error(
        "the guest's state has XCR0 {xcr0:#x}, but this host's CPU has no XSAVE: it can go on only \
         on a host whose CPU has"
    )]
    NoXsave {
        /// What the guest had set.
        xcr0: u64,
    },
    /// The state is of a processor with other model-specific registers.
    #[error(
        "the guest's state has {got} model-specific registers, a processor here has {expected}"
    )]
    MsrCount {
        /// How many the state has.
        got: usize,
        /// How many a processor has.
        expected: usize,
    },
    /// KVM stopped for a reason this program does not know; no guest can be carried on past it.
    #[error(
        "KVM stopped the guest with exit reason {reason} (sub-error {suberror}) at rip {rip:#x}"
    )]
    UnknownExit {
        /// `kvm_run.exit_reason`.
        reason: u32,
        /// `kvm_run.internal.suberror` where it applies.
        suberror: u32,
        /// Where the guest stood.
        rip: u64,
    },
}

impl CpuError {
    /// KVM does not take the value it was given, and has changed nothing.
    pub fn is_of_value(&self) -> bool {
        let is_einval = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::InvalidInput;
        matches!(self, Self::Call { cause, .. } if is_einval(cause))
    }
}

/// The one virtual CPU. Every method fails when what executes it does.
///
/// # Safety
/// The processor touches the guest's [`Memory`] only inside a method called on it, on the thread
/// that calls it. Whoever holds a slice of guest memory calls no method of the processor meanwhile;
/// that is how the digest of memory and the page tracker may read it without a copy.
#[expect(clippy::missing_errors_doc, reason = "said once, above")]
pub unsafe trait Cpu {
    /// Lets the guest run until it stops. With `want_window` it also stops as soon as it can take
    /// an interrupt. Any reason to stop that is not an [`Exit`] is fatal and named.
    fn run(&mut self, want_window: bool) -> Result<Exit, CpuError>;

    /// Completes the access the guest stopped for without letting it execute anything, and brings
    /// [`Self::can_take_interrupt`] up to date with registers set since. The data of the exit is
    /// gone afterwards. Where RIP was moved before, the access is left alone.
    fn complete_io(&mut self) -> Result<(), CpuError>;

    /// Lets the guest execute one instruction, which must not be one that makes an exit.
    fn step(&mut self) -> Result<(), CpuError>;

    /// The data of the last [`Exit::Pio`]: `size_bytes * count` bytes, to be read or filled.
    fn pio_data(&mut self) -> &mut [u8];

    /// The data of the last [`Exit::Mmio`], to be read or filled.
    fn mmio_data(&mut self) -> &mut [u8];

    /// Answers the last [`Exit::Msr`]: with the value read, or anything for a write that is done;
    /// `None` is #GP.
    fn answer_msr(&mut self, answer: Option<u64>);

    /// RFLAGS.IF at the exit the guest stands at.
    fn interrupts_enabled(&mut self) -> bool;

    /// True when the guest can take an interrupt where it stands: IF is set and nothing else is
    /// waiting to be injected. The shadow of an STI or MOV SS counts between two exits only.
    fn can_take_interrupt(&mut self) -> Result<bool, CpuError>;

    /// As [`Self::can_take_interrupt`], once the instruction that made the exit is complete.
    fn accepts_interrupt(&mut self) -> Result<bool, CpuError>;

    /// Hands the guest the interrupt `vector`; it takes it before its next instruction. Only valid
    /// while [`Self::accepts_interrupt`].
    fn inject(&mut self, vector: u8) -> Result<(), CpuError>;

    /// Whether a non-maskable interrupt would be taken here, once the instruction that made the
    /// exit is complete.
    fn accepts_nmi(&mut self) -> Result<bool, CpuError>;

    /// Whether the guest is serving a non-maskable interrupt.
    fn masks_nmis(&self) -> Result<bool, CpuError>;

    /// Hands the guest a non-maskable interrupt; it takes it before its next instruction. Only
    /// valid while [`Self::accepts_nmi`].
    fn inject_nmi(&mut self) -> Result<(), CpuError>;

    /// Has the guest take the exception `vector` before its next instruction. The access it stopped
    /// for must be complete, RIP be what the exception is to save.
    fn raise(&self, vector: u8, error_code: Option<u32>) -> Result<(), CpuError>;

    /// General registers.
    fn regs(&self) -> Result<kvm_regs, CpuError>;

    /// Sets the general registers.
    fn set_regs(&self, regs: &kvm_regs) -> Result<(), CpuError>;

    /// Segments, control registers and descriptor tables.
    fn sregs(&self) -> Result<kvm_sregs, CpuError>;

    /// As [`Self::sregs`], as cheaply as they can be had at an exit. They name no interrupt on its
    /// way.
    fn exit_sregs(&self) -> Result<kvm_sregs, CpuError>;

    /// Sets segments, control registers and descriptor tables.
    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), CpuError>;

    /// Debug registers.
    fn debug_regs(&self) -> Result<kvm_debugregs, CpuError>;

    /// Sets the debug registers.
    fn set_debug_regs(&self, regs: &kvm_debugregs) -> Result<(), CpuError>;

    /// The bytes at the instruction pointer, at most 15 and none of another page; empty where
    /// nothing is mapped.
    fn code_at_rip(&self, memory: &Memory) -> Result<Vec<u8>, CpuError>;

    /// Everything there is of the processor, to be compared; it is left alone.
    fn state(&self) -> Result<VcpuState, CpuError>;

    /// Saves the whole state, with no exit to complete. Afterwards this processor is in exactly the
    /// state of one that restores it.
    fn save(&mut self) -> Result<VcpuState, CpuError>;

    /// Puts the processor into `state`, whatever it was doing.
    fn restore(&mut self, state: &VcpuState) -> Result<(), CpuError>;

    /// Puts the processor back to where it stood before its first instruction, and its memory to
    /// zero. Every page is marked as written by this program.
    fn power_on_again(&mut self, power_on: &VcpuState) -> Result<(), CpuError>;
}

/// Makes the running guest stop, from another thread. A kick that comes between two runs makes the
/// next one return at once. A handle may outlive the processor.
pub trait Kick: Send {
    /// Kicks.
    fn kick(&self);
}

/// The log of the pages the guest wrote: one bit for each page of a slot, which is a region of its
/// memory. Every method fails when what keeps it does.
#[expect(clippy::missing_errors_doc, reason = "said once, above")]
pub trait DirtyLog {
    /// The bits of the slot, page 0 in bit 0 of the first word. Reading changes nothing.
    fn read(&self, slot: u32, memory_bytes: usize) -> Result<Vec<u64>, CpuError>;

    /// Clears the bits that are set in `bits`: the next write to such a page sets it again. The
    /// guest's TLB is flushed.
    fn clear(&self, slot: u32, pages: u32, bits: &[u64]) -> Result<(), CpuError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_not_taken_is_told_from_other_failures() {
        let failed = |code| CpuError::Call {
            call: "KVM_SET_SREGS",
            cause: std::io::Error::from_raw_os_error(code),
        };
        assert!(failed(22).is_of_value(), "EINVAL");
        assert!(!failed(14).is_of_value(), "EFAULT");
        assert!(!CpuError::NoXsave { xcr0: 7 }.is_of_value());
    }
}
