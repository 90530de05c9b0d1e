//! The network card as a driver meets it: set-up, both directions, interrupts. What a broken driver
//! gets is in `virtio_net_faults.rs`.

mod common;

use common::*;
use ftvmm_devices::{
    BoardConfig, DEFAULT_MTU, FLOATING_BUS, RX_BACKLOG_FRAMES_MAX, VIRTIO_BLK_SLOT,
    VIRTIO_ENTROPY_SLOT, VIRTIO_NET_SLOT, rx_frame_bytes_max, virtio_slots,
};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn registers_after_reset() {
    let mut driver = Driver::new();
    for (offset, value) in [
        (0x000, 0x7472_6976),
        (0x004, 2),
        (0x008, 1),
        (0x034, 256),
        (0x044, 0),
        (0x060, 0),
        (0x070, 0),
        (0x0b0, u32::MAX),
        (0x0fc, 0),
        (0x100, 0x0000_0002),
        (0x104, 0x0001_0700),
        (0x108, u32::from(MTU) << 16),
        (0x10c, 0),
    ] {
        assert_eq!(driver.read(offset), value, "register {offset:#x}");
    }
    let mut features = 0;
    for select in 0..3 {
        driver.write(0x14, select);
        features |= u128::from(driver.read(0x10)) << (32 * select);
    }
    assert_eq!(features, u128::from(FEATURES | NEWER_FEATURES | EVENT_IDX));
    driver.write(0x30, 3);
    assert_eq!(driver.read(0x34), 0, "there is no fourth queue");
}

#[test]
fn configuration_takes_any_width_and_registers_only_their_own() {
    let mut driver = Driver::new();
    let Driver { board, mem, .. } = &mut driver;
    for (index, expected) in MAC.iter().enumerate() {
        let mut byte = [0];
        board.mmio_read(mem, VIRTIO_NET_SLOT.base + 0x100 + index as u64, &mut byte);
        assert_eq!(byte, [*expected]);
    }
    for (offset, width) in [(0, 1), (0, 2), (2, 4), (0, 8)] {
        let mut data = vec![0; width];
        board.mmio_read(mem, VIRTIO_NET_SLOT.base + offset, &mut data);
        assert_eq!(data, vec![FLOATING_BUS; width]);
        board.mmio_write(mem, VIRTIO_NET_SLOT.base + 0x70, &data[..width.min(2)]);
    }
    let mut data = [0; 4];
    board.mmio_read(mem, VIRTIO_NET_SLOT.base + VIRTIO_NET_SLOT.bytes - 2, &mut data);
    assert_eq!(data, [FLOATING_BUS; 4], "half outside");
    assert_eq!(driver.read(0x70), 0);
}

#[test]
fn features_are_accepted_only_from_the_offered_ones() {
    for (features, accepted) in [
        (FEATURES, true),
        (FEATURES | EVENT_IDX, true),
        (1 << 32, true),
        (FEATURES & !(1 << 32), false),
        (FEATURES | 1 << 15, false),
        (u64::MAX, false),
    ] {
        let mut driver = Driver::new();
        driver.negotiate(features);
        assert_eq!(driver.read(0x70) & STATUS_FEATURES_OK != 0, accepted, "{features:#x}");
        driver.write(0x70, 0x0f);
        assert_eq!(driver.read(0x70) & STATUS_DRIVER_OK != 0, accepted);
    }
}

#[test]
fn transmitting_happens_inside_the_notification() {
    for features in [FEATURES, FEATURES | EVENT_IDX] {
        let mut driver = Driver::up(features);
        let mut sent = Vec::new();
        for round in 0..600u16 {
            let frame = frame(round as u8, 60 + usize::from(round));
            driver.send(&frame);
            assert_eq!(driver.take_used(TX), [(u32::from(round % QUEUE_SIZE), 0)]);
            sent.push(frame);
        }
        assert_eq!(driver.take_frames(), sent);
        assert_eq!(driver.board.net_counters().tx_frames, 600);
    }
}

#[test]
fn a_large_segment_is_gathered_from_its_pages() {
    let mut driver = Driver::up(FEATURES | EVENT_IDX);
    let mut frame = frame(3, 65_549);
    frame[..12].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
    let mut rest = &frame[..];
    for (index, length) in (0..).zip([66, 4096, 4096].into_iter().chain([8192; 7])) {
        let (part, after) = rest.split_at(length.min(rest.len()));
        let address = 0x30_0000 + 0x2000 * u64::from(index);
        driver.mem.write_slice(part, GuestAddress(address)).unwrap();
        let flags = if after.is_empty() { 0 } else { DESC_NEXT };
        driver.set_descriptor(TX, index, (address, part.len() as u32, flags, index + 1));
        rest = after;
    }
    assert!(rest.is_empty());
    driver.make_available(TX, 0);
    driver.notify(TX);
    assert_eq!(driver.take_frames(), [frame]);
    assert_eq!(driver.board.guest_faults().count, 0);
}

#[test]
fn received_frames_fill_the_buffers_in_order() {
    for features in [FEATURES, FEATURES | EVENT_IDX] {
        let mut driver = Driver::up(features);
        assert!(driver.board.network_ready());
        for round in 0..600u16 {
            driver.add_receive_buffers(1);
            let length = 60 + usize::from(round) % 1400;
            let arrived = frame(round as u8, length);
            driver.arrive(arrived.clone());
            let head = round % QUEUE_SIZE;
            assert_eq!(driver.take_used(RX), [(u32::from(head), 12 + length as u32)]);
            assert_eq!(driver.bytes(buffer(RX, head), 12 + length), as_received(arrived));
        }
        assert_eq!(driver.board.net_counters().rx_frames, 600);
    }
}

#[test]
fn a_frame_may_be_spread_over_a_chain() {
    let mut driver = Driver::up(FEATURES);
    driver.set_descriptor(RX, 5, (buffer(RX, 5), 12, DESC_WRITE | DESC_NEXT, 9));
    driver.set_descriptor(RX, 9, (buffer(RX, 9), 100, DESC_WRITE | DESC_NEXT, 2));
    driver.set_descriptor(RX, 2, (buffer(RX, 2), 1400, DESC_WRITE, 0));
    driver.make_available(RX, 5);
    let arrived = frame(1, 300);
    driver.arrive(arrived.clone());
    assert_eq!(driver.take_used(RX), [(5, 312)]);
    let mut seen = driver.bytes(buffer(RX, 5), 12);
    seen.extend(driver.bytes(buffer(RX, 9), 100));
    seen.extend(driver.bytes(buffer(RX, 2), 200));
    assert_eq!(seen, as_received(arrived));
}

#[test]
fn frames_wait_for_buffers_and_are_dropped_when_too_many_wait() {
    for features in [FEATURES, FEATURES | EVENT_IDX] {
        let mut driver = Driver::up(features);
        driver.add_receive_buffers(2);
        for tag in 0..RX_BACKLOG_FRAMES_MAX + 5 {
            driver.arrive(frame(tag as u8, 60));
        }
        assert_eq!(driver.take_used(RX).len(), 2);
        assert_eq!(driver.board.net_counters().rx_dropped_backlog_full, 3);
        assert!(!driver.board.network_ready());
        if features & EVENT_IDX != 0 {
            assert_eq!(driver.avail_event(RX), 2, "the card asks to hear of the next buffer");
        }
        driver.add_receive_buffers(100);
        driver.notify(RX);
        assert_eq!(driver.take_used(RX).len(), 100);
        assert!(!driver.board.network_ready());
        driver.add_receive_buffers(254);
        driver.notify(RX);
        assert_eq!(driver.take_used(RX).len(), RX_BACKLOG_FRAMES_MAX - 100);
        assert!(driver.board.network_ready());
        let newest = as_received(frame(257u16 as u8, 60));
        assert_eq!(driver.bytes(buffer(RX, 1), 72), newest);
    }
}

#[test]
fn frames_for_a_driver_that_is_not_up_are_dropped() {
    let mut driver = Driver::new();
    driver.arrive(frame(0, 60));
    assert!(!driver.board.network_ready());
    assert_eq!(driver.board.net_counters().rx_dropped_not_ready, 1);
    let mut driver = Driver::up(FEATURES);
    driver.arrive(frame(0, 60));
    assert!(!driver.board.network_ready());
    driver.write(0x70, 0);
    assert_eq!(driver.board.net_counters().rx_dropped_not_ready, 1);
    assert_eq!(driver.read(0x70), 0);
}

#[test]
fn frames_the_host_should_not_have_sent_are_refused() {
    let mut driver = Driver::up(FEATURES);
    driver.add_receive_buffers(4);
    let mut segment = frame(0, 60);
    segment[1] = 1;
    for refused in [vec![], frame(0, 13), frame(0, rx_frame_bytes_max(DEFAULT_MTU) - 11), segment] {
        driver.arrive(refused);
    }
    assert_eq!(driver.take_used(RX), []);
    assert_eq!(driver.board.net_counters().rx_refused, 4);
    driver.arrive(frame(0, rx_frame_bytes_max(DEFAULT_MTU) - 12));
    assert_eq!(driver.take_used(RX).len(), 1);
}

#[test]
fn no_event_is_lost_between_status_acknowledge_and_callback() {
    let mut driver = Driver::up(FEATURES);
    init_pic(&mut driver.board);
    driver.add_receive_buffers(8);
    driver.arrive(frame(0, 60));
    assert_eq!(driver.board.acknowledge_interrupt(), Some(0x35));
    driver.board.pio_write(0x20, &[0x65]);
    // A frame before vm_interrupt() reads the status, one before it acknowledges, one after.
    driver.arrive(frame(1, 60));
    assert_eq!(driver.read(0x60), 1);
    driver.arrive(frame(2, 60));
    driver.write(0x64, 1);
    assert_eq!(driver.take_used(RX).len(), 3, "the callback sees what the acknowledge swallowed");
    assert!(!driver.board.interrupt_pending());
    driver.arrive(frame(3, 60));
    assert_eq!(driver.board.acknowledge_interrupt(), Some(0x35));
    driver.board.pio_write(0x20, &[0x65]);
    assert_eq!(driver.take_used(RX).len(), 1);
}

#[test]
fn a_cause_left_after_an_acknowledge_is_a_new_edge() {
    let mut driver = Driver::up(FEATURES);
    init_pic(&mut driver.board);
    driver.add_receive_buffers(8);
    driver.arrive(frame(0, 60));
    assert_eq!(driver.board.acknowledge_interrupt(), Some(0x35));
    driver.board.pio_write(0x20, &[0x65]);
    let status = driver.read(0x60);
    driver.notify(7); // a fault: a configuration interrupt joins
    driver.write(0x64, status);
    assert_eq!(driver.read(0x60), 2);
    assert_eq!(driver.board.acknowledge_interrupt(), Some(0x35));
}

#[test]
fn interrupts_come_when_the_driver_asked_for_them() {
    let mut driver = Driver::up(FEATURES | EVENT_IDX);
    driver.add_receive_buffers(8);
    driver.set_used_event(RX, 2);
    for (tag, expected) in [(0, 0), (1, 0), (2, 1), (3, 0)] {
        driver.arrive(frame(tag, 60));
        let status = driver.read(0x60);
        assert_eq!(status, expected, "frame {tag}");
        driver.write(0x64, status);
    }
}

#[test]
fn the_next_frame_to_transmit_is_asked_for() {
    let mut driver = Driver::up(FEATURES | EVENT_IDX);
    for sent in 1..=5 {
        driver.send(&frame(0, 60));
        assert_eq!(driver.avail_event(TX), sent);
    }
}

#[test]
fn a_ready_queue_keeps_its_registers() {
    let mut driver = Driver::up(FEATURES);
    driver.write(0x30, TX);
    for offset in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        driver.write(offset, 0x7fff_ffff);
    }
    driver.send(&frame(0, 60));
    assert_eq!(driver.take_frames().len(), 1);
}

#[test]
fn a_slot_is_there_when_its_card_is() {
    let config = BoardConfig { rtc_epoch_s: 0, net: Some(NET), disk_bytes: Some(512) };
    assert_eq!(virtio_slots(&config), [VIRTIO_NET_SLOT, VIRTIO_ENTROPY_SLOT, VIRTIO_BLK_SLOT]);
    assert_eq!(
        virtio_slots(&BoardConfig { net: None, disk_bytes: None, ..config }),
        [VIRTIO_ENTROPY_SLOT]
    );
}
