//! The device's side of a virtqueue (virtio 1.2 §2.7), on virtio-queue's split queue: what that crate treats as "no
//! more data" when a driver is hostile is told apart here and reported as a [`GuestFault`].
//!
//! Work is bounded: a chain has at most as many descriptors as its queue, and its bytes are limited by the caller.
//! Indirect tables (§2.7.5.3) are not offered; virtio-queue follows them all the same, within the same bounds.

use serde::{Deserialize, Serialize};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestMemory};

use crate::fault::GuestFault;
use crate::state::InvalidState;

/// A queue's registers and positions, in a form that can be saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtqueueState {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<QueueState> for VirtqueueState {
    fn from(state: QueueState) -> Self {
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = state;
        VirtqueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
    }
}

impl TryFrom<VirtqueueState> for Queue {
    type Error = InvalidState;

    fn try_from(state: VirtqueueState) -> Result<Self, InvalidState> {
        let VirtqueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = state;
        let state = QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        };
        Queue::try_from(state).map_err(|_| InvalidState { field: "virtqueue" })
    }
}

/// Turns an error of virtio-queue's ring accesses into the driver's fault.
pub(crate) fn ring_fault(error: virtio_queue::Error, queue: u16) -> GuestFault {
    match error {
        virtio_queue::Error::InvalidAvailRingIndex => GuestFault::AvailableIndex { queue },
        _ => GuestFault::QueueOutsideMemory { queue },
    }
}

/// The next chain the driver has made available in queue number `index`.
pub(crate) fn next_chain<'a, M: GuestMemory>(
    queue: &mut Queue,
    index: u16,
    mem: &'a M,
) -> Result<Option<Chain<'a, M>>, GuestFault> {
    let mut available = queue.iter(mem).map_err(|error| ring_fault(error, index))?;
    let descriptors = available.next();
    let descriptors_left = queue.size();
    Ok(descriptors.map(|descriptors| Chain {
        mem,
        queue: index,
        head: descriptors.head_index(),
        descriptors,
        descriptors_left,
        is_complete: false,
    }))
}

/// One descriptor chain, not yet read or written.
pub(crate) struct Chain<'a, M> {
    mem: &'a M,
    queue: u16,
    head: u16,
    descriptors: DescriptorChain<&'a M>,
    descriptors_left: u16,
    is_complete: bool,
}

impl<M: GuestMemory> Chain<'_, M> {
    /// First descriptor, the chain's name in the used ring.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    fn next(&mut self, for_writing: bool) -> Result<Option<Descriptor>, GuestFault> {
        let (queue, head) = (self.queue, self.head);
        if self.is_complete {
            return Ok(None);
        }
        if self.descriptors_left == 0 {
            return Err(GuestFault::LongChain { queue, head });
        }
        self.descriptors_left -= 1;
        let descriptor = self.descriptors.next().ok_or(GuestFault::BrokenChain { queue, head })?;
        if descriptor.is_write_only() != for_writing {
            return Err(GuestFault::WrongDirection { queue, head });
        }
        self.is_complete = !descriptor.has_next();
        Ok(Some(descriptor))
    }

    fn outside_memory(&self, descriptor: &Descriptor) -> GuestFault {
        GuestFault::BufferOutsideMemory {
            queue: self.queue,
            address: descriptor.addr().0,
            length_bytes: descriptor.len(),
        }
    }

    /// How many bytes the device may write to the chain; none is a fault.
    pub(crate) fn writable_bytes(mut self) -> Result<u64, GuestFault> {
        let mut length_bytes = 0;
        while let Some(descriptor) = self.next(true)? {
            length_bytes += u64::from(descriptor.len());
        }
        if length_bytes == 0 {
            return Err(GuestFault::EmptyBuffer { queue: self.queue, head: self.head });
        }
        Ok(length_bytes)
    }

    /// Reads the whole chain into `buffer` and returns its length; a chain longer than `buffer` is a fault.
    pub(crate) fn read(mut self, buffer: &mut [u8]) -> Result<usize, GuestFault> {
        let mut filled = 0;
        while let Some(descriptor) = self.next(false)? {
            let end = filled + descriptor.len() as usize;
            let part = buffer
                .get_mut(filled..end)
                .ok_or(GuestFault::LongChain { queue: self.queue, head: self.head })?;
            self.mem
                .read_slice(part, descriptor.addr())
                .map_err(|_| self.outside_memory(&descriptor))?;
            filled = end;
        }
        Ok(filled)
    }

    /// Writes `bytes` to the front of the chain. The chain's end is not looked at when they fit before it.
    pub(crate) fn write(mut self, mut bytes: &[u8]) -> Result<(), GuestFault> {
        let frame_bytes = bytes.len() as u32;
        while !bytes.is_empty() {
            let descriptor = self
                .next(true)?
                .ok_or(GuestFault::ReceiveBufferTooSmall { head: self.head, frame_bytes })?;
            let (part, rest) = bytes.split_at(bytes.len().min(descriptor.len() as usize));
            self.mem
                .write_slice(part, descriptor.addr())
                .map_err(|_| self.outside_memory(&descriptor))?;
            bytes = rest;
        }
        Ok(())
    }
}
