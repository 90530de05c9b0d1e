//! Device models as deterministic state machines. Nothing here knows KVM, a file descriptor, a
//! clock or a thread.
//!
//! What enters from outside the guest enters as an [`Input`], through one function,
//! [`Board::apply`]; what leaves is an [`Output`].

#![forbid(unsafe_code)]

pub mod acpi;
mod board;
mod bus;
mod civil_time;
mod config;
mod disk;
mod event;
mod fault;
mod pic;
mod pit;
mod pit_counter;
mod pvpanic;
mod reset;
mod rtc;
mod serial;
mod state;
mod virtio;

pub use board::{Board, BoardState};
pub use bus::FLOATING_BUS;
pub use config::{BoardConfig, MTU_MIN, NetConfig};
pub use disk::{DiskOp, DiskOutcome, DiskRequest, SECTOR_BYTES, ZeroRange};
pub use event::{Input, Output};
pub use fault::{GuestFault, GuestFaults, HeaderProblem};
pub use pit::{OWED_TICKS_MAX, PIT_HZ};
pub use pvpanic::PVPANIC_PORT;
pub use reset::PowerEvent;
pub use serial::BACKLOG_BYTES_MAX;
pub use state::InvalidState;
pub use virtio::blk::DiskCounters;
pub use virtio::net::{
    DEFAULT_MTU, FRAME_BYTES_MAX, NET_SOURCES_MAX, NetCounters, NetSource, NetSources,
    RX_BACKLOG_FRAMES_MAX, VLAN_TAGS_MAX, VlanKind, VlanTag, rx_frame_bytes_max,
};
pub use virtio::{VIRTIO_BLK_SLOT, VIRTIO_ENTROPY_SLOT, VIRTIO_NET_SLOT, VirtioSlot, virtio_slots};
