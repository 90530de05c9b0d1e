//! The snapshot file: the whole state of a guest, from which it goes on, once or many times.
//!
//! After the header ([`crate::file_header`]; magic `FTVMMSNP`) come the parts of the state
//! ([`StatePart`]) in the order in which they are to be put in place:
//!
//! | field | type | meaning and rule |
//! | --- | --- | --- |
//! | length | u32 le | bytes of the part, at most [`PART_BYTES_MAX`] |
//! | crc32c | u32 le | over the four bytes of `length` and the part |
//! | part | postcard | [`StatePart`] |
//!
//! The last part is the machine, and the file ends with it: a file without it is torn. So nobody
//! who has read a snapshot to its end has half of one.

use std::io::{self, Read, Write};

use thiserror::Error;

use crate::encoding;
use crate::file_header::{FileHeader, HeaderError, Kind};
use crate::state::StatePart;

/// First bytes of every snapshot.
pub const SNAPSHOT_MAGIC: [u8; 8] = *b"FTVMMSNP";
/// Version of the file format written here, and the only one read. The machine's own encoding has
/// a version besides.
pub const SNAPSHOT_VERSION: u32 = 3;
/// Largest part. The sender's are a fraction of it; the bound is there so that a damaged length
/// cannot ask for all memory.
pub const PART_BYTES_MAX: u32 = 16 << 20;
const KIND: Kind = Kind { name: "snapshot", magic: SNAPSHOT_MAGIC, version: SNAPSHOT_VERSION };

/// Why a snapshot could not be written or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The writer failed.
    #[error("cannot write the snapshot")]
    Write(#[source] io::Error),
    /// The reader failed.
    #[error("cannot read the snapshot")]
    Read(#[source] io::Error),
    /// The header is none, or cannot be written.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A part cannot be encoded within [`PART_BYTES_MAX`].
    #[error("a part of the snapshot takes {part_bytes} bytes, the limit is {}", PART_BYTES_MAX)]
    PartTooLong {
        /// Its length.
        part_bytes: u64,
    },
    /// The file ends before the machine.
    #[error("snapshot is incomplete: it ends after {got_bytes} bytes, before its last part")]
    Torn {
        /// Length of the file.
        got_bytes: u64,
    },
    /// A part's length, checksum or encoding does not hold.
    #[error("snapshot is damaged: the checksum of the part at offset {offset_bytes} is wrong")]
    Damaged {
        /// Where the part begins in the file.
        offset_bytes: u64,
    },
    /// Something follows the machine.
    #[error("snapshot goes on after its end, at offset {offset_bytes}")]
    Trailing {
        /// Where it should end.
        offset_bytes: u64,
    },
}

/// Writes a snapshot.
#[derive(Debug)]
pub struct SnapshotWriter<W> {
    writer: W,
    written_bytes: u64,
}

impl<W: Write> SnapshotWriter<W> {
    /// Begins a snapshot with its header.
    ///
    /// # Errors
    /// [`SnapshotError::Write`] and [`SnapshotError::Header`].
    pub fn new(mut writer: W, header: &FileHeader) -> Result<Self, SnapshotError> {
        let header = KIND.encode(header)?;
        writer.write_all(&header).map_err(SnapshotError::Write)?;
        Ok(Self { writer, written_bytes: header.len() as u64 })
    }

    /// Appends a part. The machine must be the last.
    ///
    /// # Errors
    /// [`SnapshotError::Write`] and [`SnapshotError::PartTooLong`].
    pub fn write_part(&mut self, part: &StatePart) -> Result<(), SnapshotError> {
        let part = encoding::encode(part);
        let length = u32::try_from(part.len()).ok().filter(|length| *length <= PART_BYTES_MAX);
        let part_bytes = part.len() as u64;
        let length = length.ok_or(SnapshotError::PartTooLong { part_bytes })?.to_le_bytes();
        let crc = crc32c::crc32c_append(crc32c::crc32c(&length), &part).to_le_bytes();
        for bytes in [&length[..], &crc, &part] {
            self.writer.write_all(bytes).map_err(SnapshotError::Write)?;
            self.written_bytes += bytes.len() as u64;
        }
        Ok(())
    }

    /// Length of the file so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Hands what is written to the system.
    ///
    /// # Errors
    /// [`SnapshotError::Write`].
    pub fn flush(&mut self) -> Result<(), SnapshotError> {
        self.writer.flush().map_err(SnapshotError::Write)
    }

    /// Flushes and gives the writer back, for the caller to sync or close.
    ///
    /// # Errors
    /// [`SnapshotError::Write`].
    pub fn finish(mut self) -> Result<W, SnapshotError> {
        self.flush()?;
        Ok(self.writer)
    }
}

/// Reads a snapshot part by part.
#[derive(Debug)]
pub struct SnapshotReader<R> {
    reader: R,
    header: FileHeader,
    offset_bytes: u64,
    ended: bool,
}

impl<R: Read> SnapshotReader<R> {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`SnapshotError::Header`].
    pub fn new(mut reader: R) -> Result<Self, SnapshotError> {
        let (header, offset_bytes) = KIND.read(&mut reader)?;
        Ok(Self { reader, header, offset_bytes, ended: false })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &FileHeader {
        &self.header
    }

    /// The next part; `None` after the machine, where the file ends.
    ///
    /// # Errors
    /// Every [`SnapshotError`] except those of the header and of writing.
    pub fn next_part(&mut self) -> Result<Option<StatePart>, SnapshotError> {
        let offset_bytes = self.offset_bytes;
        if self.ended {
            return match self.read_up_to(1)?.is_empty() {
                true => Ok(None),
                false => Err(SnapshotError::Trailing { offset_bytes }),
            };
        }
        let damaged = SnapshotError::Damaged { offset_bytes };
        let [length, crc] = [self.read_number()?, self.read_number()?];
        if length > PART_BYTES_MAX {
            return Err(damaged);
        }
        let part = self.read_up_to(length as usize)?;
        if part.len() < length as usize {
            return Err(SnapshotError::Torn { got_bytes: self.offset_bytes });
        }
        if crc32c::crc32c_append(crc32c::crc32c(&length.to_le_bytes()), &part) != crc {
            return Err(damaged);
        }
        let part = encoding::decode(&part).map_err(|_| damaged)?;
        self.ended = matches!(part, StatePart::Machine(_));
        Ok(Some(part))
    }

    fn read_number(&mut self) -> Result<u32, SnapshotError> {
        let bytes = self.read_up_to(size_of::<u32>())?;
        let number = bytes.try_into().map(u32::from_le_bytes);
        number.map_err(|_| SnapshotError::Torn { got_bytes: self.offset_bytes })
    }

    fn read_up_to(&mut self, limit: usize) -> Result<Vec<u8>, SnapshotError> {
        let mut bytes = Vec::new();
        let read = (&mut self.reader).take(limit as u64).read_to_end(&mut bytes);
        self.offset_bytes += read.map_err(SnapshotError::Read)? as u64;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::tests::example;

    fn header() -> FileHeader {
        FileHeader {
            build: crate::build_id::tests::example(),
            fingerprint: example(),
            rtc_epoch_s: 1_700_000_000,
            kernel_path: "/boot/bzImage".into(),
            initramfs_path: None,
            start: None,
        }
    }

    fn parts() -> Vec<StatePart> {
        vec![
            StatePart::Outline { total_bytes: 8192 },
            StatePart::Pages(vec![7; 30]),
            StatePart::Blocks(vec![]),
            StatePart::Pages(vec![8; 20]),
            StatePart::Machine(vec![9; 25]),
        ]
    }

    fn file(parts: &[StatePart]) -> Vec<u8> {
        let mut writer = SnapshotWriter::new(Vec::new(), &header()).unwrap();
        parts.iter().for_each(|part| writer.write_part(part).unwrap());
        let written_bytes = writer.written_bytes();
        let bytes = writer.finish().unwrap();
        assert_eq!(bytes.len() as u64, written_bytes);
        bytes
    }

    fn read_all(bytes: &[u8]) -> Result<Vec<StatePart>, SnapshotError> {
        let mut reader = SnapshotReader::new(bytes)?;
        assert_eq!(reader.header(), &header());
        std::iter::from_fn(|| reader.next_part().transpose()).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read_all(&file(&parts())).unwrap(), parts());
    }

    #[test]
    fn any_flipped_bit_is_told() {
        let bytes = file(&parts());
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&flipped).is_err(), "bit {bit} went unnoticed");
        }
    }

    #[test]
    fn damage_is_placed() {
        let (bytes, first) = (file(&parts()), file(&parts()[..1]).len());
        let mut damaged = bytes.clone();
        damaged[first + 12] ^= 1;
        let error = read_all(&damaged).unwrap_err().to_string();
        let says =
            format!("snapshot is damaged: the checksum of the part at offset {first} is wrong");
        assert_eq!(error, says);
    }

    #[test]
    fn any_truncation_is_told() {
        let (bytes, header_bytes) = (file(&parts()), file(&[]).len());
        for length in 0..bytes.len() {
            match read_all(&bytes[..length]).unwrap_err() {
                SnapshotError::Torn { got_bytes } if length >= header_bytes => {
                    assert_eq!(got_bytes, length as u64);
                }
                SnapshotError::Header(_) if length < header_bytes => {}
                error => panic!("cut at {length}: {error}"),
            }
        }
    }

    #[test]
    fn nothing_may_follow_the_machine() {
        let bytes = file(&parts());
        for more in [&[0][..], &bytes] {
            let error = read_all(&[&bytes[..], more].concat()).unwrap_err();
            let SnapshotError::Trailing { offset_bytes } = error else { panic!("{error}") };
            assert_eq!(offset_bytes, bytes.len() as u64);
        }
    }

    #[test]
    fn foreign_files_and_other_versions_are_named() {
        let error = |bytes: &[u8]| SnapshotReader::new(bytes).unwrap_err().to_string();
        assert_eq!(
            error(b"FTVMMLOG\x03\0\0\0"),
            "not an ftvmm snapshot: it begins with \"FTVMMLOG\""
        );
        let mut newer = file(&parts());
        newer[8] = 7;
        assert_eq!(error(&newer), "snapshot has version 7, this program reads version 3");
    }

    #[test]
    fn a_part_beyond_the_limit_is_refused() {
        let mut writer = SnapshotWriter::new(Vec::new(), &header()).unwrap();
        let part = StatePart::Machine(vec![0; PART_BYTES_MAX as usize]);
        let error = writer.write_part(&part).unwrap_err();
        assert!(matches!(error, SnapshotError::PartTooLong { .. }));
        let mut claims = file(&[]);
        claims.extend_from_slice(&u32::MAX.to_le_bytes());
        claims.extend_from_slice(&[0; 4]);
        assert!(matches!(read_all(&claims), Err(SnapshotError::Damaged { .. })));
    }
}
