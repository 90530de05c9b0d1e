//! The network card: a virtio network device (virtio 1.2 §5.1) behind the transport of
//! [`super::transport`].
//!
//! | offset | name | access | reset |
//! |--------|------|--------|-------|
//! | 0x000..0x0ff | the transport's registers | | see there |
//! | 0x100..0x105 | mac | r | the configured address |
//! | 0x106 | status: 1 link up, 2 announce | r | 1 |
//! | 0x108 | beyond the offered features | r | 0 |
//! | 0x10a | mtu | r | the configured one |
//! | 0x10c.. | beyond the offered features | r | 0 |
//!
//! Queue 0 receives, queue 1 transmits, queue 2 is [`self::control`]'s. Offered: VERSION_1,
//! EVENT_IDX, MAC, CSUM, HOST_TSO4 (a frame to transmit may be a TCP segment of 64 KiB),
//! GUEST_CSUM, STATUS, MTU, CTRL_VQ, GUEST_ANNOUNCE.
//!
//! Every frame passes with its 12-byte `virtio_net_hdr_v1` in front, in both directions.
//! Transmitting happens inside the notification: buffers are used, the frames are outputs. Headers
//! of transmitted frames are checked, because the host would refuse them one by one otherwise; a
//! frame with a bad one is dropped and noted.
//!
//! A received frame goes to the guest's next buffer at once, or waits in a backlog of
//! [`RX_BACKLOG_FRAMES_MAX`] until the guest notifies the receive queue; one more is dropped and
//! counted.
//!
//! A frame from the host has at most [`rx_frame_bytes_max`] bytes: of the MTU for a driver that
//! knows it, of the usual 1500 for one that does not, whose buffers may have no room for more.
//!
//! Not emulated: mergeable receive buffers and receive segmentation, filters, several queue pairs,
//! a link that is down. The driver may send from any address, and gets every frame.
//!
//! From outside: received frames, through [`VirtioNet::receive`], and the wish that the driver
//! announce the guest, through [`VirtioNet::announce`].

mod control;
mod header;
mod sources;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemory;

use self::control::CONTROL_QUEUE;
use self::header::{ETHERNET_HEADER_BYTES, HEADER_BYTES};
pub use self::sources::{NET_SOURCES_MAX, NetSource, NetSources, VLAN_TAGS_MAX, VlanKind, VlanTag};
use super::device::{CONFIG_BYTES_MAX, VirtioDevice};
use super::queue::next_chain;
use super::transport::{Transport, TransportState};
use crate::config::{MTU_MIN, NetConfig};
use crate::event::Output;
use crate::fault::GuestFault;
use crate::state::InvalidState;

/// The MTU of Ethernet.
pub const DEFAULT_MTU: u16 = 1500;
/// Most received frames that wait for the guest's buffers.
pub const RX_BACKLOG_FRAMES_MAX: usize = 256;
/// Longest frame to or from the guest, with its header: an IPv4 packet of the greatest length,
/// Ethernet header, VLAN tag.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + 65_535;

const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;

/// Longest frame from a host whose network has this `mtu`, in bytes, with its header: an Ethernet
/// header, a VLAN tag and the payload.
pub const fn rx_frame_bytes_max(mtu: u16) -> usize {
    HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + mtu as usize
}

/// Frames that passed the card, and those that did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCounters {
    /// Frames the guest has transmitted.
    pub tx_frames: u64,
    /// Frames the guest has received.
    pub rx_frames: u64,
    /// Received frames dropped because the driver was not ready.
    pub rx_dropped_not_ready: u64,
    /// Received frames dropped because the backlog was full.
    pub rx_dropped_backlog_full: u64,
    /// Received frames refused because of their length or header: the host's fault.
    pub rx_refused: u64,
    /// Frames to transmit dropped because of their header: the guest's fault.
    pub tx_malformed: u64,
    /// Times the driver has said that it has announced the guest.
    pub announcements: u64,
}

/// What the card remembers; plain data, checked when it becomes a [`VirtioNet`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioNetState {
    config: NetConfig,
    transport: TransportState,
    backlog: Vec<Vec<u8>>,
    announce: bool,
    sources: NetSources,
    counters: NetCounters,
}

/// The network card.
#[derive(Debug)]
pub(crate) struct VirtioNet {
    config: NetConfig,
    transport: Transport,
    backlog: VecDeque<Vec<u8>>,
    /// The driver is asked to announce the guest and has not done it yet.
    announce: bool,
    sources: NetSources,
    counters: NetCounters,
    /// Where a frame to transmit is gathered; its content means nothing between two frames.
    gathered: Box<[u8]>,
}

impl TryFrom<VirtioNetState> for VirtioNet {
    type Error = InvalidState;

    fn try_from(state: VirtioNetState) -> Result<Self, InvalidState> {
        let VirtioNetState { config, transport, backlog, announce, sources, counters } = state;
        let fresh = VirtioNet::new(config);
        InvalidState::check(config.mtu >= MTU_MIN, "virtio_net.mtu")?;
        InvalidState::check(backlog.len() <= RX_BACKLOG_FRAMES_MAX, "virtio_net.backlog")?;
        let frame_bytes_max = rx_frame_bytes_max(config.mtu.max(DEFAULT_MTU));
        for frame in &backlog {
            let fits = (HEADER_BYTES..=frame_bytes_max).contains(&frame.len());
            InvalidState::check(fits, "virtio_net.backlog.frame")?;
        }
        let transport = fresh.transport.restore(transport)?;
        InvalidState::check(
            backlog.is_empty() || transport.is_live(RX_QUEUE),
            "virtio_net.backlog.not_live",
        )?;
        InvalidState::check(
            !announce || transport.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE),
            "virtio_net.announce",
        )?;
        let backlog = backlog.into();
        Ok(VirtioNet { transport, backlog, announce, sources, counters, ..fresh })
    }
}

impl VirtioDevice for VirtioNet {
    type State = VirtioNetState;

    const ID: u32 = VIRTIO_ID_NET;
    const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_GUEST_CSUM
        | 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_CTRL_VQ
        | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    const QUEUE_COUNT: usize = 3;

    fn transport(&self) -> &Transport {
        &self.transport
    }

    fn transport_mut(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES_MAX] {
        let announce = if self.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut space = [0; CONFIG_BYTES_MAX];
        space[..6].copy_from_slice(&self.config.mac);
        space[6..8].copy_from_slice(&((VIRTIO_NET_S_LINK_UP | announce) as u16).to_le_bytes());
        space[10..12].copy_from_slice(&self.config.mtu.to_le_bytes());
        space
    }

    fn on_notify<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
        outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault> {
        match queue {
            RX_QUEUE => self.deliver(mem),
            CONTROL_QUEUE => self.control(mem),
            _ => self.transmit(mem, outputs),
        }
    }

    /// A request to announce does not outlive the driver.
    fn on_reset(&mut self) {
        if std::mem::take(&mut self.announce) {
            self.transport.config_changed(false);
        }
    }

    fn on_stopped(&mut self) {
        self.counters.rx_dropped_not_ready += self.backlog.len() as u64;
        self.backlog.clear();
    }

    /// Frames that wait are not counted as dropped: they end with the machine they were sent to.
    fn power_on(&mut self) {
        self.transport.reset();
        self.backlog.clear();
        self.announce = false;
    }

    fn save(&self) -> VirtioNetState {
        let VirtioNet { config, transport, backlog, announce, sources, counters, gathered: _ } =
            self;
        VirtioNetState {
            config: *config,
            transport: transport.save(),
            backlog: backlog.iter().cloned().collect(),
            announce: *announce,
            sources: sources.clone(),
            counters: *counters,
        }
    }
}

impl VirtioNet {
    pub(crate) fn new(config: NetConfig) -> Self {
        VirtioNet {
            config,
            transport: Self::new_transport(),
            backlog: VecDeque::new(),
            announce: false,
            sources: NetSources::default(),
            counters: NetCounters::default(),
            gathered: vec![0; FRAME_BYTES_MAX].into_boxed_slice(),
        }
    }

    pub(crate) fn counters(&self) -> &NetCounters {
        &self.counters
    }

    pub(crate) fn sources(&self) -> &NetSources {
        &self.sources
    }

    /// Whether a received frame would reach the guest now, as far as is known.
    pub(crate) fn is_ready(&self) -> bool {
        self.transport.is_live(RX_QUEUE) && self.backlog.is_empty()
    }

    /// Asks the driver to announce the guest to the network (§5.1.6.5.4); one that cannot is left
    /// alone.
    pub(crate) fn announce(&mut self) {
        if self.transport.is_live(CONTROL_QUEUE)
            && self.transport.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE)
        {
            self.announce = true;
            self.transport.config_changed(true);
        }
    }

    /// Serves the control queue.
    fn control<M: GuestMemory>(&mut self, mem: &M) -> Result<(), GuestFault> {
        let may_announce = self.transport.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE);
        let announced = control::serve(&mut self.transport, mem, may_announce)?;
        self.counters.announcements += announced;
        if announced > 0 && std::mem::take(&mut self.announce) {
            self.transport.config_changed(false);
        }
        self.transport.interrupt_if_wanted(mem, CONTROL_QUEUE)
    }

    /// Serves the transmit queue until it is empty; at most one queue length of frames.
    fn transmit<M: GuestMemory>(
        &mut self,
        mem: &M,
        outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault> {
        let with_checksum = self.transport.has_feature(VIRTIO_NET_F_CSUM);
        let with_tso4 = self.transport.has_feature(VIRTIO_NET_F_HOST_TSO4);
        for _ in 0..self.transport.queue(TX_QUEUE).size() {
            let queue = self.transport.queue(TX_QUEUE);
            let Some(chain) = next_chain(queue, TX_QUEUE, mem)? else {
                break;
            };
            let head = chain.head();
            let length = chain.read(&mut self.gathered)?;
            let frame = &mut self.gathered[..length];
            match header::check_transmitted(frame, with_checksum, with_tso4) {
                Ok(()) => {
                    self.sources.learn(&frame[HEADER_BYTES..]);
                    outputs.push(Output::Frame(frame.to_vec()));
                    self.counters.tx_frames += 1;
                }
                Err(problem) => {
                    self.counters.tx_malformed += 1;
                    self.transport.record_fault(GuestFault::FrameHeader { problem });
                }
            }
            self.transport.add_used(mem, TX_QUEUE, head, 0)?;
        }
        self.transport.end_of_queue(mem, TX_QUEUE)?;
        self.transport.interrupt_if_wanted(mem, TX_QUEUE)
    }

    /// A frame arrived from the host.
    pub(crate) fn receive<M: GuestMemory>(&mut self, mem: &M, mut frame: Vec<u8>) {
        let has_checksum_offload = self.transport.has_feature(VIRTIO_NET_F_GUEST_CSUM);
        let knows_mtu = self.transport.has_feature(VIRTIO_NET_F_MTU);
        let mtu = if knows_mtu { self.config.mtu } else { DEFAULT_MTU };
        if frame.len() > rx_frame_bytes_max(mtu)
            || !header::prepare_received(&mut frame, has_checksum_offload)
        {
            self.counters.rx_refused += 1;
        } else if !self.transport.is_live(RX_QUEUE) {
            self.counters.rx_dropped_not_ready += 1;
        } else if self.backlog.len() == RX_BACKLOG_FRAMES_MAX {
            self.counters.rx_dropped_backlog_full += 1;
        } else {
            self.backlog.push_back(frame);
            let delivered = self.deliver(mem);
            self.conclude(delivered);
        }
    }

    /// Moves waiting frames into the guest's buffers while there are both.
    fn deliver<M: GuestMemory>(&mut self, mem: &M) -> Result<(), GuestFault> {
        let mut delivered = 0;
        while let Some(frame) = self.backlog.front() {
            let Some(chain) = next_chain(self.transport.queue(RX_QUEUE), RX_QUEUE, mem)? else {
                // The answer to "are there new buffers" is known: the guest stands still.
                self.transport.enable_notification(mem, RX_QUEUE)?;
                break;
            };
            let head = chain.head();
            chain.write(frame)?;
            self.transport.add_used(mem, RX_QUEUE, head, frame.len() as u32)?;
            self.backlog.pop_front();
            delivered += 1;
        }
        if delivered == 0 {
            return Ok(());
        }
        self.counters.rx_frames += delivered;
        self.transport.interrupt_if_wanted(mem, RX_QUEUE)
    }
}

#[cfg(test)]
mod tests;
