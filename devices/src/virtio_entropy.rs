//! The entropy source: a virtio entropy device (virtio 1.2 §5.4) behind the transport of [`crate::virtio_mmio`].
//!
//! | offset | name | access | reset |
//! |--------|------|--------|-------|
//! | 0x000..0x0ff | the transport's registers | | see there |
//! | 0x100.. | there is no configuration (§5.4.4) | r | 0 |
//!
//! Queue 0 takes buffers to fill. Offered: VERSION_1, EVENT_IDX.
//!
//! The device has no entropy of its own. It remembers the length of the guest's oldest buffer, and bytes from outside
//! fill that buffer from its start: at least one, at most its length (§5.4.6.2). A buffer that was filled in part is
//! used; the driver asks again for the rest.
//!
//! Not emulated: nothing is left out, the specification has no more.
//!
//! From outside: random bytes, through [`VirtioEntropy::supply`].

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemory;

use crate::fault::{GuestFault, GuestFaults};
use crate::state::InvalidState;
use crate::virtio_mmio::{Request, Transport, TransportState};
use crate::virtqueue::{next_chain, ring_fault};

const QUEUE: u16 = 0;
const QUEUE_COUNT: usize = 1;
const FEATURES: u64 = 0;

/// What the entropy source remembers; plain data, checked when it becomes a [`VirtioEntropy`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioEntropyState {
    transport: TransportState,
    wanted_bytes: u64,
    supplied_bytes: u64,
}

/// The entropy source.
#[derive(Debug)]
pub(crate) struct VirtioEntropy {
    transport: Transport,
    /// Length of the oldest buffer the driver has made available, as far as is known; 0 when there is none.
    wanted_bytes: u64,
    supplied_bytes: u64,
}

impl TryFrom<VirtioEntropyState> for VirtioEntropy {
    type Error = InvalidState;

    fn try_from(state: VirtioEntropyState) -> Result<Self, InvalidState> {
        let VirtioEntropyState { transport, wanted_bytes, supplied_bytes } = state;
        let transport = VirtioEntropy::new().transport.restore(transport)?;
        InvalidState::check(
            wanted_bytes == 0 || transport.is_live(QUEUE),
            "virtio_entropy.wanted_bytes",
        )?;
        Ok(VirtioEntropy { transport, wanted_bytes, supplied_bytes })
    }
}

impl VirtioEntropy {
    pub(crate) fn new() -> Self {
        VirtioEntropy {
            transport: Transport::new(VIRTIO_ID_RNG, FEATURES, QUEUE_COUNT),
            wanted_bytes: 0,
            supplied_bytes: 0,
        }
    }

    /// The device as at power-on; its counters go on.
    pub(crate) fn power_on(&mut self) {
        self.transport.reset();
        self.wanted_bytes = 0;
    }

    pub(crate) fn save(&self) -> VirtioEntropyState {
        let VirtioEntropy { transport, wanted_bytes, supplied_bytes } = self;
        VirtioEntropyState {
            transport: transport.save(),
            wanted_bytes: *wanted_bytes,
            supplied_bytes: *supplied_bytes,
        }
    }

    pub(crate) fn faults(&self) -> &GuestFaults {
        self.transport.faults()
    }

    pub(crate) fn interrupt_line(&self) -> bool {
        self.transport.interrupt_line()
    }

    /// Most bytes [`Self::supply`] would take now.
    pub(crate) fn wanted_bytes(&self) -> u64 {
        self.wanted_bytes
    }

    /// Bytes the guest has got so far.
    pub(crate) fn supplied_bytes(&self) -> u64 {
        self.supplied_bytes
    }

    /// The guest reads `data.len()` bytes at `offset` of the device's registers.
    pub(crate) fn read(&self, offset: u32, data: &mut [u8]) {
        self.transport.read_bytes(&[], offset, data);
    }

    /// The guest writes `data` at `offset` of the device's registers. Returns whether it was an interrupt acknowledge.
    pub(crate) fn write<M: GuestMemory>(&mut self, mem: &M, offset: u32, data: &[u8]) -> bool {
        let Some(request) = self.transport.write_bytes(mem, offset, data) else {
            return false;
        };
        if let Request::Notify(_) = request {
            let looked = self.look(mem);
            self.note(looked);
        }
        if !self.transport.is_live(QUEUE) {
            self.wanted_bytes = 0;
        }
        offset == VIRTIO_MMIO_INTERRUPT_ACK
    }

    /// Random bytes arrived from the host. Those for which there is no room are dropped.
    pub(crate) fn supply<M: GuestMemory>(&mut self, mem: &M, bytes: &[u8]) {
        if self.transport.is_live(QUEUE) && !bytes.is_empty() {
            let filled = self.fill(mem, bytes);
            self.note(filled);
        }
    }

    fn note(&mut self, served: Result<(), GuestFault>) {
        if let Err(fault) = served {
            self.transport.record_fault(fault);
            self.wanted_bytes = 0;
        }
    }

    /// Finds out how long the driver's oldest buffer is, and leaves it where it is.
    fn look<M: GuestMemory>(&mut self, mem: &M) -> Result<(), GuestFault> {
        let queue = self.transport.queue(QUEUE);
        self.wanted_bytes = match next_chain(queue, QUEUE, mem)? {
            Some(chain) => {
                queue.go_to_previous_position();
                chain.writable_bytes()?
            }
            None => {
                // The answer to "are there new buffers" is known: the guest stands still.
                queue.enable_notification(mem).map_err(|error| ring_fault(error, QUEUE))?;
                0
            }
        };
        Ok(())
    }

    fn fill<M: GuestMemory>(&mut self, mem: &M, bytes: &[u8]) -> Result<(), GuestFault> {
        // The driver may have changed the buffer since it was looked at.
        self.look(mem)?;
        let queue = self.transport.queue(QUEUE);
        let Some(chain) = next_chain(queue, QUEUE, mem)? else {
            return Ok(());
        };
        let head = chain.head();
        let part = &bytes[..bytes.len().min(self.wanted_bytes as usize)];
        chain.write(part)?;
        queue.add_used(mem, head, part.len() as u32).map_err(|error| ring_fault(error, QUEUE))?;
        self.supplied_bytes += part.len() as u64;
        let interrupt = queue.needs_notification(mem).map_err(|error| ring_fault(error, QUEUE))?;
        if interrupt {
            self.transport.interrupt_used();
        }
        self.look(mem)
    }
}
