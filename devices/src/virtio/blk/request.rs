//! A request to the disk as the driver lays it out (virtio 1.2 §5.2.6).
//!
//! | bytes | name | direction |
//! |-------|------|-----------|
//! | 4 | type: 0 IN, 1 OUT, 4 FLUSH, 8 GET_ID, 11 DISCARD, 13 WRITE_ZEROES | to the device |
//! | 4 | reserved | to the device |
//! | 8 | sector | to the device |
//! | any | data of OUT, or 16-byte ranges: sector 8, number of sectors 4, flags 4 | to the device |
//! | any | data of IN and GET_ID | to the driver |
//! | 1 | status: 0 OK, 1 IOERR, 2 UNSUPP | to the driver |
//!
//! Where descriptors begin and end means nothing (§2.7.4.1). A request that is well-formed and
//! cannot be served is answered with a status; only one without room for header or status is the
//! driver's fault.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::disk::{DiskOp, SECTOR_BYTES, ZeroRange};

/// Length of a request's header.
pub(crate) const HEADER_BYTES: usize = 16;
/// Most ranges of a discard.
pub(crate) const DISCARD_RANGES_MAX: u32 = 16;
/// Most ranges of a write-zeroes.
pub(crate) const ZERO_RANGES_MAX: u32 = 1;
/// Most sectors of a range of either, 128 MiB: where the host's file system has no fast way, it has
/// to write them.
pub(crate) const RANGE_SECTORS_MAX: u32 = 1 << 18;
const RANGE_BYTES: usize = 16;

/// How a request ended (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// Which counter a request moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// What to do about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// The host has to do it.
    Host { kind: Kind, op: DiskOp },
    /// It is answered at once: with data, or with a refusal.
    Now { status: Status, data: Vec<u8> },
}

fn refusal(status: Status) -> Parsed {
    Parsed::Now { status, data: Vec::new() }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// What `request` (header and data, at least [`HEADER_BYTES`]) asks of a disk with
/// `capacity_sectors`; the driver left room for `room_bytes` of data.
pub(crate) fn parse(mut request: Vec<u8>, room_bytes: u32, capacity_sectors: u64) -> Parsed {
    let kind = u32::from_le_bytes(number(&request, 0));
    let sector = u64::from_le_bytes(number(&request, 8));
    let data = request.split_off(HEADER_BYTES);
    let fits = |sector: u64, count: u64| {
        sector.checked_add(count).is_some_and(|end| end <= capacity_sectors)
    };
    let whole_sectors =
        |bytes: u64| bytes.is_multiple_of(SECTOR_BYTES) && fits(sector, bytes / SECTOR_BYTES);
    match kind {
        VIRTIO_BLK_T_IN if whole_sectors(room_bytes.into()) => {
            let op = DiskOp::Read { sector, length_bytes: room_bytes };
            Parsed::Host { kind: Kind::Read, op }
        }
        VIRTIO_BLK_T_OUT if whole_sectors(data.len() as u64) => {
            Parsed::Host { kind: Kind::Write, op: DiskOp::Write { sector, data } }
        }
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => refusal(Status::IoError),
        VIRTIO_BLK_T_FLUSH => Parsed::Host { kind: Kind::Flush, op: DiskOp::Flush },
        VIRTIO_BLK_T_GET_ID => {
            let mut data = b"ftvmm-disk".to_vec();
            data.resize(VIRTIO_BLK_ID_BYTES.min(room_bytes) as usize, 0);
            Parsed::Now { status: Status::Ok, data }
        }
        VIRTIO_BLK_T_DISCARD => match ranges(&data, DISCARD_RANGES_MAX, 0, fits) {
            Ok(mut ranges) => {
                ranges.iter_mut().for_each(|range| range.unmap = true);
                Parsed::Host { kind: Kind::Discard, op: DiskOp::Zero { ranges } }
            }
            Err(status) => refusal(status),
        },
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            match ranges(&data, ZERO_RANGES_MAX, flags, fits) {
                Ok(ranges) => Parsed::Host { kind: Kind::WriteZeroes, op: DiskOp::Zero { ranges } },
                Err(status) => refusal(status),
            }
        }
        _ => refusal(Status::Unsupported),
    }
}

/// §5.2.6.2: a flag that has no meaning is not supported, a range that is too long or off the disk
/// an error.
fn ranges(
    data: &[u8],
    count_max: u32,
    flags_known: u32,
    fits: impl Fn(u64, u64) -> bool,
) -> Result<Vec<ZeroRange>, Status> {
    let count = data.len() / RANGE_BYTES;
    if !data.len().is_multiple_of(RANGE_BYTES) || count == 0 || count > count_max as usize {
        return Err(Status::IoError);
    }
    let range = |bytes: &[u8]| {
        let sector = u64::from_le_bytes(number(bytes, 0));
        let sector_count = u32::from_le_bytes(number(bytes, 8));
        let flags = u32::from_le_bytes(number(bytes, 12));
        if flags & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        if sector_count > RANGE_SECTORS_MAX || !fits(sector, sector_count.into()) {
            return Err(Status::IoError);
        }
        Ok(ZeroRange { sector, sector_count, unmap: flags != 0 })
    };
    data.chunks_exact(RANGE_BYTES).map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 1000;

    fn request(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), data].concat()
    }

    fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    fn parsed(kind: u32, sector: u64, data: &[u8], room_bytes: u32) -> Parsed {
        parse(request(kind, sector, data), room_bytes, SECTORS)
    }

    #[test]
    fn reads_and_writes_are_whole_sectors_of_the_disk() {
        let read = |sector, length_bytes| Parsed::Host {
            kind: Kind::Read,
            op: DiskOp::Read { sector, length_bytes },
        };
        assert_eq!(parsed(0, 998, &[], 1024), read(998, 1024));
        assert_eq!(parsed(0, 1000, &[], 0), read(1000, 0));
        let op = DiskOp::Write { sector: 3, data: vec![7; 512] };
        assert_eq!(parsed(1, 3, &[7; 512], 0), Parsed::Host { kind: Kind::Write, op });
        for (sector, bytes) in [(999, 1024), (u64::MAX, 512), (0, 511), (1001, 0), (0, 513)] {
            let refused = refusal(Status::IoError);
            assert_eq!(parsed(0, sector, &[], bytes), refused, "{sector} {bytes}");
            assert_eq!(parsed(1, sector, &vec![0; bytes as usize], 0), refused);
        }
    }

    #[test]
    fn discards_and_zeroes_name_ranges() {
        let two = [range(0, 8, 0), range(992, 8, 0)].concat();
        let at = |sector, unmap| ZeroRange { sector, sector_count: 8, unmap };
        let op = DiskOp::Zero { ranges: vec![at(0, true), at(992, true)] };
        assert_eq!(parsed(11, 0, &two, 0), Parsed::Host { kind: Kind::Discard, op });
        for (flags, unmap) in [(0, false), (1, true)] {
            let op = DiskOp::Zero { ranges: vec![at(5, unmap)] };
            let expected = Parsed::Host { kind: Kind::WriteZeroes, op };
            assert_eq!(parsed(13, 0, &range(5, 8, flags), 0), expected);
        }
        let too_many = range(0, 1, 0).repeat(17);
        for (kind, data, status) in [
            (13, two, Status::IoError),
            (11, too_many, Status::IoError),
            (11, vec![], Status::IoError),
            (11, vec![0; 15], Status::IoError),
            (11, range(993, 8, 0), Status::IoError),
            (11, range(u64::MAX, 8, 0), Status::IoError),
            (11, range(0, RANGE_SECTORS_MAX + 1, 0), Status::IoError),
            (11, range(0, 8, 1), Status::Unsupported),
            (13, range(0, 8, 2), Status::Unsupported),
        ] {
            assert_eq!(parsed(kind, 0, &data, 0), refusal(status), "{kind} {data:?}");
        }
    }

    #[test]
    fn the_rest_is_answered_at_once() {
        let id = |length: usize| {
            let mut data = b"ftvmm-disk".to_vec();
            data.resize(length, 0);
            Parsed::Now { status: Status::Ok, data }
        };
        assert_eq!(parsed(8, 0, &[], 20), id(20));
        assert_eq!(parsed(8, 0, &[], 512), id(20));
        assert_eq!(parsed(8, 0, &[], 4), id(4));
        for kind in [2, 3, 14, u32::MAX] {
            assert_eq!(parsed(kind, 0, &[], 512), refusal(Status::Unsupported));
        }
        let flush = Parsed::Host { kind: Kind::Flush, op: DiskOp::Flush };
        assert_eq!(parsed(4, u64::MAX, &[1], 0), flush);
    }
}
