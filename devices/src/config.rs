//! What a board and its network card are built from.

use serde::{Deserialize, Serialize};

/// Smallest MTU (virtio 1.2 §5.1.4.1).
pub const MTU_MIN: u16 = 68;

/// What a board is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoardConfig {
    /// Time of day at power-on, in Unix seconds.
    pub rtc_epoch_s: u64,
    /// The network card; `None` leaves it out.
    pub net: Option<NetConfig>,
    /// Size of the disk, a multiple of [`crate::SECTOR_BYTES`]; `None` leaves the disk out.
    pub disk_bytes: Option<u64>,
}

/// What a network card is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// Longest payload of a frame in bytes, from [`MTU_MIN`] on.
    pub mtu: u16,
}
