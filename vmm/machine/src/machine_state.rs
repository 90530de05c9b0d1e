//! The machine as it stands at an exit, memory and disk apart: what an attaching backup and a
//! snapshot get last.

use ftvmm_devices::{BoardState, InvalidState};
use ftvmm_replication::Ordinal;
use ftvmm_replication::encoding::{decode, encode, encode_behind};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cpu::CpuError;
use crate::disk_completion::Completion;
use crate::exit::Exit;
use crate::page_tracker::LoadError;
use crate::tsc::TscTrapState;
use crate::vcpu_state::VcpuState;

/// Version of the encoding. Raised with every change of what follows, and of what it holds: the
/// devices' states and KVM's structures.
pub const MACHINE_STATE_VERSION: u32 = 4;

/// What kind of exit the guest stands at. At both nothing is left to complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResumePoint {
    /// A slice ([`Exit::Slice`]).
    Slice,
    /// The guest waits for an interrupt ([`Exit::Hlt`]).
    Halt,
}

impl ResumePoint {
    /// The exit.
    pub fn exit(self) -> Exit {
        match self {
            Self::Slice => Exit::Slice,
            Self::Halt => Exit::Hlt,
        }
    }

    /// What `exit` is, if a state can be taken at it.
    pub fn of(exit: Exit) -> Option<Self> {
        match exit {
            Exit::Slice => Some(Self::Slice),
            Exit::Hlt => Some(Self::Halt),
            _ => None,
        }
    }
}

/// See the module documentation.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// The exit the guest stands at; its inputs so far are applied, it is not answered.
    pub at: Ordinal,
    /// What kind of exit that is.
    pub resume_point: ResumePoint,
    /// The processor.
    pub vcpu: VcpuState,
    /// The devices.
    pub board: BoardState,
    /// The traps of the time stamp counter.
    pub tsc: TscTrapState,
    /// Digest of all exits so far.
    pub chain: u64,
    /// Digest of all outputs so far.
    pub outputs: u64,
    /// Inputs so far.
    pub inputs: u64,
    /// Slices so far.
    pub slices: u64,
    /// Digest of memory.
    pub memory_digest: u64,
    /// The disk's answers that the guest has not had.
    pub disk_answers: Vec<Completion>,
}

/// A state that cannot be put in place.
#[derive(Debug, Error)]
pub enum StateError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] CpuError),
    /// Memory does not fit.
    #[error(transparent)]
    Memory(#[from] LoadError),
    /// A part is damaged.
    #[error(transparent)]
    Part(#[from] ftvmm_replication::state::StateError),
    /// The machine is of another version.
    #[error("the machine's state has version {got}, this program reads {MACHINE_STATE_VERSION}")]
    Version {
        /// The state's.
        got: u32,
    },
    /// The machine cannot be decoded.
    #[error("the machine's state is damaged")]
    Damaged,
    /// A device cannot be in such a state.
    #[error("the saved device state is invalid: {0}")]
    Devices(#[from] InvalidState),
    /// Memory is not what it was on the other side.
    #[error("memory has digest {own:016x} after the transfer, should have {theirs:016x}")]
    Digest {
        /// Here.
        own: u64,
        /// There.
        theirs: u64,
    },
    /// The guest was made without a log.
    #[error("this guest's memory is not tracked")]
    NotTracked,
}

impl MachineState {
    /// The bytes, version first.
    pub fn encode(&self) -> Vec<u8> {
        encode_behind(self, MACHINE_STATE_VERSION.to_le_bytes().to_vec())
    }

    /// The state these bytes hold.
    ///
    /// # Errors
    /// When they are of another version or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (version, state) = bytes.split_first_chunk().ok_or(StateError::Damaged)?;
        let got = u32::from_le_bytes(*version);
        if got != MACHINE_STATE_VERSION {
            return Err(StateError::Version { got });
        }
        decode(state).map_err(|_| StateError::Damaged)
    }
}

/// What a slice holds besides pages. The log does not know what it is, so that a change of it is a
/// change of [`ftvmm_replication::PROTOCOL_VERSION`].
#[derive(Serialize, Deserialize)]
pub(crate) struct SliceState {
    /// The processor.
    pub vcpu: VcpuState,
    /// Digest of memory after the slice.
    pub memory_digest: u64,
}

impl SliceState {
    pub(crate) fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// `None` when the bytes are none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        decode(bytes).ok()
    }
}

#[cfg(test)]
#[path = "machine_state_tests.rs"]
mod tests;
