//! The network card's control queue (virtio 1.2 §5.1.6.5), of which one command is served: the
//! driver's word that it has announced the guest (§5.1.6.5.4). What else a driver could ask for is
//! not offered, and refused.
//!
//! | bytes | who writes them | |
//! |-------|-----------------|---|
//! | class, command | the driver | 3, 0: VIRTIO_NET_CTRL_ANNOUNCE, …_ACK |
//! | data | the driver | none for this command; not looked at |
//! | ack | the device | 0: done, 1: refused |

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::QueueT;
use vm_memory::GuestMemory;

use crate::fault::GuestFault;
use crate::virtio::queue::{gather_front, next_chain, scatter, total_bytes};
use crate::virtio::transport::Transport;

/// The control queue of a card with one pair of queues (§5.1.2).
pub(crate) const CONTROL_QUEUE: u16 = 2;

const ANNOUNCE_ACK: [u8; 2] = [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8];

/// Serves the driver's commands, at most one queue length of them; how often it said that it has
/// announced the guest.
pub(crate) fn serve<M: GuestMemory>(
    transport: &mut Transport,
    mem: &M,
    may_announce: bool,
) -> Result<u64, GuestFault> {
    let mut announced = 0;
    for _ in 0..transport.queue(CONTROL_QUEUE).size() {
        let queue = transport.queue(CONTROL_QUEUE);
        let Some(chain) = next_chain(queue, CONTROL_QUEUE, mem)? else { break };
        let head = chain.head();
        let segments = chain.segments()?;
        if total_bytes(&segments.writable) == 0 {
            return Err(GuestFault::EmptyBuffer { queue: CONTROL_QUEUE, head });
        }
        let mut command = [0; 2];
        let length = gather_front(mem, CONTROL_QUEUE, &segments.readable, &mut command)?;
        let is_known = may_announce && length == command.len() && command == ANNOUNCE_ACK;
        let answer = if is_known { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        announced += u64::from(is_known);
        scatter(mem, CONTROL_QUEUE, &segments.writable, &[answer as u8])?;
        transport.add_used(mem, CONTROL_QUEUE, head, 1)?;
    }
    transport.end_of_queue(mem, CONTROL_QUEUE)?;
    Ok(announced)
}

#[cfg(test)]
mod tests;
