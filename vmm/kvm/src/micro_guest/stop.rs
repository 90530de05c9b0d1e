//! Where a program of a micro-guest stops.

use std::fmt;

use ftvmm_machine::msr::MsrAccess;

/// Where a program stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It has its result: the registers are what counts.
    Report,
    /// It wants a value: [`super::MicroGuest::answer`].
    Ask,
    /// It read memory that is not there; answered like [`Stop::Ask`].
    MmioRead {
        /// Guest-physical address.
        addr: u64,
    },
    /// It wrote to memory that is not there.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// The first four bytes, little-endian.
        value: u32,
    },
    /// RDMSR or WRMSR that KVM did not serve.
    Msr(MsrAccess),
    /// HLT.
    Hlt,
    /// It took an exception.
    Exception {
        /// The vector.
        vector: u8,
    },
    /// One step is done, or a debug condition was met.
    Debug,
    /// The watchdog's signal came.
    Interrupted,
    /// It wrote to a port no program uses.
    StrangePort {
        /// The port.
        port: u16,
    },
    /// Triple fault.
    Shutdown,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Report => write!(f, "the end of the program"),
            Self::Ask => write!(f, "a port read"),
            Self::MmioRead { addr } => write!(f, "an MMIO read of {addr:#x}"),
            Self::MmioWrite { addr, value } => {
                write!(f, "an MMIO write of {value:#x} to {addr:#x}")
            }
            Self::Msr(MsrAccess { index, .. }) => write!(f, "an access to MSR {index:#x}"),
            Self::Hlt => write!(f, "HLT"),
            Self::Exception { vector } => match EXCEPTION_NAMES.iter().find(|n| n.0 == *vector) {
                Some((_, name)) => write!(f, "the guest's {name} handler"),
                None => write!(f, "the guest's handler of vector {vector}"),
            },
            Self::Debug => write!(f, "a debug exit"),
            Self::Interrupted => write!(f, "a signal"),
            Self::StrangePort { port } => write!(f, "an access to port {port:#x}"),
            Self::Shutdown => write!(f, "a triple fault"),
        }
    }
}

const EXCEPTION_NAMES: [(u8, &str); 5] =
    [(1, "#DB"), (3, "#BP"), (6, "#UD"), (13, "#GP"), (14, "#PF")];
