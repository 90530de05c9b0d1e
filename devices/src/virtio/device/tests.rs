//! A device with nothing of its own, to see what every device gets.

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::queue::next_chain;

const DESC_TABLE: u64 = 0x1000;
const AVAIL_RING: u64 = 0x2000;
const USED_RING: u64 = 0x3000;
const DESC_WRITE: u16 = 2;
const FEATURE: u64 = 1 << 3;

/// Gives back each buffer with one byte in it.
struct Tiny {
    transport: Transport,
    notified: Vec<u16>,
    resets: u32,
    stops: u32,
}

struct TinyState;

impl TryFrom<TinyState> for Tiny {
    type Error = InvalidState;

    fn try_from(_: TinyState) -> Result<Tiny, InvalidState> {
        Ok(Tiny { transport: Tiny::new_transport(), notified: vec![], resets: 0, stops: 0 })
    }
}

impl VirtioDevice for Tiny {
    type State = TinyState;

    const ID: u32 = 42;
    const FEATURES: u64 = FEATURE;
    const QUEUE_COUNT: usize = 1;

    fn transport(&self) -> &Transport {
        &self.transport
    }

    fn transport_mut(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES_MAX] {
        let mut config = [0; CONFIG_BYTES_MAX];
        config[..2].copy_from_slice(b"ok");
        config
    }

    fn on_notify<M: GuestMemory>(
        &mut self,
        mem: &M,
        queue: u16,
        _outputs: &mut Vec<Output>,
    ) -> Result<(), GuestFault> {
        self.notified.push(queue);
        while let Some(chain) = next_chain(self.transport.queue(queue), queue, mem)? {
            let head = chain.head();
            chain.write(b"!")?;
            self.transport.complete(mem, queue, head, 1)?;
        }
        Ok(())
    }

    fn on_reset(&mut self) {
        self.resets += 1;
    }

    fn on_stopped(&mut self) {
        self.stops += 1;
    }

    fn save(&self) -> TinyState {
        TinyState
    }
}

fn write(tiny: &mut Tiny, mem: &GuestMemoryMmap, offset: u32, value: u32) -> bool {
    OnBus::write(tiny, mem, offset, &value.to_le_bytes(), &mut vec![])
}

fn read(tiny: &Tiny, offset: u32) -> u32 {
    let mut data = [0; 4];
    OnBus::<GuestMemoryMmap>::read(tiny, offset, &mut data);
    u32::from_le_bytes(data)
}

/// The device with its driver up and one buffer of four bytes at `buffer` made available.
fn up(buffer: u64) -> (Tiny, GuestMemoryMmap) {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut tiny = Tiny::try_from(TinyState).unwrap();
    for (offset, value) in [
        (VIRTIO_MMIO_STATUS, 0x03),
        (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        (VIRTIO_MMIO_DRIVER_FEATURES, 1),
        (VIRTIO_MMIO_STATUS, 0x0b),
        (VIRTIO_MMIO_QUEUE_NUM, 16),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, DESC_TABLE as u32),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL_RING as u32),
        (VIRTIO_MMIO_QUEUE_USED_LOW, USED_RING as u32),
        (VIRTIO_MMIO_QUEUE_READY, 1),
        (VIRTIO_MMIO_STATUS, 0x0f),
    ] {
        assert!(!write(&mut tiny, &mem, offset, value));
    }
    mem.write_obj(buffer, GuestAddress(DESC_TABLE)).unwrap();
    mem.write_obj(4u32, GuestAddress(DESC_TABLE + 8)).unwrap();
    mem.write_obj(DESC_WRITE, GuestAddress(DESC_TABLE + 12)).unwrap();
    mem.write_obj(1u16, GuestAddress(AVAIL_RING + 2)).unwrap();
    tiny.stops = 0;
    (tiny, mem)
}

#[test]
fn registers_are_the_transports_and_the_configuration_is_the_devices() {
    let (tiny, _) = up(0x5000);
    assert_eq!(read(&tiny, VIRTIO_MMIO_DEVICE_ID), Tiny::ID);
    assert_eq!(u64::from(read(&tiny, VIRTIO_MMIO_DEVICE_FEATURES)) & FEATURE, FEATURE);
    assert_eq!(read(&tiny, VIRTIO_MMIO_CONFIG), u32::from_le_bytes(*b"ok\0\0"));
    let mut end = [0xee; 2];
    let last = VIRTIO_MMIO_CONFIG + CONFIG_BYTES_MAX as u32 - 1;
    OnBus::<GuestMemoryMmap>::read(&tiny, last, &mut end);
    assert_eq!(end, [0, 0], "zero where the configuration ends");
}

#[test]
fn a_notified_queue_is_served_and_its_driver_interrupted_until_it_acknowledges() {
    let (mut tiny, mem) = up(0x5000);
    assert!(!write(&mut tiny, &mem, VIRTIO_MMIO_QUEUE_NOTIFY, 0));
    assert_eq!(tiny.notified, [0]);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), b'!');
    assert_eq!(mem.read_obj::<u16>(GuestAddress(USED_RING + 2)).unwrap(), 1);
    assert_eq!(mem.read_obj::<u32>(GuestAddress(USED_RING + 8)).unwrap(), 1, "bytes written");
    assert!(tiny.transport.interrupt_line());
    assert!(write(&mut tiny, &mem, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING));
    assert!(!tiny.transport.interrupt_line());
    assert_eq!((tiny.stops, tiny.transport.faults().count), (0, 0));
}

#[test]
fn a_fault_is_recorded_once_and_stops_the_device() {
    let (mut tiny, mem) = up(0xffff_0000);
    write(&mut tiny, &mem, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    let faults = tiny.transport.faults();
    assert_eq!(faults.count, 1);
    assert!(matches!(faults.first, Some(GuestFault::BufferOutsideMemory { .. })));
    let needs_reset = read(&tiny, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET;
    assert_eq!((tiny.stops, needs_reset), (1, VIRTIO_CONFIG_S_NEEDS_RESET));
    write(&mut tiny, &mem, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(tiny.notified, [0], "a stopped device is not notified");
}

#[test]
fn a_reset_is_the_drivers_and_power_on_the_machines() {
    let (mut tiny, mem) = up(0x5000);
    write(&mut tiny, &mem, VIRTIO_MMIO_STATUS, 0);
    assert_eq!((tiny.resets, tiny.stops), (1, 1));
    let (mut tiny, _) = up(0x5000);
    tiny.power_on();
    assert_eq!((tiny.resets, tiny.stops, read(&tiny, VIRTIO_MMIO_STATUS)), (0, 1, 0));
}

#[test]
fn what_is_no_register_does_nothing() {
    let (mut tiny, mem) = up(0x5000);
    let status = read(&tiny, VIRTIO_MMIO_STATUS);
    for (offset, data) in [
        (VIRTIO_MMIO_STATUS, &[0; 2][..]),
        (VIRTIO_MMIO_STATUS + 2, &[0; 4]),
        (VIRTIO_MMIO_CONFIG, &[0; 4]),
        (VIRTIO_MMIO_INTERRUPT_ACK, &[1]),
    ] {
        assert!(!OnBus::write(&mut tiny, &mem, offset, data, &mut vec![]));
    }
    assert_eq!((read(&tiny, VIRTIO_MMIO_STATUS), tiny.resets), (status, 0));
}
