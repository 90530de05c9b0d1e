//! The device's side of a virtqueue (virtio 1.2 §2.7), on virtio-queue's split queue: what that
//! crate treats as "no more data" when a driver is hostile is told apart here and reported as a
//! [`GuestFault`].
//!
//! Work is bounded: a chain has at most as many descriptors as its queue, and its bytes are limited
//! by the caller. Indirect tables (§2.7.5.3) are not offered; virtio-queue follows them all the
//! same, within the same bounds.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::fault::GuestFault;
use crate::state::InvalidState;

/// The encoding of virtio-queue's `QueueState`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "QueueState")]
struct QueueStateDef {
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

/// A queue's registers and positions, in a form that can be saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtqueueState(#[serde(with = "QueueStateDef")] QueueState);

impl From<QueueState> for VirtqueueState {
    fn from(state: QueueState) -> Self {
        VirtqueueState(state)
    }
}

impl TryFrom<VirtqueueState> for Queue {
    type Error = InvalidState;

    fn try_from(state: VirtqueueState) -> Result<Self, InvalidState> {
        Queue::try_from(state.0).map_err(|_| InvalidState { field: "virtqueue" })
    }
}

/// Turns an error of virtio-queue's ring accesses into the driver's fault.
pub(crate) fn ring_fault(error: virtio_queue::Error, queue: u16) -> GuestFault {
    match error {
        virtio_queue::Error::InvalidAvailRingIndex => GuestFault::AvailableIndex { queue },
        _ => GuestFault::QueueOutsideMemory { queue },
    }
}

/// The driver chooses how long a queue is.
pub(crate) fn set_size(queue: &mut Queue, number: u16, value: u32) -> Result<(), GuestFault> {
    u16::try_from(value)
        .ok()
        .and_then(|size| queue.try_set_size(size).ok())
        .ok_or(GuestFault::QueueSize { queue: number, size: value })
}

/// The driver writes half of a ring's address: the register at `offset`. virtio-queue silently
/// keeps the old address when the new one is misaligned; a driver deserves to know.
pub(crate) fn set_ring_address(
    queue: &mut Queue,
    number: u16,
    offset: u32,
    value: u32,
) -> Result<(), GuestFault> {
    let address = match offset {
        VIRTIO_MMIO_QUEUE_DESC_LOW => {
            queue.set_desc_table_address(Some(value), None);
            queue.desc_table()
        }
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
            queue.set_avail_ring_address(Some(value), None);
            queue.avail_ring()
        }
        VIRTIO_MMIO_QUEUE_USED_LOW => {
            queue.set_used_ring_address(Some(value), None);
            queue.used_ring()
        }
        VIRTIO_MMIO_QUEUE_DESC_HIGH => {
            queue.set_desc_table_address(None, Some(value));
            return Ok(());
        }
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
            queue.set_avail_ring_address(None, Some(value));
            return Ok(());
        }
        VIRTIO_MMIO_QUEUE_USED_HIGH => {
            queue.set_used_ring_address(None, Some(value));
            return Ok(());
        }
        _ => return Ok(()),
    };
    if address as u32 == value {
        Ok(())
    } else {
        Err(GuestFault::QueueAlignment { queue: number, address_low: value })
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
        match self.next_of_any_direction()? {
            Some(descriptor) if descriptor.is_write_only() != for_writing => {
                Err(GuestFault::WrongDirection { queue, head })
            }
            descriptor => Ok(descriptor),
        }
    }

    fn next_of_any_direction(&mut self) -> Result<Option<Descriptor>, GuestFault> {
        let (queue, head) = (self.queue, self.head);
        if self.is_complete {
            return Ok(None);
        }
        if self.descriptors_left == 0 {
            return Err(GuestFault::LongChain { queue, head });
        }
        self.descriptors_left -= 1;
        let descriptor = self.descriptors.next().ok_or(GuestFault::BrokenChain { queue, head })?;
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

    /// Reads the whole chain into `buffer` and returns its length; a chain longer than `buffer` is
    /// a fault.
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

    /// Writes `bytes` to the front of the chain. The chain's end is not looked at when they fit
    /// before it.
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

    /// The chain's buffers, those to be read before those to be written (§2.7.4.2), all in guest
    /// memory.
    pub(crate) fn segments(mut self) -> Result<Segments, GuestFault> {
        let mut segments = Segments::default();
        while let Some(descriptor) = self.next_of_any_direction()? {
            let segment = Segment { address: descriptor.addr().0, length_bytes: descriptor.len() };
            let access = match descriptor.is_write_only() {
                true => Permissions::Write,
                false => Permissions::Read,
            };
            let (address, length) = (descriptor.addr(), descriptor.len() as usize);
            if !self.mem.check_range(address, length, access) {
                return Err(self.outside_memory(&descriptor));
            }
            if descriptor.is_write_only() {
                segments.writable.push(segment);
            } else if segments.writable.is_empty() {
                segments.readable.push(segment);
            } else {
                let (queue, head) = (self.queue, self.head);
                return Err(GuestFault::WrongDirection { queue, head });
            }
        }
        Ok(segments)
    }
}

/// The buffers of a chain.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    pub(crate) readable: Vec<Segment>,
    pub(crate) writable: Vec<Segment>,
}

/// A buffer in guest memory, as it was when its chain was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    address: u64,
    length_bytes: u32,
}

impl Segment {
    fn outside_memory(&self, queue: u16) -> GuestFault {
        let Segment { address, length_bytes } = *self;
        GuestFault::BufferOutsideMemory { queue, address, length_bytes }
    }
}

/// Bytes that `segments` have room for.
pub(crate) fn total_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.length_bytes)).sum()
}

/// All that `segments` hold, in order.
pub(crate) fn gather<M: GuestMemory>(
    mem: &M,
    queue: u16,
    segments: &[Segment],
) -> Result<Vec<u8>, GuestFault> {
    let mut bytes = vec![0; total_bytes(segments) as usize];
    let mut rest = &mut bytes[..];
    for segment in segments {
        let (part, after) = rest.split_at_mut(segment.length_bytes as usize);
        mem.read_slice(part, GuestAddress(segment.address))
            .map_err(|_| segment.outside_memory(queue))?;
        rest = after;
    }
    Ok(bytes)
}

/// Reads the front of `segments` into `bytes`, as far as there is any; how many were read.
pub(crate) fn gather_front<M: GuestMemory>(
    mem: &M,
    queue: u16,
    segments: &[Segment],
    bytes: &mut [u8],
) -> Result<usize, GuestFault> {
    let mut filled = 0;
    for segment in segments {
        let count = (bytes.len() - filled).min(segment.length_bytes as usize);
        let part = &mut bytes[filled..filled + count];
        mem.read_slice(part, GuestAddress(segment.address))
            .map_err(|_| segment.outside_memory(queue))?;
        filled += count;
    }
    Ok(filled)
}

/// Writes `bytes` to the front of `segments`, as far as there is room.
pub(crate) fn scatter<M: GuestMemory>(
    mem: &M,
    queue: u16,
    segments: &[Segment],
    mut bytes: &[u8],
) -> Result<(), GuestFault> {
    for segment in segments {
        let (part, rest) = bytes.split_at(bytes.len().min(segment.length_bytes as usize));
        mem.write_slice(part, GuestAddress(segment.address))
            .map_err(|_| segment.outside_memory(queue))?;
        bytes = rest;
    }
    Ok(())
}

/// Writes the last byte that `segments` have room for.
pub(crate) fn write_last_byte<M: GuestMemory>(
    mem: &M,
    queue: u16,
    segments: &[Segment],
    byte: u8,
) -> Result<(), GuestFault> {
    match segments.iter().rfind(|segment| segment.length_bytes > 0) {
        Some(segment) => {
            let last = segment.address + u64::from(segment.length_bytes) - 1;
            mem.write_obj(byte, GuestAddress(last)).map_err(|_| segment.outside_memory(queue))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
