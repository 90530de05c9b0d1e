//! A guest small enough to simulate: its whole state is one number, and everything it was given
//! goes into it, so that a frame from it tells which inputs came before.

use ftvmm_devices::Input;
use serde::{Deserialize, Serialize};

/// Mixes `value` into `state` (the finaliser of SplitMix64).
pub fn mix(state: u64, value: u64) -> u64 {
    let mut z = state ^ value.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A frame the guest sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Exit at which it did.
    pub at: u64,
    /// Number and state, eight bytes each.
    pub frame: Vec<u8>,
}

/// The guest, standing at an exit.
#[derive(Serialize, Deserialize)]
pub struct Guest {
    /// The exit it stands at.
    pub at: u64,
    /// Everything it knows.
    pub state: u64,
    /// Every frame it ever sent.
    pub sent: Vec<Sent>,
}

impl Guest {
    /// The guest at power-on.
    pub fn new(rtc_epoch_s: u64) -> Self {
        Self { at: 0, state: mix(rtc_epoch_s, 1), sent: Vec::new() }
    }

    /// What another host needs to go on with it.
    pub fn save(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a guest can be saved")
    }

    /// The guest that was saved.
    pub fn restore(bytes: &[u8]) -> Self {
        postcard::from_bytes(bytes).expect("a guest was saved")
    }

    /// Runs to the next exit; whether it transmitted a frame there.
    pub fn run(&mut self) -> bool {
        self.at += 1;
        self.state = mix(self.state, self.at);
        let transmits = self.state.is_multiple_of(5);
        if transmits {
            let number = self.sent.len() as u64 + 1;
            let frame = [number.to_le_bytes(), self.state.to_le_bytes()].concat();
            self.sent.push(Sent { at: self.at, frame });
        }
        transmits
    }

    /// Takes an input.
    pub fn apply(&mut self, input: &Input) {
        self.state = match input {
            Input::Time { now_ns } => mix(self.state, *now_ns),
            Input::NetRx { frame: bytes }
            | Input::ConsoleRx { bytes }
            | Input::Entropy { bytes } => {
                bytes.iter().fold(self.state, |state, byte| mix(state, u64::from(*byte) + 1))
            }
            Input::PowerButton => mix(self.state, 1),
            Input::Nmi => mix(self.state, 2),
            Input::ConsoleBreak => mix(self.state, 3),
            Input::NetAnnounce => mix(self.state, 4),
            Input::NewIdentity { unix_s, .. } => mix(self.state, *unix_s),
            Input::DiskDone { .. } => unreachable!("this guest has no disk"),
        };
    }

    /// Digest of its state.
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&self.state.to_le_bytes());
        digest[8..16].copy_from_slice(&self.at.to_le_bytes());
        digest
    }
}

/// The number in a frame.
pub fn number(frame: &[u8]) -> u64 {
    frame[..8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
