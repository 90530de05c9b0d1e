//! The virtio transport over memory-mapped I/O, version 2 (virtio 1.2 §4.2.2), for a device with
//! any queues.
//!
//! | offset | name | access | reset |
//! |--------|------|--------|-------|
//! | 0x000 | MagicValue | r | 0x74726976 |
//! | 0x004 | Version | r | 2 |
//! | 0x008, 0x00c | DeviceID, VendorID | r | the device's, "FTVM" |
//! | 0x010, 0x014 | DeviceFeatures, …Sel | r, w | the device's, 0 |
//! | 0x020, 0x024 | DriverFeatures, …Sel | w | 0, 0 |
//! | 0x030 | QueueSel | w | 0 |
//! | 0x034, 0x038 | QueueNumMax, QueueNum | r, w | [`QUEUE_SIZE_MAX`] (0: no such queue) |
//! | 0x044 | QueueReady | rw | 0 |
//! | 0x050 | QueueNotify | w | |
//! | 0x060, 0x064 | InterruptStatus, InterruptACK | r, w | 0 |
//! | 0x070 | Status | rw | 0; writing 0 resets the device |
//! | 0x080..0x0a4 | QueueDesc/Driver/DeviceLow/High | w | 0 |
//! | 0x0b0..0x0bc | SHMLen, SHMBase | r | all ones: no shared memory |
//! | 0x0fc | ConfigGeneration | r | 0; counts the changes of the configuration |
//! | 0x100.. | configuration | r | the device's |
//!
//! Registers are 32 bits wide and aligned (§4.2.2.2). An access of another width reads as
//! [`FLOATING_BUS`] and writes nothing; the configuration is the device's.
//!
//! The interrupt line is "InterruptStatus is not zero". The PIC sees its rising edge only, so the
//! board lets the line fall at every InterruptACK: a cause that came between the driver's read and
//! its acknowledge is a new edge.
//!
//! Queue registers are obeyed only after FEATURES_OK (§3.1.1) and, QueueReady apart, only while the
//! queue is not ready. A driver that breaks the rules finds DEVICE_NEEDS_RESET set; the reason is
//! kept as a [`GuestFault`].
//!
//! Not emulated: queue reset, shared memory regions, administration queues, notification data.
//!
//! From outside: nothing.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

use super::queue::{VirtqueueState, ring_fault, set_ring_address, set_size};
use crate::bus::FLOATING_BUS;
use crate::fault::{GuestFault, GuestFaults};
use crate::state::InvalidState;

/// Largest queue the device takes.
pub(crate) const QUEUE_SIZE_MAX: u16 = 256;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"FTVM");
/// Status bits of §2.1.
const STATUS_BITS: u32 = 0xcf;

/// What a register write asks of the device behind the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Nothing,
    /// The driver has made buffers available in this queue, which is ready.
    Notify(u16),
    /// The driver has reset the device.
    Reset,
}

/// What the transport remembers; plain data, checked when it becomes a [`Transport`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<VirtqueueState>,
    faults: GuestFaults,
}

/// Registers and queues of one virtio device.
#[derive(Debug)]
pub(crate) struct Transport {
    device_id: u32,
    offered_features: u64,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
    faults: GuestFaults,
}

#[expect(clippy::expect_used, reason = "a constant that virtio-queue accepts or no test passes")]
fn new_queue() -> Queue {
    Queue::new(QUEUE_SIZE_MAX).expect("the maximum size is a power of two")
}

impl Transport {
    pub(crate) fn new(device_id: u32, device_features: u64, queue_count: usize) -> Self {
        Transport {
            device_id,
            offered_features: device_features
                | 1 << VIRTIO_F_VERSION_1
                | 1 << VIRTIO_RING_F_EVENT_IDX,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: (0..queue_count).map(|_| new_queue()).collect(),
            faults: GuestFaults::default(),
        }
    }

    pub(crate) fn save(&self) -> TransportState {
        let Transport {
            device_id: _,
            offered_features: _,
            status,
            interrupt_status,
            config_generation,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
            faults,
        } = self;
        TransportState {
            status: *status,
            interrupt_status: *interrupt_status,
            config_generation: *config_generation,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues: queues.iter().map(|queue| queue.state().into()).collect(),
            faults: *faults,
        }
    }

    /// This transport, as it was built, with the registers of `state`.
    pub(crate) fn restore(self, state: TransportState) -> Result<Self, InvalidState> {
        let TransportState {
            status,
            interrupt_status,
            config_generation,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
            faults,
        } = state;
        let queues: Vec<Queue> =
            queues.into_iter().map(Queue::try_from).collect::<Result<_, _>>()?;
        let restored = Transport {
            status,
            interrupt_status,
            config_generation,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
            faults,
            ..self
        };
        InvalidState::check(restored.queues.len() == self.queues.len(), "virtio.queues")?;
        for queue in &restored.queues {
            InvalidState::check(queue.max_size() == QUEUE_SIZE_MAX, "virtio.queue.max_size")?;
            let event_idx = queue.ready() && restored.has_feature(VIRTIO_RING_F_EVENT_IDX);
            InvalidState::check(
                queue.event_idx_enabled() == event_idx,
                "virtio.queue.event_idx_enabled",
            )?;
            InvalidState::check(
                !queue.ready() || restored.has_status(VIRTIO_CONFIG_S_FEATURES_OK),
                "virtio.queue.ready",
            )?;
        }
        InvalidState::check(status & !STATUS_BITS == 0, "virtio.status")?;
        let interrupts = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
        InvalidState::check(interrupt_status & !interrupts == 0, "virtio.interrupt_status")?;
        InvalidState::check(
            !restored.has_status(VIRTIO_CONFIG_S_FEATURES_OK) || restored.features_acceptable(),
            "virtio.driver_features",
        )?;
        InvalidState::check(
            !restored.has_status(VIRTIO_CONFIG_S_DRIVER_OK)
                || restored.has_status(VIRTIO_CONFIG_S_FEATURES_OK),
            "virtio.status.driver_ok",
        )?;
        Ok(restored)
    }

    fn has_status(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    /// Whether the driver has accepted feature number `feature`.
    pub(crate) fn has_feature(&self, feature: u32) -> bool {
        self.driver_features >> feature & 1 != 0
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features == 0 && self.has_feature(VIRTIO_F_VERSION_1)
    }

    /// Whether the device may use `queue`: driver and queue are ready and nothing has gone wrong.
    pub(crate) fn is_live(&self, queue: u16) -> bool {
        self.has_status(VIRTIO_CONFIG_S_DRIVER_OK)
            && !self.has_status(VIRTIO_CONFIG_S_NEEDS_RESET)
            && self.queues.get(usize::from(queue)).is_some_and(QueueT::ready)
    }

    pub(crate) fn queue(&mut self, queue: u16) -> &mut Queue {
        &mut self.queues[usize::from(queue)]
    }

    pub(crate) fn faults(&self) -> &GuestFaults {
        &self.faults
    }

    /// Gives the chain at `head` back to the driver, with `length_bytes` written to it, and tells
    /// the driver if it wants to hear.
    pub(crate) fn complete<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
        head: u16,
        length_bytes: u32,
    ) -> Result<(), GuestFault> {
        self.add_used(mem, queue, head, length_bytes)?;
        self.interrupt_if_wanted(mem, queue)
    }

    /// The first half of [`Self::complete`], for a device that gives back several chains and tells
    /// the driver once, by [`Self::interrupt_if_wanted`].
    pub(crate) fn add_used<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
        head: u16,
        length_bytes: u32,
    ) -> Result<(), GuestFault> {
        let used = self.queue(queue).add_used(mem, head, length_bytes);
        used.map_err(|error| ring_fault(error, queue))
    }

    /// Tells the driver that the device has used buffers, if it wants to hear.
    pub(crate) fn interrupt_if_wanted<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
    ) -> Result<(), GuestFault> {
        let wanted = self.queue(queue).needs_notification(mem);
        if wanted.map_err(|error| ring_fault(error, queue))? {
            self.interrupt_status |= VIRTIO_MMIO_INT_VRING;
        }
        Ok(())
    }

    /// Asks the driver to notify `queue` again. Returns whether more buffers are there already.
    pub(crate) fn enable_notification<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
    ) -> Result<bool, GuestFault> {
        let more = self.queue(queue).enable_notification(mem);
        more.map_err(|error| ring_fault(error, queue))
    }

    /// Ends the serving of a queue that is empty. The guest stands still, so more buffers now mean
    /// that its rings lie on top of one another.
    pub(crate) fn end_of_queue<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
    ) -> Result<(), GuestFault> {
        if self.enable_notification(mem, queue)? {
            return Err(GuestFault::AvailableIndex { queue });
        }
        Ok(())
    }

    /// The device's configuration is another one now (§2.5.1); with `notify` the driver is told.
    pub(crate) fn config_changed(&mut self, notify: bool) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if notify && self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.interrupt_status |= VIRTIO_MMIO_INT_CONFIG;
        }
    }

    /// The interrupt line.
    pub(crate) fn interrupt_line(&self) -> bool {
        self.interrupt_status != 0
    }

    /// Notes a fault and, unless it is one a device can live with, stops the device.
    pub(crate) fn record_fault(&mut self, fault: GuestFault) {
        self.faults.record(fault);
        if fault.needs_reset() {
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            if self.has_status(VIRTIO_CONFIG_S_DRIVER_OK) {
                self.interrupt_status |= VIRTIO_MMIO_INT_CONFIG;
            }
        }
    }

    fn selected_queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// The guest reads `data.len()` bytes at `offset`, below the configuration.
    pub(crate) fn read_bytes(&self, offset: u32, data: &mut [u8]) {
        if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read(offset).to_le_bytes());
        } else {
            data.fill(FLOATING_BUS);
        }
    }

    /// The guest writes `data` at `offset` of the device's registers. `None` when no register is
    /// written so.
    pub(crate) fn write_bytes<M: GuestMemory>(
        &mut self,
        mem: &M,
        offset: u32,
        data: &[u8],
    ) -> Option<Request> {
        let bytes = <[u8; 4]>::try_from(data).ok()?;
        let is_register = offset.is_multiple_of(4) && offset < VIRTIO_MMIO_CONFIG;
        is_register.then(|| self.write(mem, offset, u32::from_le_bytes(bytes)))
    }

    /// Reads the register at `offset`, below the configuration.
    pub(crate) fn read(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered_features as u32,
                1 => (self.offered_features >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.selected_queue().map_or(0, |queue| u32::from(queue.max_size()))
            }
            VIRTIO_MMIO_QUEUE_READY => {
                self.selected_queue().map_or(0, |queue| u32::from(queue.ready()))
            }
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// Writes the register at `offset`, below the configuration.
    pub(crate) fn write<M: GuestMemory>(&mut self, mem: &M, offset: u32, value: u32) -> Request {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.on_notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt_status &= !value,
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_QUEUE_NUM
            | VIRTIO_MMIO_QUEUE_READY
            | VIRTIO_MMIO_QUEUE_DESC_LOW..=VIRTIO_MMIO_QUEUE_USED_HIGH => {
                if let Err(fault) = self.write_queue(mem, offset, value) {
                    self.record_fault(fault);
                }
            }
            _ => {}
        }
        Request::Nothing
    }

    /// Features can be chosen until FEATURES_OK (§3.1.1).
    fn write_driver_features(&mut self, value: u32) {
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// §2.1: the driver sets bits and clears none; FEATURES_OK stays only if the features are a
    /// subset of the offered ones with VERSION_1; DRIVER_OK only after it; DEVICE_NEEDS_RESET
    /// is the device's.
    fn write_status(&mut self, value: u32) -> Request {
        if value == 0 {
            self.reset();
            return Request::Reset;
        }
        let mut status = self.status | value & STATUS_BITS & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if !self.features_acceptable() {
            status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            status &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status = status;
        Request::Nothing
    }

    /// Everything but the count of faults and the configuration's generation starts over.
    pub(crate) fn reset(&mut self) {
        self.status = 0;
        self.interrupt_status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(QueueT::reset);
    }

    fn on_notify(&mut self, queue: u32) -> Request {
        if self.has_status(VIRTIO_CONFIG_S_NEEDS_RESET) {
            return Request::Nothing;
        }
        match u16::try_from(queue) {
            Ok(index) if self.is_live(index) => Request::Notify(index),
            _ => {
                self.record_fault(GuestFault::QueueNotReady { queue });
                Request::Nothing
            }
        }
    }

    fn write_queue<M: GuestMemory>(
        &mut self,
        mem: &M,
        offset: u32,
        value: u32,
    ) -> Result<(), GuestFault> {
        let event_idx = self.has_feature(VIRTIO_RING_F_EVENT_IDX);
        let features_ok = self.has_status(VIRTIO_CONFIG_S_FEATURES_OK);
        let number = self.queue_select as u16;
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return Ok(());
        };
        if offset == VIRTIO_MMIO_QUEUE_READY && value == 0 {
            queue.reset();
            return Ok(());
        }
        if !features_ok || queue.ready() {
            return Ok(());
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => set_size(queue, number, value),
            VIRTIO_MMIO_QUEUE_READY => {
                queue.set_event_idx(event_idx);
                queue.set_ready(true);
                if queue.is_valid(mem) {
                    Ok(())
                } else {
                    queue.reset();
                    Err(GuestFault::QueueOutsideMemory { queue: number })
                }
            }
            _ => set_ring_address(queue, number, offset, value),
        }
    }
}

#[cfg(test)]
mod tests;
