//! Device models as deterministic state machines. Nothing here knows KVM, a file descriptor, a clock or a thread.
//!
//! What enters from outside the guest enters as an [`Input`], through one function, [`Board::apply`]; what leaves is an
//! [`Output`].

#![forbid(unsafe_code)]

pub mod acpi;
mod blk_request;
mod board;
mod civil_time;
mod disk;
mod event;
mod fault;
mod net_control;
mod net_header;
mod net_sources;
mod pic;
mod pit;
mod pit_counter;
mod pvpanic;
mod reset;
mod rtc;
mod serial;
mod state;
mod virtio_blk;
mod virtio_entropy;
mod virtio_mmio;
mod virtio_net;
mod virtio_slot;
mod virtqueue;

pub use board::{Board, BoardConfig, BoardState, FLOATING_BUS};
pub use disk::{DiskOp, DiskOutcome, DiskRequest, SECTOR_BYTES, ZeroRange};
pub use event::{Input, Output};
pub use fault::{GuestFault, GuestFaults, HeaderProblem};
pub use net_sources::{NET_SOURCES_MAX, NetSource, NetSources, VLAN_TAGS_MAX, VlanKind, VlanTag};
pub use pit::{OWED_TICKS_MAX, PIT_HZ};
pub use pvpanic::PVPANIC_PORT;
pub use reset::PowerEvent;
pub use serial::BACKLOG_BYTES_MAX;
pub use state::InvalidState;
pub use virtio_blk::DiskCounters;
pub use virtio_net::{
    DEFAULT_MTU, MTU_MIN, NetConfig, NetCounters, RX_BACKLOG_FRAMES_MAX, rx_frame_bytes_max,
};
pub use virtio_slot::{
    VIRTIO_BLK_SLOT, VIRTIO_ENTROPY_SLOT, VIRTIO_NET_SLOT, VirtioSlot, virtio_slots,
};
