//! How a probe says that something does not hold: what was found, and what would have been right.

use std::fmt;

use ftvmm_machine::CpuError;
use ftvmm_machine::cpu_template::TemplateError;
use thiserror::Error;
use vm_memory::GuestMemoryError;

use super::stop::Stop;
use crate::KvmError;

/// What a probe found, in words, or what does not hold.
pub type Findings = Result<String, ProbeFailure>;

/// Why a probe's expectation does not hold.
#[derive(Debug, Error)]
pub enum ProbeFailure {
    /// KVM could not be used, or a call to it failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This host cannot give guests the CPU ftvmm wants.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The guest's memory could not be reached.
    #[error("guest memory cannot be accessed: {0}")]
    Memory(#[from] GuestMemoryError),
    /// KVM interprets the guest and does not know the instruction.
    #[error(
        "KVM gave up at rip {rip:#x}: it interprets guest code and does not know this \
         instruction; a CPU would execute it"
    )]
    EmulationFailure {
        /// Where.
        rip: u64,
    },
    /// The guest did not stop in time.
    #[error("the guest never stopped (rip {rip:#x}), expected {expected}")]
    NoStop {
        /// Where it stood when given up.
        rip: u64,
        /// What should have stopped it.
        expected: Stop,
    },
    /// The guest stopped for the wrong reason.
    #[error("stopped at {got} (rip {rip:#x}), expected {expected}")]
    WrongStop {
        /// The reason.
        got: Stop,
        /// Where.
        rip: u64,
        /// What should have stopped it.
        expected: Stop,
    },
    /// The guest computed or saw something wrong.
    #[error("{what}: got {got}, expected {expected}")]
    Differs {
        /// What was looked at.
        what: String,
        /// What was there.
        got: String,
        /// What should have been there.
        expected: String,
    },
    /// KVM lacks something.
    #[error("missing: {names}; ftvmm needs all of them")]
    Missing {
        /// The capabilities by name.
        names: String,
    },
    /// The guest runs, but interpreted.
    #[error(
        "{mips:.1} million instructions a second: the hypervisor interprets this code; \
         expected at least {mips_min}"
    )]
    Slow {
        /// Millions of instructions per second.
        mips: f64,
        /// The least that is fast enough.
        mips_min: f64,
    },
}

impl From<CpuError> for ProbeFailure {
    fn from(error: CpuError) -> Self {
        Self::Kvm(error.into())
    }
}

/// Compares what the guest saw with what it should have seen.
///
/// # Errors
/// When they are not equal.
pub fn expect_equal<T: PartialEq + fmt::LowerHex>(
    what: impl Into<String>,
    got: T,
    expected: T,
) -> Result<(), ProbeFailure> {
    if got == expected {
        return Ok(());
    }
    Err(ProbeFailure::Differs {
        what: what.into(),
        got: format!("{got:#x}"),
        expected: format!("{expected:#x}"),
    })
}

/// Compares what two runs left behind; `what` names the place of the first difference.
///
/// # Errors
/// When they are not equal.
pub fn same_bytes(
    what: impl FnOnce(usize) -> String,
    expected: &[u8],
    got: &[u8],
) -> Result<(), ProbeFailure> {
    if expected == got {
        return Ok(());
    }
    let at = expected.iter().zip(got).take_while(|(expected, got)| expected == got).count();
    let show = |bytes: &[u8]| bytes.get(at).map_or("nothing".into(), |byte| format!("{byte:#04x}"));
    Err(ProbeFailure::Differs {
        what: what(at),
        got: show(got),
        expected: format!("{} as in the first run", show(expected)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_placed_and_shown() {
        let failure = same_bytes(|at| format!("byte {at}"), &[1, 2, 3], &[1, 9, 3]).unwrap_err();
        assert_eq!(failure.to_string(), "byte 1: got 0x09, expected 0x02 as in the first run");
        let failure = same_bytes(|at| format!("byte {at}"), &[1, 2], &[1]).unwrap_err();
        assert_eq!(failure.to_string(), "byte 1: got nothing, expected 0x02 as in the first run");
    }
}
