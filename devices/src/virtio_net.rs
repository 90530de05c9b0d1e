//! The network card: a virtio network device (virtio 1.2 §5.1) behind the transport of [`crate::virtio_mmio`].
//!
//! | offset | name | access | reset |
//! |--------|------|--------|-------|
//! | 0x000..0x0ff | the transport's registers | | see there |
//! | 0x100..0x105 | mac | r | the configured address |
//! | 0x106.. | beyond the offered features | r | 0 |
//!
//! Queue 0 receives, queue 1 transmits. Offered: VERSION_1, EVENT_IDX, MAC, CSUM, HOST_TSO4 (a frame to transmit may be
//! a TCP segment of 64 KiB), GUEST_CSUM.
//!
//! Every frame passes with its 12-byte `virtio_net_hdr_v1` in front, in both directions. Transmitting happens inside
//! the notification: buffers are used, the frames are outputs. Headers of transmitted frames are checked, because the
//! host would refuse them one by one otherwise; a frame with a bad one is dropped and noted.
//!
//! A received frame goes to the guest's next buffer at once, or waits in a backlog of [`RX_BACKLOG_FRAMES_MAX`] until
//! the guest notifies the receive queue; one more is dropped and counted.
//!
//! Not emulated: mergeable receive buffers and receive segmentation (frames from the host have at most
//! [`RX_FRAME_BYTES_MAX`] bytes), control queue, several queue pairs, link status, MTU.
//!
//! From outside: received frames, through [`VirtioNet::receive`].

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MAC,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemory;

use crate::event::Output;
use crate::fault::{GuestFault, GuestFaults};
use crate::net_header::{self, ETHERNET_HEADER_BYTES, HEADER_BYTES};
use crate::state::InvalidState;
use crate::virtio_mmio::{Request, Transport, TransportState};
use crate::virtqueue::{next_chain, ring_fault};

/// Longest frame from the host, with its header: 1500 bytes of payload, an Ethernet header and a VLAN tag.
pub const RX_FRAME_BYTES_MAX: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + 1500;
/// Most received frames that wait for the guest's buffers.
pub const RX_BACKLOG_FRAMES_MAX: usize = 256;
/// Longest frame from the guest, with its header: an IPv4 packet of the greatest length, Ethernet header, VLAN tag.
const TX_FRAME_BYTES_MAX: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + 65_535;

const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;
const QUEUE_COUNT: usize = 2;
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_HOST_TSO4;

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
}

/// What the card remembers; plain data, checked when it becomes a [`VirtioNet`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioNetState {
    mac: [u8; 6],
    transport: TransportState,
    backlog: Vec<Vec<u8>>,
    counters: NetCounters,
}

/// The network card.
#[derive(Debug)]
pub(crate) struct VirtioNet {
    mac: [u8; 6],
    transport: Transport,
    backlog: VecDeque<Vec<u8>>,
    counters: NetCounters,
    /// Where a frame to transmit is gathered; its content means nothing between two frames.
    gathered: Box<[u8]>,
}

impl TryFrom<VirtioNetState> for VirtioNet {
    type Error = InvalidState;

    fn try_from(state: VirtioNetState) -> Result<Self, InvalidState> {
        let VirtioNetState { mac, transport, backlog, counters } = state;
        let fresh = VirtioNet::new(mac);
        InvalidState::check(backlog.len() <= RX_BACKLOG_FRAMES_MAX, "virtio_net.backlog")?;
        for frame in &backlog {
            let fits = (HEADER_BYTES..=RX_FRAME_BYTES_MAX).contains(&frame.len());
            InvalidState::check(fits, "virtio_net.backlog.frame")?;
        }
        let transport = fresh.transport.restore(transport)?;
        InvalidState::check(
            backlog.is_empty() || transport.is_live(RX_QUEUE),
            "virtio_net.backlog.not_live",
        )?;
        Ok(VirtioNet { mac, transport, backlog: backlog.into(), counters, ..fresh })
    }
}

impl VirtioNet {
    pub(crate) fn new(mac: [u8; 6]) -> Self {
        VirtioNet {
            mac,
            transport: Transport::new(VIRTIO_ID_NET, FEATURES, QUEUE_COUNT),
            backlog: VecDeque::new(),
            counters: NetCounters::default(),
            gathered: vec![0; TX_FRAME_BYTES_MAX].into_boxed_slice(),
        }
    }

    /// The card as at power-on; its counters go on.
    pub(crate) fn power_on(&mut self) {
        self.transport.reset();
        self.backlog.clear();
    }

    pub(crate) fn save(&self) -> VirtioNetState {
        let VirtioNet { mac, transport, backlog, counters, gathered: _ } = self;
        VirtioNetState {
            mac: *mac,
            transport: transport.save(),
            backlog: backlog.iter().cloned().collect(),
            counters: *counters,
        }
    }

    pub(crate) fn faults(&self) -> &GuestFaults {
        self.transport.faults()
    }

    pub(crate) fn counters(&self) -> &NetCounters {
        &self.counters
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
        self.transport.read_bytes(&self.mac, offset, data);
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
            Request::Notify(_) => self.transmit(mem, outputs),
            Request::Nothing | Request::Reset => Ok(()),
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
                    outputs.push(Output::Frame(frame.to_vec()));
                    self.counters.tx_frames += 1;
                }
                Err(problem) => {
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
        if frame.len() > RX_FRAME_BYTES_MAX
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
