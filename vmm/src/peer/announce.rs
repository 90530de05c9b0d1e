//! Tells the switches where the guest's MAC address is now.

use crate::host::VNET_HEADER_BYTES;

/// How often a take-over is announced; a frame may be lost.
pub const ANNOUNCEMENTS: u32 = 5;
/// Pause between two announcements, in nanoseconds.
pub const ANNOUNCEMENT_PAUSE_NS: u64 = 100_000_000;

/// Shortest Ethernet frame without its checksum.
const FRAME_BYTES_MIN: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
/// RFC 903: Ethernet type 0x8035; hardware Ethernet, protocol IPv4, operation 3, "request reverse".
const RARP_REQUEST: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];

/// A broadcast RARP request from `mac`, behind an empty virtio-net header: every switch learns the way, no
/// host answers. Unlike a gratuitous ARP it needs not know the guest's IP addresses.
pub fn frame(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER_BYTES];
    frame.extend(BROADCAST);
    frame.extend(mac);
    frame.extend(RARP_REQUEST);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.extend(mac);
    frame.extend([0; 4]);
    frame.resize(VNET_HEADER_BYTES + FRAME_BYTES_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announces_the_mac_as_source_and_as_target() {
        let mac = [2, 0, 0, 0, 0, 9];
        let frame = &frame(mac)[VNET_HEADER_BYTES..];
        assert_eq!(frame.len(), FRAME_BYTES_MIN);
        assert_eq!((&frame[..6], &frame[6..12]), (&BROADCAST[..], &mac[..]));
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
    }
}
