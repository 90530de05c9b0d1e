//! What both sides keep when they find that they differ.
//!
//! Why: a divergence is a bug in the design or in a host, and the two states are gone a moment
//! later. Each side therefore sends the other what it saw before anything stops.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::bounded;
use crate::digest::OutputDigest;
use crate::policy::Role;
use crate::record::{Hex, Ordinal, OutputOrdinal, Term};

/// Records that a side quotes.
pub(crate) const RECORDS_QUOTED: usize = 32;
/// Longest line of a quoted record, in bytes.
pub(crate) const LINE_BYTES_MAX: usize = 1024;
/// Longest description of a fault, in bytes.
pub(crate) const FAULT_BYTES_MAX: usize = 16 << 10;

/// In what the two sides differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DivergenceCause {
    /// In an output: its bytes, the exit that produced it, or whether it was produced.
    Output {
        /// Which one.
        output: OutputOrdinal,
    },
    /// The backup cannot follow the log.
    ReplayFault {
        /// What the backup's run loop says.
        #[serde(deserialize_with = "bounded::text::<_, FAULT_BYTES_MAX>")]
        description: String,
    },
    /// In the state in which the guest ended.
    FinalState,
}

impl fmt::Display for DivergenceCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Output { output } => write!(f, "output {output} differs"),
            Self::ReplayFault { description } => write!(f, "replay fault: {description}"),
            Self::FinalState => f.write_str("final state differs"),
        }
    }
}

/// An output as one side produced it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputEvidence {
    /// Its number.
    pub output: OutputOrdinal,
    /// Exit at which it was produced.
    pub at: Ordinal,
    /// Its digest.
    pub digest: OutputDigest,
    /// The frame.
    #[serde(deserialize_with = "bounded::frame")]
    pub frame: Vec<u8>,
}

/// What one side saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// The output in question, if this side has produced it and still has it.
    pub output: Option<OutputEvidence>,
    /// Outputs produced so far.
    pub produced_through: OutputOrdinal,
    /// How far this side knows the backup to have executed.
    pub executed_through: Ordinal,
    /// Digest of the state in which the guest ended, if it did.
    pub state_digest: Option<[u8; 32]>,
    /// What went wrong, if the run loop said so.
    #[serde(deserialize_with = "bounded::optional_text::<_, FAULT_BYTES_MAX>")]
    pub fault: Option<String>,
    /// The last records up to the place in question, as `ftvmm log dump` prints them; a long line
    /// is cut.
    #[serde(deserialize_with = "bounded::texts::<_, RECORDS_QUOTED, LINE_BYTES_MAX>")]
    pub last_records: Vec<String>,
}

/// Both sides of a divergence. Each host keeps one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncidentReport {
    /// The term in which it happened.
    pub term: Term,
    /// The host that keeps this copy.
    pub reporter: Role,
    /// In what they differ.
    pub cause: DivergenceCause,
    /// What the primary saw, if it is known here.
    pub primary: Option<Evidence>,
    /// What the backup saw, if it is known here.
    pub backup: Option<Evidence>,
}

impl fmt::Display for IncidentReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "divergence in term {}: {}", self.term, self.cause)?;
        for (role, evidence) in [(Role::Primary, &self.primary), (Role::Backup, &self.backup)] {
            let Some(evidence) = evidence else {
                writeln!(f, "{role}: no evidence")?;
                continue;
            };
            writeln!(f, "{role}: {evidence}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} outputs, executed through {}", self.produced_through, self.executed_through)?;
        if let Some(OutputEvidence { output, at, digest, frame }) = &self.output {
            write!(f, "\n  output {output} at exit {at}, {} bytes", frame.len())?;
            write!(f, "\n  digest {digest}\n  frame  {}", Hex(frame))?;
        }
        if let Some(state_digest) = &self.state_digest {
            write!(f, "\n  state  {}", Hex(state_digest))?;
        }
        if let Some(fault) = &self.fault {
            write!(f, "\n  fault  {fault}")?;
        }
        self.last_records.iter().try_for_each(|record| write!(f, "\n  record {record}"))
    }
}
