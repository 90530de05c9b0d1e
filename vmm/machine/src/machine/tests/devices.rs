//! What the guest sends: the digests of its outputs, and what others see of its network.

use std::sync::Arc;

use ftvmm_devices::{DiskOp, DiskRequest, Input, Output, VIRTIO_NET_SLOT};
use ftvmm_replication::state::pack;
use ftvmm_replication::{EndReason, Ordinal, OutputDigest, StatePart};
use vm_memory::{Bytes, GuestAddress};

use crate::exit::{Direction, Exit};
use crate::net_watch::NetWatch;
use crate::tests::Guest;
use crate::virtual_machine::VirtualMachine;

/// Where the rings of the card's queues lie, and a frame.
const RINGS: u64 = 0x10_0000;
const FRAME: u64 = 0x18_0000;

/// A driver as small as one can be brings the card up with both queues.
fn bring_card_up(guest: &mut Guest) {
    let base = VIRTIO_NET_SLOT.base;
    // Reset, ACKNOWLEDGE, DRIVER; VERSION_1; FEATURES_OK.
    let start = [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 0xb)];
    for (offset, value) in start {
        guest.mmio_out(base + offset, value);
    }
    for queue in 0..2 {
        let at = rings(queue) as u32;
        for (offset, value) in [
            (0x30, queue),
            (0x38, 8),
            (0x80, at),
            (0x84, 0),
            (0x90, at + 0x1000),
            (0x94, 0),
            (0xa0, at + 0x2000),
            (0xa4, 0),
            (0x44, 1),
        ] {
            guest.mmio_out(base + offset, value);
        }
    }
    guest.mmio_out(base + 0x70, 0xf);
}

fn rings(queue: u32) -> u64 {
    RINGS + 0x1_0000 * u64::from(queue)
}

/// Makes one buffer available to `queue` and notifies the card.
fn give(guest: &mut Guest, queue: u32, number: u16, bytes: u32, flags: u16) {
    let (at, put) = (rings(queue), |at: u64, bytes: &[u8]| {
        guest.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    });
    put(at, &FRAME.to_le_bytes());
    put(at + 8, &bytes.to_le_bytes());
    put(at + 12, &flags.to_le_bytes());
    put(at + 0x1004 + 2 * u64::from(number), &[0, 0]);
    put(at + 0x1002, &(number + 1).to_le_bytes());
    guest.mmio_out(VIRTIO_NET_SLOT.base + 0x50, queue);
}

/// Sends a frame from `mac`.
fn send(guest: &mut Guest, number: u16, mac: u8) {
    let mut frame = vec![0; 12 + 60];
    frame[12 + 6..12 + 12].copy_from_slice(&[2, 0, 0, 0, 0, mac]);
    guest.memory.write_slice(&frame, GuestAddress(FRAME)).unwrap();
    give(guest, 1, number, frame.len() as u32, 0);
}

#[test]
fn what_the_guest_sends_is_seen_by_others_as_soon_as_it_is_sent() {
    let mut guest = Guest::new();
    let watch = Arc::new(NetWatch::default());
    guest.machine.show_network(watch.clone());
    bring_card_up(&mut guest);
    assert_eq!((watch.report().tx_frames, watch.sources().iter().count()), (0, 0));
    let situation = guest.machine.situation(Ordinal(1), super::port_read(0x64)).unwrap();
    assert!(situation.booting && !situation.takes_interrupt);
    send(&mut guest, 0, 1);
    send(&mut guest, 1, 9);
    assert_eq!((watch.report().tx_frames, watch.report().sources), (2, 2));
    let outputs = guest.machine.take_outputs();
    assert!(matches!(&outputs[..], [Output::Frame(_), Output::Frame(frame)] if frame[23] == 9));
    let situation = guest.machine.situation(Ordinal(1), super::port_read(0x64)).unwrap();
    assert!(!situation.booting, "somebody has heard of it");
}

#[test]
fn a_frame_the_guest_receives_is_counted_at_once() {
    let mut guest = Guest::new();
    let watch = Arc::new(NetWatch::default());
    guest.machine.show_network(watch.clone());
    guest.machine.apply(Input::NetRx { frame: vec![0; 72] });
    assert_eq!(watch.report().rx_dropped_not_ready, 1);
    bring_card_up(&mut guest);
    give(&mut guest, 0, 0, 2000, 2);
    let takes = guest.machine.situation(Ordinal(1), super::port_read(0x64)).unwrap();
    assert!(takes.takes_frames);
    guest.machine.apply(Input::NetRx { frame: vec![0; 72] });
    assert_eq!(watch.report().rx_frames, 1);
    assert_eq!(guest.machine.inputs(), 2);
}

#[test]
fn a_frame_has_a_digest_of_its_own_and_every_output_is_in_the_end() {
    let frame = Output::Frame(vec![1, 2]);
    let console = Output::Console(b"hello".to_vec());
    let disk = Output::Disk(DiskRequest { id: 1, op: DiskOp::Flush });
    let ends = |outputs: &[&Output]| {
        let mut guest = Guest::new();
        let digests: Vec<_> = outputs
            .iter()
            .filter_map(|output| guest.machine.digest_output(Ordinal(5), output))
            .collect();
        let end = guest.machine.end(EndReason::Reset).unwrap();
        (end.chain, end.outputs, digests)
    };
    let nothing = ends(&[]);
    let (chain, outputs, digests) = ends(&[&frame]);
    assert_eq!(digests, [OutputDigest::of(Ordinal(5), nothing.0, &[1, 2])]);
    assert!(chain == nothing.0 && outputs != nothing.1);
    let (chain, outputs, digests) = ends(&[&console]);
    assert!(chain == nothing.0 && outputs != nothing.1 && digests.is_empty());
    // A request to the disk is compared like an exit: the answer follows from it.
    let (chain, outputs, digests) = ends(&[&disk]);
    assert!(chain != nothing.0 && outputs != nothing.1 && digests.is_empty());
}

#[test]
fn a_frame_of_a_guest_without_a_log_is_not_read_again() {
    let mut guest = Guest::without_log();
    let before = guest.machine.end(EndReason::Reset).unwrap().outputs;
    assert_eq!(guest.machine.digest_output(Ordinal(5), &Output::Frame(vec![1])), None);
    assert_eq!(guest.machine.end(EndReason::Reset).unwrap().outputs, before);
}

#[test]
fn the_devices_wishes_are_in_the_situation() {
    let mut guest = Guest::new();
    let at = |guest: &mut Guest| guest.machine.situation(Ordinal(1), super::port_read(0x64));
    let situation = at(&mut guest).unwrap();
    assert!(!situation.hears_power_button && situation.entropy_wanted_bytes == 0);
    // PWRBTN_EN.
    let exit = Exit::Pio { port: 0x602, direction: Direction::Write, size_bytes: 2, count: 1 };
    guest.exit_with(exit, &0x100u16.to_le_bytes());
    assert!(at(&mut guest).unwrap().hears_power_button);
    assert_eq!(guest.machine.board().disk_counters().reads, 0);
    assert!(Arc::strong_count(&guest.machine.memory_copy().unwrap()) == 2);
    assert_eq!(guest.machine.memory().as_ref() as *const _, std::rc::Rc::as_ptr(&guest.memory));
}

#[test]
fn where_a_guest_sends_from_is_known_where_it_goes_on() {
    let (mut from, mut to) = (Guest::new(), Guest::new());
    bring_card_up(&mut from);
    send(&mut from, 0, 9);
    let watch = Arc::new(NetWatch::default());
    to.machine.show_network(watch.clone());
    let at = from.at();
    let state = from.machine.save(at, Exit::Hlt).unwrap().unwrap();
    let copy = from.machine.memory_copy().unwrap();
    copy.begin_transfer();
    let pages = copy.take_unsent(usize::MAX);
    let packed = pack(pages.iter().map(|(page, content)| (*page, content.as_slice())));
    to.machine.restore(&StatePart::Outline { total_bytes: 1 }).unwrap();
    to.machine.restore(&StatePart::Pages(packed)).unwrap();
    assert_eq!(watch.report().tx_frames, 0);
    to.machine.restore(&StatePart::Machine(state.encode())).unwrap();
    assert_eq!((watch.report().tx_frames, watch.report().sources), (1, 1));
    // A reset of the machine takes nothing of it away.
    to.machine.restart(at).unwrap();
    assert_eq!((watch.report().tx_frames, watch.report().sources), (1, 1));
}
