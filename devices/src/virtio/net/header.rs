//! The `virtio_net_hdr_v1` in front of every frame (virtio 1.2 §5.1.6).
//!
//! | offset | name | bytes |
//! |--------|------|-------|
//! | 0 | flags: 1 NEEDS_CSUM, 2 DATA_VALID | 1 |
//! | 1 | gso_type: 0 none, 1 TCP over IPv4 | 1 |
//! | 2 | hdr_len: all headers of the frame, a hint | 2 |
//! | 4 | gso_size: payload of each segment | 2 |
//! | 6 | csum_start: where the checksum begins to count | 2 |
//! | 8 | csum_offset: where it goes, from csum_start | 2 |
//! | 10 | num_buffers: 1 towards the guest | 2 |

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
};

use crate::fault::HeaderProblem;

/// Length of the header.
pub(crate) const HEADER_BYTES: usize = 12;
/// Length of an Ethernet header without VLAN tag.
pub(crate) const ETHERNET_HEADER_BYTES: usize = 14;

const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const HDR_LEN: usize = 2;
const GSO_SIZE: usize = 4;
const CSUM_START: usize = 6;
const CSUM_OFFSET: usize = 8;
const NUM_BUFFERS: usize = 10;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;

fn field(frame: &[u8], offset: usize) -> usize {
    usize::from(u16::from_le_bytes([frame[offset], frame[offset + 1]]))
}

/// Where the frame's checksum goes, counted from the start of the header, if that is inside the
/// frame.
fn checksum_at(frame: &[u8]) -> Option<usize> {
    let at = HEADER_BYTES + field(frame, CSUM_START) + field(frame, CSUM_OFFSET);
    (at + 2 <= frame.len()).then_some(at)
}

/// Checks the header of a frame the guest transmits (§5.1.6.2) and clears what a device has to
/// ignore in it.
pub(crate) fn check_transmitted(
    frame: &mut [u8],
    with_checksum: bool,
    with_tso4: bool,
) -> Result<(), HeaderProblem> {
    if frame.len() < HEADER_BYTES + ETHERNET_HEADER_BYTES {
        return Err(HeaderProblem::ShortFrame);
    }
    frame[FLAGS] &= NEEDS_CSUM;
    frame[NUM_BUFFERS..HEADER_BYTES].fill(0);
    let needs_checksum = frame[FLAGS] == NEEDS_CSUM;
    if !needs_checksum {
        frame[CSUM_START..NUM_BUFFERS].fill(0);
    } else if !with_checksum {
        return Err(HeaderProblem::ChecksumNotNegotiated);
    } else if checksum_at(frame).is_none() {
        return Err(HeaderProblem::ChecksumOutsideFrame);
    }
    match frame[GSO_TYPE] {
        GSO_NONE => frame[HDR_LEN..CSUM_START].fill(0),
        GSO_TCPV4 if with_tso4 => {
            if !needs_checksum || field(frame, GSO_SIZE) == 0 {
                return Err(HeaderProblem::SegmentationIncomplete);
            }
            if HEADER_BYTES + field(frame, HDR_LEN) > frame.len() {
                return Err(HeaderProblem::HeaderLength);
            }
        }
        _ => return Err(HeaderProblem::SegmentationNotNegotiated),
    }
    Ok(())
}

/// Makes the header of a frame from the host one that the guest has agreed to (§5.1.6.4): a partial
/// checksum is completed for a guest without VIRTIO_NET_F_GUEST_CSUM. Returns whether the frame can
/// be delivered.
pub(crate) fn prepare_received(frame: &mut [u8], has_checksum_offload: bool) -> bool {
    if frame.len() < HEADER_BYTES + ETHERNET_HEADER_BYTES || frame[GSO_TYPE] != GSO_NONE {
        return false;
    }
    frame[FLAGS] &= NEEDS_CSUM | DATA_VALID;
    if frame[FLAGS] & NEEDS_CSUM != 0 {
        let Some(at) = checksum_at(frame) else {
            return false;
        };
        if !has_checksum_offload {
            complete_checksum(frame, at);
        }
    }
    if !has_checksum_offload {
        frame[..HEADER_BYTES].fill(0);
    }
    frame[NUM_BUFFERS..HEADER_BYTES].copy_from_slice(&1u16.to_le_bytes());
    true
}

/// RFC 1071 over everything from csum_start; the field at `at` holds the sum of the pseudo header.
/// Zero is written as its other form, which UDP requires and TCP does not mind.
fn complete_checksum(frame: &mut [u8], at: usize) {
    let start = HEADER_BYTES + field(frame, CSUM_START);
    let sum: u64 = frame[start..]
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = ((folded & 0xffff) + (folded >> 16)) as u16;
    let checksum = if folded == 0xffff { 0xffff } else { !folded };
    frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 60-byte frame behind a header with the given fields.
    fn frame(flags: u8, gso_type: u8, hdr_len: u16, gso_size: u16, csum: (u16, u16)) -> Vec<u8> {
        let mut frame = vec![flags, gso_type];
        for value in [hdr_len, gso_size, csum.0, csum.1, 0xaaaa] {
            frame.extend(value.to_le_bytes());
        }
        frame.extend(0..60);
        frame
    }

    #[test]
    fn transmitted_headers() {
        use HeaderProblem::*;
        for (mut frame, expected) in [
            (frame(0, 0, 0, 0, (0, 0)), Ok(())),
            (frame(0xfe, 0, 61, 7, (0xffff, 0xffff)), Ok(())),
            (frame(1, 0, 0, 0, (34, 16)), Ok(())),
            (frame(1, 0, 0, 0, (42, 16)), Ok(())),
            (frame(1, 0, 0, 0, (43, 16)), Err(ChecksumOutsideFrame)),
            (frame(1, 0, 0, 0, (0xffff, 0xffff)), Err(ChecksumOutsideFrame)),
            (frame(1, 1, 54, 1448, (34, 16)), Ok(())),
            (frame(1, 1, 60, 1448, (34, 16)), Ok(())),
            (frame(1, 1, 61, 1448, (34, 16)), Err(HeaderLength)),
            (frame(0, 1, 54, 1448, (34, 16)), Err(SegmentationIncomplete)),
            (frame(1, 1, 54, 0, (34, 16)), Err(SegmentationIncomplete)),
            (frame(1, 4, 54, 1448, (34, 16)), Err(SegmentationNotNegotiated)),
            (frame(1, 0x81, 54, 1448, (34, 16)), Err(SegmentationNotNegotiated)),
            (frame(0, 0, 0, 0, (0, 0))[..25].to_vec(), Err(ShortFrame)),
            (vec![], Err(ShortFrame)),
        ] {
            let before = frame.clone();
            assert_eq!(check_transmitted(&mut frame, true, true), expected, "{before:?}");
            if expected.is_ok() {
                assert_eq!(frame[FLAGS], before[FLAGS] & 1);
                assert_eq!(frame[NUM_BUFFERS..HEADER_BYTES], [0, 0]);
                assert_eq!(frame[HEADER_BYTES..], before[HEADER_BYTES..]);
            }
        }
        let mut ignored = frame(0xfe, 0, 61, 7, (0xffff, 0xffff));
        assert_eq!(check_transmitted(&mut ignored, true, true), Ok(()));
        assert_eq!(ignored[..HEADER_BYTES], [0; HEADER_BYTES]);
        let (mut partial, mut segmented) =
            (frame(1, 0, 0, 0, (34, 16)), frame(1, 1, 54, 1448, (34, 16)));
        assert_eq!(check_transmitted(&mut partial, false, false), Err(ChecksumNotNegotiated));
        assert_eq!(check_transmitted(&mut segmented, true, false), Err(SegmentationNotNegotiated));
    }

    #[test]
    fn received_header_passes_to_a_guest_with_checksum_offload() {
        let mut partial = frame(0xff, 0, 0, 0, (34, 16));
        assert!(prepare_received(&mut partial, true));
        assert_eq!(partial[..HEADER_BYTES], [3, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0]);
        assert_eq!(partial[HEADER_BYTES..], (0..60).collect::<Vec<u8>>());
    }

    #[test]
    fn partial_checksum_is_completed_for_a_guest_without_offload() {
        let mut partial = frame(1, 0, 0, 0, (34, 6));
        let mut expected: Vec<u8> = (0..60).collect();
        assert!(prepare_received(&mut partial, false));
        assert_eq!(partial[..HEADER_BYTES], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        // Summed by hand: words 0x2223, 0x2425 .. 0x3a3b from byte 34 on.
        let sum: u32 = (34..60).step_by(2).map(|i| i << 8 | (i + 1)).sum();
        let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
        expected[40..42].copy_from_slice(&folded.to_be_bytes());
        assert_eq!(partial[HEADER_BYTES..], expected);
    }

    #[test]
    fn odd_length_and_zero_checksum_are_summed_right() {
        // 0xff00 + 0x00ff: the sum is all ones, its complement zero, written as all ones.
        let mut frame = frame(1, 0, 0, 0, (14, 0))[..HEADER_BYTES + 17].to_vec();
        frame[HEADER_BYTES + 14..].copy_from_slice(&[0x00, 0xff, 0xff]);
        assert!(prepare_received(&mut frame, false));
        assert_eq!(frame[HEADER_BYTES + 14..], [0xff, 0xff, 0xff]);
    }

    #[test]
    fn frames_the_guest_cannot_take_are_refused() {
        for mut frame in [
            frame(0, 1, 54, 1448, (0, 0)),
            frame(1, 0, 0, 0, (43, 16)),
            frame(0, 0, 0, 0, (0, 0))[..25].to_vec(),
            vec![],
        ] {
            assert!(!prepare_received(&mut frame, true));
            assert!(!prepare_received(&mut frame, false));
        }
    }
}
