//! The disk: a virtio block device (virtio 1.2 §5.2) behind the transport of [`super::transport`].
//!
//! | offset | name | access | reset |
//! |--------|------|--------|-------|
//! | 0x000..0x0ff | the transport's registers | | see there |
//! | 0x100 | capacity in sectors of 512 bytes, 8 bytes | r | the configured size |
//! | 0x108, 0x10c | size_max, seg_max | r | [`SEGMENT_BYTES_MAX`], [`SEGMENTS_MAX`] |
//! | 0x114 | blk_size | r | 512 |
//! | 0x124, 0x128 | max_discard_sectors, max_discard_seg | r | 128 MiB, 16 |
//! | 0x12c | discard_sector_alignment | r | 8: a page of the host's |
//! | 0x130, 0x134 | max_write_zeroes_sectors, max_write_zeroes_seg | r | 128 MiB, 1 |
//! | 0x138 | write_zeroes_may_unmap | r | 1 |
//! | the rest | of features not offered | r | 0 |
//!
//! Queue 0 takes requests ([`self::request`]). Offered: VERSION_1, EVENT_IDX, SIZE_MAX, SEG_MAX,
//! BLK_SIZE, FLUSH, DISCARD, WRITE_ZEROES.
//!
//! A request becomes an output at the notification, with its data copied. Its buffers are
//! remembered until the answer comes, which may be in any order. While the host owes answers to
//! [`IN_FLIGHT_MAX`] requests, or for [`IN_FLIGHT_BYTES_MAX`], the others stay in the queue. A
//! reset forgets requests; their answers are dropped when they come. Discarded sectors read as
//! zeroes.
//!
//! Not emulated: several queues, topology, switching the write cache (it is on: a driver that wants
//! its data on the disk flushes), secure erase, zones, lifetime.
//!
//! From outside: answers, through [`VirtioBlk::complete`].

mod request;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::QueueT;
use vm_memory::GuestMemory;

use self::request::{
    DISCARD_RANGES_MAX, HEADER_BYTES, Kind, Parsed, RANGE_SECTORS_MAX, Status, ZERO_RANGES_MAX,
    parse,
};
use super::device::{CONFIG_BYTES_MAX, VirtioDevice};
use super::queue::{Segment, Segments, gather, next_chain, scatter, total_bytes, write_last_byte};
use super::transport::{QUEUE_SIZE_MAX, Transport, TransportState};
use crate::disk::{DiskOp, DiskOutcome, DiskRequest, SECTOR_BYTES};
use crate::event::Output;
use crate::fault::GuestFault;
use crate::state::InvalidState;

/// Most bytes of a buffer and most buffers of a request, as the driver is told: together they bound
/// a request's data.
const SEGMENT_BYTES_MAX: u32 = 32 << 10;
const SEGMENTS_MAX: u32 = 126;
const DATA_BYTES_MAX: u64 = SEGMENT_BYTES_MAX as u64 * SEGMENTS_MAX as u64;
/// Most requests the host owes answers to.
const IN_FLIGHT_MAX: usize = QUEUE_SIZE_MAX as usize;
/// No further request is taken while the host is busy with so much data.
const IN_FLIGHT_BYTES_MAX: u64 = 16 << 20;

const QUEUE: u16 = 0;
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;

/// What the guest has asked of its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCounters {
    /// Requests to read.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Requests to write.
    pub writes: u64,
    /// Bytes of those.
    pub written_bytes: u64,
    /// Requests to flush.
    pub flushes: u64,
    /// Requests to discard.
    pub discards: u64,
    /// Requests to write zeroes.
    pub write_zeroes: u64,
    /// Requests that were refused or that the host failed at.
    pub failed: u64,
}

/// A request the host works on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct InFlight {
    id: u64,
    head: u16,
    /// What a read brings; 0 for other requests.
    read_bytes: u32,
    /// Data of the request, in either direction.
    data_bytes: u32,
    /// Where the answer goes; empty when the driver has reset the device since.
    writable: Vec<Segment>,
}

/// What the disk's device remembers; plain data, checked when it becomes a [`VirtioBlk`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioBlkState {
    capacity_sectors: u64,
    transport: TransportState,
    in_flight: Vec<InFlight>,
    last_id: u64,
    counters: DiskCounters,
}

/// The disk's device.
#[derive(Debug)]
pub(crate) struct VirtioBlk {
    capacity_sectors: u64,
    transport: Transport,
    /// In the order of their numbers.
    in_flight: Vec<InFlight>,
    last_id: u64,
    counters: DiskCounters,
}

impl TryFrom<VirtioBlkState> for VirtioBlk {
    type Error = InvalidState;

    fn try_from(state: VirtioBlkState) -> Result<Self, InvalidState> {
        let VirtioBlkState { capacity_sectors, transport, in_flight, last_id, counters } = state;
        let size = capacity_sectors.checked_mul(SECTOR_BYTES);
        let size = size.ok_or(InvalidState { field: "virtio_blk.capacity_sectors" })?;
        let transport = VirtioBlk::new(size).transport.restore(transport)?;
        InvalidState::check(in_flight.len() <= IN_FLIGHT_MAX, "virtio_blk.in_flight")?;
        let mut before = 0;
        for request in &in_flight {
            InvalidState::check(request.id > before, "virtio_blk.in_flight.id")?;
            before = request.id;
            let buffers = request.writable.len() <= usize::from(QUEUE_SIZE_MAX);
            InvalidState::check(buffers, "virtio_blk.in_flight.writable")?;
            let forgotten = request.writable.is_empty();
            InvalidState::check(
                forgotten || transport.is_live(QUEUE),
                "virtio_blk.in_flight.live",
            )?;
            let room_bytes = total_bytes(&request.writable);
            InvalidState::check(
                forgotten || room_bytes > u64::from(request.read_bytes),
                "virtio_blk.in_flight.read_bytes",
            )?;
            let data_bytes = u64::from(request.data_bytes);
            InvalidState::check(data_bytes <= DATA_BYTES_MAX, "virtio_blk.in_flight.data_bytes")?;
        }
        InvalidState::check(before <= last_id, "virtio_blk.last_id")?;
        Ok(VirtioBlk { capacity_sectors, transport, in_flight, last_id, counters })
    }
}

impl VirtioDevice for VirtioBlk {
    type State = VirtioBlkState;

    const ID: u32 = VIRTIO_ID_BLOCK;
    const FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_DISCARD
        | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    const QUEUE_COUNT: usize = 1;

    fn transport(&self) -> &Transport {
        &self.transport
    }

    fn transport_mut(&mut self) -> &mut Transport {
        &mut self.transport
    }

    /// `struct virtio_blk_config` up to the end of write_zeroes_may_unmap (§5.2.4).
    fn config_space(&self) -> [u8; CONFIG_BYTES_MAX] {
        let mut config = [0; CONFIG_BYTES_MAX];
        config[..8].copy_from_slice(&self.capacity_sectors.to_le_bytes());
        for (offset, value) in [
            (8, SEGMENT_BYTES_MAX),
            (12, SEGMENTS_MAX),
            (20, SECTOR_BYTES as u32),
            (36, RANGE_SECTORS_MAX),
            (40, DISCARD_RANGES_MAX),
            (44, DISCARD_ALIGNMENT_SECTORS),
            (48, RANGE_SECTORS_MAX),
            (52, ZERO_RANGES_MAX),
            (56, 1),
        ] {
            config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        config
    }

    fn on_notify<M: GuestMemory>(
        &mut self,
        mem: &M,
        _queue: u16,
        outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault> {
        self.serve(mem, outputs)
    }

    /// A driver that resets the device, or has to, no longer waits for answers. The host goes on
    /// with what it was asked for, and the numbers of requests go on, so that an answer to one from
    /// before is known for what it is.
    fn on_stopped(&mut self) {
        self.in_flight.iter_mut().for_each(|request| request.writable.clear());
    }

    fn save(&self) -> VirtioBlkState {
        let VirtioBlk { capacity_sectors, transport, in_flight, last_id, counters } = self;
        VirtioBlkState {
            capacity_sectors: *capacity_sectors,
            transport: transport.save(),
            in_flight: in_flight.clone(),
            last_id: *last_id,
            counters: *counters,
        }
    }
}

impl VirtioBlk {
    pub(crate) fn new(size_bytes: u64) -> Self {
        VirtioBlk {
            capacity_sectors: size_bytes / SECTOR_BYTES,
            transport: Self::new_transport(),
            in_flight: Vec::new(),
            last_id: 0,
            counters: DiskCounters::default(),
        }
    }

    pub(crate) fn counters(&self) -> &DiskCounters {
        &self.counters
    }

    /// The host has carried out request `id`.
    pub(crate) fn complete<M: GuestMemory>(
        &mut self,
        mem: &M,
        id: u64,
        outcome: DiskOutcome,
        outputs: &mut Vec<Output>,
    ) {
        let Some(index) = self.in_flight.iter().position(|request| request.id == id) else {
            return;
        };
        let InFlight { head, read_bytes, writable, .. } = self.in_flight.remove(index);
        if self.transport.is_live(QUEUE) {
            let answered = match outcome {
                _ if writable.is_empty() => Ok(()),
                DiskOutcome::Done { data } if data.len() == read_bytes as usize => {
                    self.answer(mem, head, &writable, Status::Ok, &data)
                }
                _ => self.answer(mem, head, &writable, Status::IoError, &[]),
            };
            // There is room for another request.
            let served = answered.and_then(|()| self.serve(mem, outputs));
            self.conclude(served);
        }
    }

    fn is_full(&self) -> bool {
        let data_bytes: u64 = self.in_flight.iter().map(|r| u64::from(r.data_bytes)).sum();
        self.in_flight.len() >= IN_FLIGHT_MAX || data_bytes >= IN_FLIGHT_BYTES_MAX
    }

    /// Takes requests from the queue until it is empty or the host has enough to do.
    fn serve<M: GuestMemory>(
        &mut self,
        mem: &M,
        outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault> {
        for _ in 0..self.transport.queue(QUEUE).size() {
            if self.is_full() {
                break;
            }
            let queue = self.transport.queue(QUEUE);
            let Some(chain) = next_chain(queue, QUEUE, mem)? else {
                break;
            };
            let head = chain.head();
            let segments = chain.segments()?;
            self.take(mem, head, segments, outputs)?;
        }
        if !self.is_full() {
            self.transport.end_of_queue(mem, QUEUE)?;
        }
        Ok(())
    }

    fn take<M: GuestMemory>(
        &mut self,
        mem: &M,
        head: u16,
        Segments { readable, writable }: Segments,
        outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault> {
        let (given_bytes, room_bytes) = (total_bytes(&readable), total_bytes(&writable));
        if given_bytes < HEADER_BYTES as u64 || room_bytes == 0 {
            return Err(GuestFault::DiskRequestTooShort { head });
        }
        if given_bytes > HEADER_BYTES as u64 + DATA_BYTES_MAX || room_bytes > DATA_BYTES_MAX + 1 {
            return Err(GuestFault::LongChain { queue: QUEUE, head });
        }
        let request = gather(mem, QUEUE, &readable)?;
        match parse(request, room_bytes as u32 - 1, self.capacity_sectors) {
            Parsed::Now { status, data } => self.answer(mem, head, &writable, status, &data),
            Parsed::Host { kind, op } => {
                self.last_id += 1;
                let read_bytes = match &op {
                    DiskOp::Read { length_bytes, .. } => *length_bytes,
                    _ => 0,
                };
                let data_bytes = match &op {
                    DiskOp::Write { data, .. } => data.len() as u32,
                    _ => read_bytes,
                };
                self.count(kind, data_bytes);
                let id = self.last_id;
                self.in_flight.push(InFlight { id, head, read_bytes, data_bytes, writable });
                outputs.push(Output::Disk(DiskRequest { id, op }));
                Ok(())
            }
        }
    }

    fn count(&mut self, kind: Kind, data_bytes: u32) {
        let DiskCounters { reads, read_bytes, writes, written_bytes, .. } = &mut self.counters;
        match kind {
            Kind::Read => (*reads, *read_bytes) = (*reads + 1, *read_bytes + u64::from(data_bytes)),
            Kind::Write => {
                (*writes, *written_bytes) = (*writes + 1, *written_bytes + u64::from(data_bytes));
            }
            Kind::Flush => self.counters.flushes += 1,
            Kind::Discard => self.counters.discards += 1,
            Kind::WriteZeroes => self.counters.write_zeroes += 1,
        }
    }

    /// Gives the buffers back to the driver, with data at their front and the status in their last
    /// byte.
    fn answer<M: GuestMemory>(
        &mut self,
        mem: &M,
        head: u16,
        writable: &[Segment],
        status: Status,
        data: &[u8],
    ) -> Result<(), GuestFault> {
        self.counters.failed += u64::from(status != Status::Ok);
        scatter(mem, QUEUE, writable, data)?;
        write_last_byte(mem, QUEUE, writable, status as u8)?;
        self.transport.complete(mem, QUEUE, head, data.len() as u32 + 1)
    }
}

#[cfg(test)]
mod tests;
