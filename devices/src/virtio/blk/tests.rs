//! What is refused when a disk is restored; what it does is in `tests/virtio_blk.rs`.

use super::*;

const SECTORS: u64 = 64;

fn request(id: u64) -> InFlight {
    InFlight { id, head: 0, read_bytes: 0, data_bytes: 512, writable: vec![] }
}

fn refused(change: fn(&mut VirtioBlkState)) -> &'static str {
    let mut state = VirtioBlk::new(SECTORS * SECTOR_BYTES).save();
    state.in_flight = vec![request(1), request(3)];
    state.last_id = 3;
    assert_eq!(VirtioBlk::try_from(state.clone()).unwrap().save(), state);
    change(&mut state);
    VirtioBlk::try_from(state).unwrap_err().field
}

#[test]
fn impossible_requests_are_refused() {
    for (change, field) in [
        (
            (|state| state.capacity_sectors = u64::MAX) as fn(&mut VirtioBlkState),
            "virtio_blk.capacity_sectors",
        ),
        (|state| state.in_flight = vec![request(1); IN_FLIGHT_MAX + 1], "virtio_blk.in_flight"),
        (|state| state.in_flight.reverse(), "virtio_blk.in_flight.id"),
        (|state| state.in_flight[0].id = 0, "virtio_blk.in_flight.id"),
        (|state| state.last_id = 2, "virtio_blk.last_id"),
        (
            |state| state.in_flight[0].data_bytes = DATA_BYTES_MAX as u32 + 1,
            "virtio_blk.in_flight.data_bytes",
        ),
        (
            |state| state.in_flight[0].writable = vec![Segment::default()],
            "virtio_blk.in_flight.live",
        ),
        (
            |state| state.in_flight[0].writable = vec![Segment::default(); 257],
            "virtio_blk.in_flight.writable",
        ),
    ] {
        assert_eq!(refused(change), field);
    }
}

#[test]
fn power_on_forgets_who_waits_but_not_what_the_host_works_on() {
    let mut disk = VirtioBlk::new(SECTORS * SECTOR_BYTES);
    let waiting = InFlight { writable: vec![Segment::default()], ..request(1) };
    (disk.in_flight, disk.last_id) = (vec![waiting], 1);
    disk.power_on();
    assert_eq!((disk.in_flight, disk.last_id), (vec![request(1)], 1));
}
