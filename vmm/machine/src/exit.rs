//! What a guest can stop for.

use crate::msr::MsrAccess;

/// Which way a port or memory access goes, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest waits for data.
    Read,
    /// The guest gave data.
    Write,
}

/// Why `KVM_RUN` returned. The last two are asynchronous and have no ordinal. The others are
/// *synchronous*: they follow from the instruction the guest executes, so they come at the same
/// point in every run and each has an exit ordinal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Port I/O; the data lies in [`crate::cpu::Cpu::pio_data`].
    Pio {
        /// The port.
        port: u16,
        /// Which way.
        direction: Direction,
        /// Bytes per access: 1, 2 or 4.
        size_bytes: u8,
        /// How many accesses (string instructions make more than one).
        count: u32,
    },
    /// An access to an address where there is no memory; the data lies in
    /// [`crate::cpu::Cpu::mmio_data`].
    Mmio {
        /// Guest-physical address.
        addr: u64,
        /// Which way.
        direction: Direction,
        /// 1 to 8.
        size_bytes: u8,
    },
    /// RDMSR or WRMSR that KVM did not serve; to be answered with [`crate::cpu::Cpu::answer_msr`].
    Msr(MsrAccess),
    /// `HLT`.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// No exit of the guest: it was stopped between two, and its state is in the log. From there on
    /// this point is as good as an exit.
    Slice,
    /// A signal or a kick came.
    Interrupted,
    /// The guest can take an interrupt now and the window had been asked for. Not a deterministic
    /// point (decision 0001): a recorded run makes it a slice.
    WindowOpen,
}

impl Exit {
    /// True when this exit has an ordinal.
    pub fn is_synchronous(self) -> bool {
        !matches!(self, Self::Interrupted | Self::WindowOpen)
    }
}
