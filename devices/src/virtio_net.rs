//! The network card: a virtio network device (virtio 1.2 §5.1) behind the transport of [`crate::virtio_mmio`].
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
//! Queue 0 receives, queue 1 transmits, queue 2 is [`crate::net_control`]'s. Offered: VERSION_1, EVENT_IDX, MAC, CSUM,
//! HOST_TSO4 (a frame to transmit may be a TCP segment of 64 KiB), GUEST_CSUM, STATUS, MTU, CTRL_VQ, GUEST_ANNOUNCE.
//!
//! Every frame passes with its 12-byte `virtio_net_hdr_v1` in front, in both directions. Transmitting happens inside
//! the notification: buffers are used, the frames are outputs. Headers of transmitted frames are checked, because the
//! host would refuse them one by one otherwise; a frame with a bad one is dropped and noted.
//!
//! A received frame goes to the guest's next buffer at once, or waits in a backlog of [`RX_BACKLOG_FRAMES_MAX`] until
//! the guest notifies the receive queue; one more is dropped and counted.
//!
//! A frame from the host has at most [`rx_frame_bytes_max`] bytes: of the MTU for a driver that knows it, of the usual 1500
//! for one that does not, whose buffers may have no room for more.
//!
//! Not emulated: mergeable receive buffers and receive segmentation, filters, several queue pairs, a link that is down. The
//! driver may send from any address, and gets every frame.
//!
//! From outside: received frames, through [`VirtioNet::receive`], and the wish that the driver announce the guest, through
//! [`VirtioNet::announce`].

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemory;

use crate::event::Output;
use crate::fault::{GuestFault, GuestFaults};
use crate::net_control::{self, CONTROL_QUEUE};
use crate::net_header::{self, ETHERNET_HEADER_BYTES, HEADER_BYTES};
use crate::net_sources::NetSources;
use crate::state::InvalidState;
use crate::virtio_mmio::{Request, Transport, TransportState};
use crate::virtqueue::{next_chain, ring_fault};

/// The MTU of Ethernet.
pub const DEFAULT_MTU: u16 = 1500;
/// Smallest MTU (§5.1.4.1).
pub const MTU_MIN: u16 = 68;
/// Most received frames that wait for the guest's buffers.
pub const RX_BACKLOG_FRAMES_MAX: usize = 256;
/// Longest frame from the guest, with its header: an IPv4 packet of the greatest length, Ethernet header, VLAN tag.
const TX_FRAME_BYTES_MAX: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + 65_535;

const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;
const QUEUE_COUNT: usize = 3;
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// Longest frame from a host whose network has this `mtu`, in bytes, with its header: an Ethernet header, a VLAN tag and
/// the payload.
pub const fn rx_frame_bytes_max(mtu: u16) -> usize {
    HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + mtu as usize
}

/// What a card is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// Longest payload of a frame in bytes, from [`MTU_MIN`] on.
    pub mtu: u16,
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

impl VirtioNet {
    pub(crate) fn new(config: NetConfig) -> Self {
        VirtioNet {
            config,
            transport: Transport::new(VIRTIO_ID_NET, FEATURES, QUEUE_COUNT),
            backlog: VecDeque::new(),
            announce: false,
            sources: NetSources::default(),
            counters: NetCounters::default(),
            gathered: vec![0; TX_FRAME_BYTES_MAX].into_boxed_slice(),
        }
    }

    /// The card as at power-on; its counters go on.
    pub(crate) fn power_on(&mut self) {
        self.transport.reset();
        self.backlog.clear();
        self.announce = false;
    }

    pub(crate) fn save(&self) -> VirtioNetState {
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

    pub(crate) fn faults(&self) -> &GuestFaults {
        self.transport.faults()
    }

    pub(crate) fn counters(&self) -> &NetCounters {
        &self.counters
    }

    pub(crate) fn sources(&self) -> &NetSources {
        &self.sources
    }

    pub(crate) fn interrupt_line(&self) -> bool {
        self.transport.interrupt_line()
    }

    /// Whether a received frame would reach the guest now, as far as is known.
    pub(crate) fn is_ready(&self) -> bool {
        self.transport.is_live(RX_QUEUE) && self.backlog.is_empty()
    }

    /// The guest reads `data.len()` bytes at `offset` of the card's registers.
    pub(crate) fn read(&self, offset: u32, data: &mut [u8]) {
        self.transport.read_bytes(&self.config_space(), offset, data);
    }

    fn config_space(&self) -> [u8; 12] {
        let announce = if self.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.config.mac);
        space[6..8].copy_from_slice(&((VIRTIO_NET_S_LINK_UP | announce) as u16).to_le_bytes());
        space[10..].copy_from_slice(&self.config.mtu.to_le_bytes());
        space
    }

    /// Asks the driver to announce the guest to the network (§5.1.6.5.4); one that cannot is left alone.
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
        let queue = self.transport.queue(CONTROL_QUEUE);
        let announced = net_control::serve(queue, mem, may_announce)?;
        self.counters.announcements += announced;
        if announced > 0 && std::mem::take(&mut self.announce) {
            self.transport.config_changed(false);
        }
        self.interrupt_if_wanted(mem, CONTROL_QUEUE)
    }

    /// The guest writes `data` at `offset` of the card's registers. Returns whether it was an interrupt acknowledge.
    pub(crate) fn write<M: GuestMemory>(
        &mut self,
        mem: &M,
        offset: u32,
        data: &[u8],
        outputs: &mut Vec<Output>,
    ) -> bool {
        let was_live = self.transport.is_live(RX_QUEUE);
        let Some(request) = self.transport.write_bytes(mem, offset, data) else {
            return false;
        };
        let served = match request {
            Request::Notify(RX_QUEUE) => self.deliver(mem),
            Request::Notify(CONTROL_QUEUE) => self.control(mem),
            Request::Notify(_) => self.transmit(mem, outputs),
            Request::Reset => {
                // The next driver starts without a wish that was the last one's.
                if std::mem::take(&mut self.announce) {
                    self.transport.config_changed(false);
                }
                Ok(())
            }
            Request::Nothing => Ok(()),
        };
        if let Err(fault) = served {
            self.transport.record_fault(fault);
        }
        if was_live && !self.transport.is_live(RX_QUEUE) {
            self.counters.rx_dropped_not_ready += self.backlog.len() as u64;
            self.backlog.clear();
        }
        offset == VIRTIO_MMIO_INTERRUPT_ACK
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
            match net_header::check_transmitted(frame, with_checksum, with_tso4) {
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
            let queue = self.transport.queue(TX_QUEUE);
            queue.add_used(mem, head, 0).map_err(|error| ring_fault(error, TX_QUEUE))?;
        }
        let queue = self.transport.queue(TX_QUEUE);
        // The guest stands still, so more frames now mean that its rings lie on top of one another.
        if queue.enable_notification(mem).map_err(|error| ring_fault(error, TX_QUEUE))? {
            return Err(GuestFault::AvailableIndex { queue: TX_QUEUE });
        }
        self.interrupt_if_wanted(mem, TX_QUEUE)
    }

    /// A frame arrived from the host.
    pub(crate) fn receive<M: GuestMemory>(&mut self, mem: &M, mut frame: Vec<u8>) {
        let has_checksum_offload = self.transport.has_feature(VIRTIO_NET_F_GUEST_CSUM);
        let knows_mtu = self.transport.has_feature(VIRTIO_NET_F_MTU);
        let mtu = if knows_mtu { self.config.mtu } else { DEFAULT_MTU };
        if frame.len() > rx_frame_bytes_max(mtu)
            || !net_header::prepare_received(&mut frame, has_checksum_offload)
        {
            self.counters.rx_refused += 1;
        } else if !self.transport.is_live(RX_QUEUE) {
            self.counters.rx_dropped_not_ready += 1;
        } else if self.backlog.len() == RX_BACKLOG_FRAMES_MAX {
            self.counters.rx_dropped_backlog_full += 1;
        } else {
            self.backlog.push_back(frame);
            if let Err(fault) = self.deliver(mem) {
                self.transport.record_fault(fault);
                self.counters.rx_dropped_not_ready += self.backlog.len() as u64;
                self.backlog.clear();
            }
        }
    }

    /// Moves waiting frames into the guest's buffers while there are both.
    fn deliver<M: GuestMemory>(&mut self, mem: &M) -> Result<(), GuestFault> {
        let queue = self.transport.queue(RX_QUEUE);
        let mut delivered = 0;
        while let Some(frame) = self.backlog.front() {
            let Some(chain) = next_chain(queue, RX_QUEUE, mem)? else {
                // The answer to "are there new buffers" is known: the guest stands still.
                queue.enable_notification(mem).map_err(|error| ring_fault(error, RX_QUEUE))?;
                break;
            };
            let head = chain.head();
            chain.write(frame)?;
            queue
                .add_used(mem, head, frame.len() as u32)
                .map_err(|error| ring_fault(error, RX_QUEUE))?;
            self.backlog.pop_front();
            delivered += 1;
        }
        if delivered == 0 {
            return Ok(());
        }
        self.counters.rx_frames += delivered;
        self.interrupt_if_wanted(mem, RX_QUEUE)
    }

    fn interrupt_if_wanted<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
    ) -> Result<(), GuestFault> {
        let wanted = self.transport.queue(queue).needs_notification(mem);
        if wanted.map_err(|error| ring_fault(error, queue))? {
            self.transport.interrupt_used();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
