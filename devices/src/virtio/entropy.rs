//! The entropy source: a virtio entropy device (virtio 1.2 §5.4) behind the transport of
//! [`super::transport`].
//!
//! | offset | name | access | reset |
//! |--------|------|--------|-------|
//! | 0x000..0x0ff | the transport's registers | | see there |
//! | 0x100.. | there is no configuration (§5.4.4) | r | 0 |
//!
//! Queue 0 takes buffers to fill. Offered: VERSION_1, EVENT_IDX.
//!
//! The device has no entropy of its own. It remembers the length of the guest's oldest buffer, and
//! bytes from outside fill that buffer from its start: at least one, at most its length (§5.4.6.2).
//! A buffer that was filled in part is used; the driver asks again for the rest.
//!
//! Not emulated: nothing is left out, the specification has no more.
//!
//! From outside: random bytes, through [`VirtioEntropy::supply`].

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::QueueOwnedT;
use vm_memory::GuestMemory;

use super::device::VirtioDevice;
use super::queue::next_chain;
use super::transport::{Transport, TransportState};
use crate::event::Output;
use crate::fault::GuestFault;
use crate::state::InvalidState;

const QUEUE: u16 = 0;

/// What the entropy source remembers; plain data, checked when it becomes a [`VirtioEntropy`]
/// again.
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
    /// Length of the oldest buffer the driver has made available, as far as is known; 0 when there
    /// is none.
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

impl VirtioDevice for VirtioEntropy {
    type State = VirtioEntropyState;

    const ID: u32 = VIRTIO_ID_RNG;
    const FEATURES: u64 = 0;
    const QUEUE_COUNT: usize = 1;

    fn transport(&self) -> &Transport {
        &self.transport
    }

    fn transport_mut(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn on_notify<M: GuestMemory>(
        &mut self,
        mem: &M,
        _queue: u16,
        _outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault> {
        self.look(mem)
    }

    fn on_stopped(&mut self) {
        self.wanted_bytes = 0;
    }

    fn save(&self) -> VirtioEntropyState {
        let VirtioEntropy { transport, wanted_bytes, supplied_bytes } = self;
        VirtioEntropyState {
            transport: transport.save(),
            wanted_bytes: *wanted_bytes,
            supplied_bytes: *supplied_bytes,
        }
    }
}

impl VirtioEntropy {
    pub(crate) fn new() -> Self {
        VirtioEntropy { transport: Self::new_transport(), wanted_bytes: 0, supplied_bytes: 0 }
    }

    /// Most bytes [`Self::supply`] would take now.
    pub(crate) fn wanted_bytes(&self) -> u64 {
        self.wanted_bytes
    }

    /// Bytes the guest has got so far.
    pub(crate) fn supplied_bytes(&self) -> u64 {
        self.supplied_bytes
    }

    /// Random bytes arrived from the host. Those for which there is no room are dropped.
    pub(crate) fn supply<M: GuestMemory>(&mut self, mem: &M, bytes: &[u8]) {
        if self.transport.is_live(QUEUE) && !bytes.is_empty() {
            let filled = self.fill(mem, bytes);
            self.conclude(filled);
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
                self.transport.enable_notification(mem, QUEUE)?;
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
        self.transport.add_used(mem, QUEUE, head, part.len() as u32)?;
        self.supplied_bytes += part.len() as u64;
        self.transport.interrupt_if_wanted(mem, QUEUE)?;
        self.look(mem)
    }
}

#[cfg(test)]
mod tests;
