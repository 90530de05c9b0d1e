//! What a guest can do wrong towards its devices: a typed reason each, counted, never a panic.

use serde::{Deserialize, Serialize};

/// A driver broke the virtio specification. All but [`GuestFault::FrameHeader`] stop the device: it
/// sets DEVICE_NEEDS_RESET (virtio 1.2 §2.1) and serves nothing until the driver resets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum GuestFault {
    /// A queue size that is zero, no power of two or too large (§2.7, §4.2.2).
    #[error("queue {queue}: size {size} is not a power of two within the maximum")]
    QueueSize {
        /// Queue index.
        queue: u16,
        /// The size the driver wrote.
        size: u32,
    },
    /// A ring address that breaks the alignment of §2.7.
    #[error("queue {queue}: ring address with low word {address_low:#x} is misaligned")]
    QueueAlignment {
        /// Queue index.
        queue: u16,
        /// The low word the driver wrote.
        address_low: u32,
    },
    /// A ring that is not completely in guest memory.
    #[error("queue {queue}: a ring is outside guest memory")]
    QueueOutsideMemory {
        /// Queue index.
        queue: u16,
    },
    /// A notification for a queue that is absent, not ready, or of a driver that has not set
    /// DRIVER_OK (§3.1.1).
    #[error("queue {queue} was notified before it was ready")]
    QueueNotReady {
        /// Queue index as notified.
        queue: u32,
    },
    /// The available index runs ahead of what the queue can hold (§2.7.13).
    #[error("queue {queue}: the available index is further ahead than the queue is long")]
    AvailableIndex {
        /// Queue index.
        queue: u16,
    },
    /// A chain that loops, leaves the descriptor table or cannot be read (§2.7.5).
    #[error("queue {queue}: the descriptor chain at {head} does not end")]
    BrokenChain {
        /// Queue index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A chain with more descriptors than the queue (§2.7.5.3.1) or more bytes than any frame or
    /// request has.
    #[error("queue {queue}: the descriptor chain at {head} is too long")]
    LongChain {
        /// Queue index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer to read where one to write belongs, or the other way round (§5.1.6).
    #[error("queue {queue}: the descriptor chain at {head} has a buffer of the wrong direction")]
    WrongDirection {
        /// Queue index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer that is not completely in guest memory.
    #[error("queue {queue}: {length_bytes} bytes at {address:#x} are outside guest memory")]
    BufferOutsideMemory {
        /// Queue index.
        queue: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length.
        length_bytes: u32,
    },
    /// A buffer for random bytes that has room for none (§5.4.6).
    #[error("queue {queue}: the buffer at {head} has no room")]
    EmptyBuffer {
        /// Queue index.
        queue: u16,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A request to the disk without room for its header or its status (§5.2.6).
    #[error("the disk request at {head} has no room for its header or its status")]
    DiskRequestTooShort {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A receive buffer that cannot hold the frame that arrived (§5.1.6.3.1 asks for 1526 bytes).
    #[error("the receive buffer at {head} is too small for {frame_bytes} bytes")]
    ReceiveBufferTooSmall {
        /// First descriptor of the chain.
        head: u16,
        /// Header and frame.
        frame_bytes: u32,
    },
    /// A frame to transmit whose header makes no sense; only the frame is dropped.
    #[error("a frame to transmit was dropped: {problem}")]
    FrameHeader {
        /// What is wrong with it.
        problem: HeaderProblem,
    },
}

/// Why the `virtio_net_hdr_v1` of a transmitted frame makes no sense (virtio 1.2 §5.1.6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum HeaderProblem {
    /// Not even an Ethernet header follows.
    #[error("it ends before the end of its Ethernet header")]
    ShortFrame,
    /// A partial checksum without VIRTIO_NET_F_CSUM.
    #[error("it asks for a checksum although that was not negotiated")]
    ChecksumNotNegotiated,
    /// The checksum's place is not in the frame.
    #[error("its checksum field is outside the frame")]
    ChecksumOutsideFrame,
    /// A segmentation that is unknown or was not negotiated.
    #[error("it asks for a segmentation that was not negotiated")]
    SegmentationNotNegotiated,
    /// Segmentation without a segment size, or without the checksum it needs.
    #[error("its segmentation has no segment size or no checksum")]
    SegmentationIncomplete,
    /// The headers are said to be longer than the frame.
    #[error("its header length is greater than the frame")]
    HeaderLength,
}

impl GuestFault {
    /// Whether the device stops until the driver resets it.
    pub fn needs_reset(&self) -> bool {
        !matches!(self, GuestFault::FrameHeader { .. })
    }
}

/// The faults of the guest so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFaults {
    /// How many there were.
    pub count: u64,
    /// The first one, usually the cause of the others.
    pub first: Option<GuestFault>,
    /// The latest one.
    pub last: Option<GuestFault>,
}

impl GuestFaults {
    pub(crate) fn record(&mut self, fault: GuestFault) {
        self.count += 1;
        self.first.get_or_insert(fault);
        self.last = Some(fault);
    }

    /// The faults of two devices; of either kind the first device's goes before.
    pub(crate) fn and(self, other: GuestFaults) -> GuestFaults {
        GuestFaults {
            count: self.count + other.count,
            first: self.first.or(other.first),
            last: self.last.or(other.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: GuestFault = GuestFault::FrameHeader { problem: HeaderProblem::ShortFrame };
    const GREAT: GuestFault = GuestFault::QueueNotReady { queue: 1 };

    #[test]
    fn only_a_bad_frame_leaves_the_device_running() {
        assert!(!SMALL.needs_reset());
        assert!(GREAT.needs_reset());
    }

    #[test]
    fn the_first_fault_and_the_last_are_kept_and_all_are_counted() {
        let mut faults = GuestFaults::default();
        [GREAT, SMALL, SMALL].into_iter().for_each(|fault| faults.record(fault));
        assert_eq!(faults, GuestFaults { count: 3, first: Some(GREAT), last: Some(SMALL) });
    }

    #[test]
    fn of_two_devices_the_first_one_that_has_faults_tells_them() {
        let mut one = GuestFaults::default();
        one.record(SMALL);
        let none = GuestFaults::default();
        assert_eq!((one.and(none), none.and(one)), (one, one));
        let other = GuestFaults { count: 2, first: Some(GREAT), last: Some(GREAT) };
        assert_eq!(one.and(other), GuestFaults { count: 3, ..one });
    }
}
