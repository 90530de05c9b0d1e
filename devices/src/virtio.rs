//! The virtio devices of a board: one table, which the memory-mapped bus, the interrupt lines, the
//! saved state and the ACPI tables follow.
//!
//! A new device touches two places: its own file, which implements [`VirtioDevice`], and this one,
//! with its `mod` line and its row of `virtio_table!`. A new row changes the encoding of
//! [`VirtioState`], and with it the version of the machine's state. Only what is the device's alone
//! is elsewhere: a part of [`BoardConfig`] if boards may lack it, an [`crate::Input`] and its arm
//! in [`crate::Board::apply`] if facts from outside reach it.

pub(crate) mod blk;
mod device;
mod entropy;
pub(crate) mod net;
mod queue;
mod slot;
mod transport;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemory;

use self::blk::VirtioBlk;
use self::device::OnBus;
pub(crate) use self::device::VirtioDevice;
use self::entropy::VirtioEntropy;
use self::net::VirtioNet;
pub use self::slot::VirtioSlot;
use self::transport::Transport;
use crate::config::BoardConfig;
use crate::fault::GuestFaults;
use crate::state::InvalidState;

/// Length of a device's registers.
const SLOT_BYTES: u64 = 0x1000;

/// Makes of the table what must have a part for each device: a row is
/// `field: type = (build from the configuration) in SLOT at (address, interrupt request);`.
/// The type is a device, or an `Option` of one that boards may lack.
macro_rules! virtio_table {
    ($(
        $(#[$doc:meta])*
        $name:ident: $seat:ty = ($build:expr) in $slot:ident at ($base:expr, $irq:expr);
    )*) => {
        $($(#[$doc])*
        pub const $slot: VirtioSlot = VirtioSlot { base: $base, bytes: SLOT_BYTES, irq: $irq };)*

        /// The virtio devices of a board.
        #[derive(Debug)]
        pub(crate) struct VirtioDevices {
            $(pub(crate) $name: $seat,)*
        }

        /// What the virtio devices remember; plain data, checked when it becomes the devices again.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub struct VirtioState {
            $($name: <$seat as Seat>::State,)*
        }

        impl VirtioDevices {
            pub(crate) fn new(config: &BoardConfig) -> Self {
                VirtioDevices { $($name: $build(config),)* }
            }

            pub(crate) fn save(&self) -> VirtioState {
                VirtioState { $($name: Seat::save(&self.$name),)* }
            }

            pub(crate) fn restore(state: VirtioState) -> Result<Self, InvalidState> {
                Ok(VirtioDevices { $($name: Seat::restore(state.$name)?,)* })
            }

            /// The devices as at power-on; their counters go on.
            pub(crate) fn power_on(&mut self) {
                $(if let Some(device) = self.$name.device_mut() {
                    device.power_on();
                })*
            }

            /// The devices that are there, in the order of their addresses.
            pub(crate) fn transports(&self) -> impl Iterator<Item = (VirtioSlot, &Transport)> {
                let seats = [$(self.$name.device().map(|device| ($slot, device.transport())),)*];
                seats.into_iter().flatten()
            }

            fn on_bus<'a, M: GuestMemory + 'a>(
                &'a mut self,
            ) -> impl Iterator<Item = (VirtioSlot, &'a mut dyn OnBus<M>)> {
                let seats = [
                    $(self.$name.device_mut().map(|device| ($slot, device as &mut dyn OnBus<M>)),)*
                ];
                seats.into_iter().flatten()
            }
        }
    };
}

virtio_table! {
    /// The network card's place.
    net: Option<VirtioNet> = (|board: &BoardConfig| board.net.map(VirtioNet::new))
        in VIRTIO_NET_SLOT at (0xd000_0000, 5);
    /// The entropy source's place.
    entropy: VirtioEntropy = (|_| VirtioEntropy::new())
        in VIRTIO_ENTROPY_SLOT at (0xd000_1000, 10);
    /// The disk's place.
    disk: Option<VirtioBlk> = (|board: &BoardConfig| board.disk_bytes.map(VirtioBlk::new))
        in VIRTIO_BLK_SLOT at (0xd000_2000, 11);
}

impl VirtioDevices {
    /// The device whose registers an access lies in, its place, and the access's offset there.
    pub(crate) fn at<'a, M: GuestMemory + 'a>(
        &'a mut self,
        addr: u64,
        length: usize,
    ) -> Option<(VirtioSlot, u32, &'a mut dyn OnBus<M>)> {
        self.on_bus().find_map(|(slot, device)| Some((slot, slot.offset(addr, length)?, device)))
    }

    /// What the drivers have done wrong so far.
    pub(crate) fn faults(&self) -> GuestFaults {
        self.transports()
            .fold(GuestFaults::default(), |faults, (_, transport)| faults.and(*transport.faults()))
    }
}

/// Where the virtio devices of a board lie, in the order of their addresses.
pub fn virtio_slots(config: &BoardConfig) -> Vec<VirtioSlot> {
    VirtioDevices::new(config).transports().map(|(slot, _)| slot).collect()
}

/// What a row of the table holds: a device, or an `Option` of one.
trait Seat: Sized {
    type Device: VirtioDevice;
    type State;

    fn device(&self) -> Option<&Self::Device>;
    fn device_mut(&mut self) -> Option<&mut Self::Device>;
    fn save(&self) -> Self::State;
    fn restore(state: Self::State) -> Result<Self, InvalidState>;
}

impl<D: VirtioDevice> Seat for D {
    type Device = D;
    type State = D::State;

    fn device(&self) -> Option<&D> {
        Some(self)
    }

    fn device_mut(&mut self) -> Option<&mut D> {
        Some(self)
    }

    fn save(&self) -> D::State {
        VirtioDevice::save(self)
    }

    fn restore(state: D::State) -> Result<D, InvalidState> {
        state.try_into()
    }
}

impl<D: VirtioDevice> Seat for Option<D> {
    type Device = D;
    type State = Option<D::State>;

    fn device(&self) -> Option<&D> {
        self.as_ref()
    }

    fn device_mut(&mut self) -> Option<&mut D> {
        self.as_mut()
    }

    fn save(&self) -> Option<D::State> {
        self.as_ref().map(D::save)
    }

    fn restore(state: Option<D::State>) -> Result<Self, InvalidState> {
        state.map(TryInto::try_into).transpose()
    }
}

#[cfg(test)]
mod tests;
