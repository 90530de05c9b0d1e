//! Commands as a driver puts them into the control queue.

use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::VirtioNet;

const COMMAND: u64 = 0x5000;
const ANSWER: u64 = 0x6000;

/// Sends `command` with room for `answer_bytes`; how often the driver has announced, and the
/// answer.
fn send(command: &[u8], answer_bytes: u32, may: bool) -> Result<(u64, u8), GuestFault> {
    let mem: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    mem.write_slice(command, GuestAddress(COMMAND)).unwrap();
    for (at, (address, length, flags)) in
        [(0x1000, (COMMAND, command.len() as u32, 1u16)), (0x1010, (ANSWER, answer_bytes, 2))]
    {
        mem.write_obj(address, GuestAddress(at)).unwrap();
        mem.write_obj(length, GuestAddress(at + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj(1u16, GuestAddress(at + 14)).unwrap();
    }
    mem.write_obj(1u16, GuestAddress(0x2002)).unwrap();
    mem.write_obj(0xeeu8, GuestAddress(ANSWER)).unwrap();
    let mut transport = VirtioNet::new_transport();
    *transport.queue(CONTROL_QUEUE) = Queue::try_from(QueueState {
        max_size: 16,
        size: 16,
        ready: true,
        desc_table: 0x1000,
        avail_ring: 0x2000,
        used_ring: 0x3000,
        ..QueueState::default()
    })
    .unwrap();
    let announced = serve(&mut transport, &mem, may)?;
    assert_eq!(mem.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 1, "the buffers are used");
    Ok((announced, mem.read_obj(GuestAddress(ANSWER)).unwrap()))
}

#[test]
fn the_word_that_the_guest_is_announced_is_taken_if_it_may_be_said() {
    let (done, refused) = (VIRTIO_NET_OK as u8, VIRTIO_NET_ERR as u8);
    assert_eq!(send(&ANNOUNCE_ACK, 1, true), Ok((1, done)));
    assert_eq!(send(&ANNOUNCE_ACK, 1, false), Ok((0, refused)));
    assert_eq!(send(&[3, 1], 1, true), Ok((0, refused)));
    assert_eq!(send(&[3], 1, true), Ok((0, refused)));
}

#[test]
fn a_command_without_room_for_an_answer_is_a_fault() {
    let fault = GuestFault::EmptyBuffer { queue: CONTROL_QUEUE, head: 0 };
    assert_eq!(send(&ANNOUNCE_ACK, 0, true), Err(fault));
}
