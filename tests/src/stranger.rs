//! A stranger on the link between the hosts, who ends their connections with forged resets.

use std::io;
use std::os::fd::AsRawFd;
use std::thread;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{LinkAddr, MsgFlags, SockaddrLike, bind, recvfrom, send};

use crate::chaos::capture::{OUTGOING, packet_socket};
use crate::lab::Lab;

/// Bytes of an Ethernet, an IPv4 and a TCP header without options (RFC 791, RFC 9293).
const ETHERNET_BYTES: usize = 14;
const IP_BYTES: usize = 20;
const TCP_BYTES: usize = 20;
const ALL_BYTES: usize = ETHERNET_BYTES + IP_BYTES + TCP_BYTES;
const TCP: u8 = 6;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
/// Looks before the link counts as silent.
const LOOKS: u32 = 200;

/// Answers the next segment that host `from` (`a` or `b`) sends from or to TCP port `port` on the
/// link as if the other host had reset the connection. The reset fails when the host has received
/// more in the meantime (RFC 5961 section 3.2).
///
/// # Errors
/// When the system refuses the socket, or nothing passes.
pub fn forge_reset(lab: &Lab, from: &str, port: u16) -> io::Result<()> {
    let (namespace, device) = (lab.namespace().to_owned(), format!("{from}-link"));
    let forged = thread::spawn(move || forge(&namespace, &device, port));
    forged.join().map_err(|_| io::Error::other("the forger panicked"))?
}

fn forge(namespace: &str, device: &str, port: u16) -> io::Result<()> {
    let socket = packet_socket(namespace)?;
    bind(socket.as_raw_fd(), &link_address(device)?)?;
    let mut frame = [0; 2048];
    let mut silent = 0;
    while silent < LOOKS {
        let Ok((length, Some(sender))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame)
        else {
            silent += 1;
            continue;
        };
        if sender.pkttype() != OUTGOING
            && let Some(reset) = reset_for(&frame[..length], port)
        {
            send(socket.as_raw_fd(), &reset, MsgFlags::empty())?;
            return Ok(());
        }
    }
    Err(io::Error::other(format!("nothing of port {port} passes {device}")))
}

fn link_address(device: &str) -> io::Result<LinkAddr> {
    let address = nix::libc::sockaddr_ll {
        sll_family: nix::libc::AF_PACKET as u16,
        sll_protocol: (nix::libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: if_nametoindex(device)?.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let bytes = size_of_val(&address) as u32;
    // SAFETY: the structure is a whole socket address of the length that is given with it.
    let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(bytes)) };
    address.ok_or_else(|| io::Error::other("no address of a device"))
}

/// The frame that resets the connection of this segment, for the host that sent it.
fn reset_for(frame: &[u8], port: u16) -> Option<[u8; ALL_BYTES]> {
    let head: &[u8; ALL_BYTES] = frame.first_chunk()?;
    let (ethernet, rest) = head.split_at(ETHERNET_BYTES);
    let (ip, tcp) = rest.split_at(IP_BYTES);
    let is_tcp = ethernet[12..] == [8, 0] && ip[0] == 0x45 && ip[9] == TCP;
    let ports = [[tcp[0], tcp[1]], [tcp[2], tcp[3]]];
    if !is_tcp || tcp[13] & (ACK | RST) != ACK || !ports.contains(&port.to_be_bytes()) {
        return None;
    }
    let mut reset = [0; ALL_BYTES];
    let (to_ethernet, rest) = reset.split_at_mut(ETHERNET_BYTES);
    let (to_ip, to_tcp) = rest.split_at_mut(IP_BYTES);
    to_ethernet[..6].copy_from_slice(&ethernet[6..12]);
    to_ethernet[6..12].copy_from_slice(&ethernet[..6]);
    to_ethernet[12..].copy_from_slice(&[8, 0]);
    to_ip[..4].copy_from_slice(&[0x45, 0, 0, (IP_BYTES + TCP_BYTES) as u8]);
    to_ip[8..10].copy_from_slice(&[64, TCP]);
    to_ip[12..16].copy_from_slice(&ip[16..20]);
    to_ip[16..20].copy_from_slice(&ip[12..16]);
    let sum = checksum(&[to_ip]);
    to_ip[10..12].copy_from_slice(&sum);
    to_tcp[..2].copy_from_slice(&ports[1]);
    to_tcp[2..4].copy_from_slice(&ports[0]);
    // The next byte that the host waits for.
    to_tcp[4..8].copy_from_slice(&tcp[8..12]);
    to_tcp[12..14].copy_from_slice(&[((TCP_BYTES / 4) << 4) as u8, RST]);
    let sum = checksum(&[&to_ip[12..20], &[0, TCP, 0, TCP_BYTES as u8], to_tcp]);
    to_tcp[16..18].copy_from_slice(&sum);
    Some(reset)
}

/// The checksum of IPv4 and TCP (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let mut sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
