//! What every virtio device is to the board: one trait, and the one place where a register access
//! is taken apart, served, and its fault recorded.

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_INTERRUPT_ACK};
use vm_memory::GuestMemory;

use super::transport::{Request, Transport};
use crate::event::Output;
use crate::fault::GuestFault;
use crate::state::InvalidState;

/// Bytes of the longest configuration of a device.
pub(crate) const CONFIG_BYTES_MAX: usize = 64;

/// A virtio device behind its transport.
pub(crate) trait VirtioDevice: Sized {
    /// What the device remembers: plain data, checked when it becomes the device again.
    type State: TryInto<Self, Error = InvalidState>;

    /// The device's type (virtio 1.2 §5).
    const ID: u32;
    /// Features offered besides the transport's.
    const FEATURES: u64;
    /// Number of queues. The device is up while the driver has queue 0 ready.
    const QUEUE_COUNT: usize;

    /// The device's registers and queues.
    fn transport(&self) -> &Transport;

    /// The device's registers and queues, to change them.
    fn transport_mut(&mut self) -> &mut Transport;

    /// The device's own configuration, zero where it ends.
    fn config_space(&self) -> [u8; CONFIG_BYTES_MAX] {
        [0; CONFIG_BYTES_MAX]
    }

    /// The driver has made buffers available in `queue`, which is ready.
    ///
    /// # Errors
    /// What the driver did wrong; the caller records it.
    fn on_notify<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
        outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault>;

    /// The driver has reset the device.
    fn on_reset(&mut self) {}

    /// The device is not up: nothing that waits can be served. Called after every access that
    /// leaves it so, not only after the one that stopped it.
    fn on_stopped(&mut self) {}

    /// The machine goes back to power-on. Counters go on.
    fn power_on(&mut self) {
        self.transport_mut().reset();
        self.on_stopped();
    }

    /// Everything the device remembers.
    fn save(&self) -> Self::State;

    /// Registers and queues of a device at power-on.
    fn new_transport() -> Transport {
        Transport::new(Self::ID, Self::FEATURES, Self::QUEUE_COUNT)
    }

    /// Ends a piece of work: records what the driver did wrong in it, if anything.
    fn conclude(&mut self, served: Result<(), GuestFault>) {
        if let Err(fault) = served {
            self.transport_mut().record_fault(fault);
        }
        if !self.transport().is_live(0) {
            self.on_stopped();
        }
    }
}

/// A device as the bus sees it, whatever its type.
pub(crate) trait OnBus<M> {
    /// The guest reads `data.len()` bytes at `offset` of the device's registers.
    fn read(&self, offset: u32, data: &mut [u8]);

    /// The guest writes `data` at `offset` of the device's registers. Returns whether it was an
    /// interrupt acknowledge.
    fn write(&mut self, mem: &M, offset: u32, data: &[u8], outputs: &mut Vec<Output>) -> bool;
}

impl<M: GuestMemory, D: VirtioDevice> OnBus<M> for D {
    fn read(&self, offset: u32, data: &mut [u8]) {
        let Some(start) = offset.checked_sub(VIRTIO_MMIO_CONFIG) else {
            return self.transport().read_bytes(offset, data);
        };
        let config = self.config_space();
        for (index, byte) in (start as usize..).zip(data) {
            *byte = config.get(index).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, mem: &M, offset: u32, data: &[u8], outputs: &mut Vec<Output>) -> bool {
        let Some(request) = self.transport_mut().write_bytes(mem, offset, data) else {
            return false;
        };
        let served = match request {
            Request::Notify(queue) => self.on_notify(mem, queue, outputs),
            Request::Reset => {
                self.on_reset();
                Ok(())
            }
            Request::Nothing => Ok(()),
        };
        self.conclude(served);
        offset == VIRTIO_MMIO_INTERRUPT_ACK
    }
}

#[cfg(test)]
mod tests;
