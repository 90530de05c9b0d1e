//! What is refused when a transport is restored; what it does is in `tests/virtio_net.rs`.

use virtio_queue::QueueState;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;

fn transport() -> Transport {
    Transport::new(1, 1 << 5, 2)
}

/// Queue 0 ready, the driver up, a fault and an interrupt behind it.
fn busy() -> TransportState {
    let mem: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut transport = transport();
    for (offset, value) in [
        (VIRTIO_MMIO_STATUS, 0x03),
        (VIRTIO_MMIO_DRIVER_FEATURES, 1 << VIRTIO_RING_F_EVENT_IDX),
        (VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        (VIRTIO_MMIO_DRIVER_FEATURES, 1),
        (VIRTIO_MMIO_STATUS, 0x0b),
        (VIRTIO_MMIO_QUEUE_NUM, 16),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000),
        (VIRTIO_MMIO_QUEUE_READY, 1),
        (VIRTIO_MMIO_STATUS, 0x0f),
        (VIRTIO_MMIO_QUEUE_SEL, 1),
        (VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1),
    ] {
        assert_eq!(transport.write(&mem, offset, value), Request::Nothing);
    }
    assert!(transport.is_live(0) && !transport.is_live(1) && !transport.is_live(2));
    assert_eq!(transport.write(&mem, VIRTIO_MMIO_QUEUE_NOTIFY, 0), Request::Notify(0));
    transport.complete(&mem, 0, 3, 8).unwrap();
    transport.record_fault(GuestFault::QueueOutsideMemory { queue: 0 });
    transport.save()
}

#[test]
fn saved_state_round_trips_and_is_checked() {
    let state = busy();
    assert_eq!(transport().restore(state.clone()).unwrap().save(), state);
    let refused = |change: fn(&mut TransportState), field| {
        let mut bad = state.clone();
        change(&mut bad);
        assert_eq!(transport().restore(bad).unwrap_err().field, field);
    };
    refused(|state| state.queues.truncate(1), "virtio.queues");
    refused(|state| state.status |= 0x10, "virtio.status");
    refused(|state| state.status &= !VIRTIO_CONFIG_S_FEATURES_OK, "virtio.queue.ready");
    refused(|state| state.interrupt_status = 4, "virtio.interrupt_status");
    refused(|state| state.driver_features |= 1 << 63, "virtio.driver_features");
    refused(
        |state| state.driver_features &= !(1 << VIRTIO_RING_F_EVENT_IDX),
        "virtio.queue.event_idx_enabled",
    );
    let mut bad = transport().save();
    bad.status = VIRTIO_CONFIG_S_DRIVER_OK;
    assert_eq!(transport().restore(bad).unwrap_err().field, "virtio.status.driver_ok");
}

#[test]
fn impossible_queues_are_refused() {
    for change in [
        |queue: &mut QueueState| queue.size = 3,
        |queue: &mut QueueState| queue.size = 512,
        |queue: &mut QueueState| queue.desc_table |= 8,
        |queue: &mut QueueState| queue.avail_ring |= 1,
        |queue: &mut QueueState| queue.used_ring |= 2,
        |queue: &mut QueueState| queue.max_size = 3,
        |queue: &mut QueueState| queue.max_size = 512,
    ] {
        let mut state = busy();
        let queue = Queue::try_from(state.queues[0].clone()).unwrap();
        let mut raw = queue.state();
        change(&mut raw);
        state.queues[0] = VirtqueueState::from(raw);
        assert!(transport().restore(state).is_err(), "{raw:?}");
    }
}

#[test]
fn a_reset_forgets_all_but_the_faults() {
    let mem: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let mut restored = transport().restore(busy()).unwrap();
    assert_eq!(restored.write(&mem, VIRTIO_MMIO_STATUS, 0), Request::Reset);
    let faults = *restored.faults();
    assert_eq!(faults.count, 1);
    assert_eq!(restored.save(), TransportState { faults, ..transport().save() });
}

#[test]
fn the_driver_cannot_take_back_status_bits_or_ask_for_a_reset() {
    let mem: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let mut transport = transport();
    transport.write(&mem, VIRTIO_MMIO_STATUS, 0x03);
    transport.write(&mem, VIRTIO_MMIO_STATUS, 0xf0);
    assert_eq!(transport.read(VIRTIO_MMIO_STATUS), 0x83);
}
