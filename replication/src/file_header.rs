//! What recordings and snapshots begin with: magic, version, and a header record with a checksum.
//!
//! | offset | bytes | type | meaning and rule |
//! | --- | --- | --- | --- |
//! | 0 | 8 | bytes | magic of the kind of file |
//! | 8 | 4 | u32 le | version; readable whatever follows |
//! | 12 | 4 | u32 le | length of the header record, at most [`HEADER_BYTES_MAX`] |
//! | 16 | 4 | u32 le | crc32c over bytes 0..16 and the header record |
//! | 20 | | postcard | header record: [`FileHeader`] |

use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::build_id::BuildId;
use crate::encoding;
use crate::fingerprint::Fingerprint;
use crate::record::{Ordinal, SnapshotMark};

/// Largest header record: room for any command line the kernel takes.
pub const HEADER_BYTES_MAX: u32 = 64 << 10;
/// Bytes before the header record.
pub(crate) const PREFIX_BYTES: usize = 20;
const MAGIC_BYTES: usize = 8;

const _: () = assert!(PREFIX_BYTES == MAGIC_BYTES + 3 * size_of::<u32>());

/// The guest a file is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHeader {
    /// The program that made the file. Another one may read it; a difference explains what
    /// follows.
    pub build: BuildId,
    /// The machine.
    pub fingerprint: Fingerprint,
    /// What the guest's RTC said at power-on, in seconds since 1970-01-01 00:00 UTC.
    pub rtc_epoch_s: u64,
    /// Where the recorder found the kernel image file. A hint: the fingerprint decides.
    pub kernel_path: String,
    /// Where the recorder found the initramfs file; a hint too.
    pub initramfs_path: Option<String>,
    /// Where a recording begins, unless at power-on; a snapshot has none.
    pub start: Option<Start>,
}

/// Where a recording of a guest begins that was restored from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The exit the guest stands at in the snapshot.
    pub at: Ordinal,
    /// The snapshot.
    pub snapshot: SnapshotMark,
}

/// A kind of file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// In a word.
    pub name: &'static str,
    /// Its first bytes.
    pub magic: [u8; MAGIC_BYTES],
    /// The version written, and the only one read.
    pub version: u32,
}

/// Why a file's header could not be written or read.
#[derive(Debug, Error)]
pub enum HeaderError {
    /// The reader failed.
    #[error("cannot read the {kind}")]
    Read {
        /// What it is.
        kind: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The header cannot be encoded within [`HEADER_BYTES_MAX`].
    #[error("{kind} header takes {header_bytes} bytes, the limit is {}", HEADER_BYTES_MAX)]
    TooLong {
        /// What it is.
        kind: &'static str,
        /// Its length.
        header_bytes: u64,
    },
    /// The file begins with something else.
    #[error("not an ftvmm {kind}: it begins with \"{}\"", first_bytes.escape_ascii())]
    Foreign {
        /// What it should be.
        kind: &'static str,
        /// The first bytes of the file, at most eight.
        first_bytes: Vec<u8>,
    },
    /// The file is of another version.
    #[error("{kind} has version {got}, this program reads version {expected}")]
    Version {
        /// What it is.
        kind: &'static str,
        /// The one that is read.
        expected: u32,
        /// The file's.
        got: u32,
    },
    /// The file ends inside the header, so that nothing can be had of it.
    #[error("{kind} ends inside its header, after {got_bytes} bytes")]
    Torn {
        /// What it is.
        kind: &'static str,
        /// Length of the file.
        got_bytes: u64,
    },
    /// The header's checksum or encoding does not hold.
    #[error("{kind} header is damaged")]
    Damaged {
        /// What it is.
        kind: &'static str,
    },
}

impl Kind {
    /// The bytes a file begins with.
    pub fn encode(self, header: &FileHeader) -> Result<Vec<u8>, HeaderError> {
        let Self { name: kind, magic, version } = self;
        let record = encoding::encode(header);
        let header_bytes = record.len() as u64;
        if header_bytes > u64::from(HEADER_BYTES_MAX) {
            return Err(HeaderError::TooLong { kind, header_bytes });
        }
        let mut file = Vec::with_capacity(PREFIX_BYTES + record.len());
        file.extend_from_slice(&magic);
        file.extend_from_slice(&version.to_le_bytes());
        file.extend_from_slice(&(record.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&file), &record);
        file.extend_from_slice(&crc.to_le_bytes());
        file.extend_from_slice(&record);
        Ok(file)
    }

    /// Reads and checks what [`Self::encode`] made; the header and its length in bytes.
    pub fn read(self, reader: &mut impl Read) -> Result<(FileHeader, u64), HeaderError> {
        let Self { name: kind, magic, version: expected } = self;
        let read_up_to = |reader: &mut dyn Read, limit: usize| {
            let mut bytes = Vec::new();
            let read = reader.take(limit as u64).read_to_end(&mut bytes);
            read.map(|_| bytes).map_err(|source| HeaderError::Read { kind, source })
        };
        let mut prefix = read_up_to(reader, PREFIX_BYTES)?;
        let magic_bytes = prefix.len().min(MAGIC_BYTES);
        if prefix[..magic_bytes] != magic[..magic_bytes] || prefix.is_empty() {
            prefix.truncate(magic_bytes);
            return Err(HeaderError::Foreign { kind, first_bytes: prefix });
        }
        let field = |at: usize| {
            let bytes = prefix.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_le_bytes)
        };
        let torn = |got_bytes: usize| HeaderError::Torn { kind, got_bytes: got_bytes as u64 };
        let got = field(8).ok_or(torn(prefix.len()))?;
        if got != expected {
            return Err(HeaderError::Version { kind, expected, got });
        }
        let (Some(header_bytes), Some(stored_crc)) = (field(12), field(16)) else {
            return Err(torn(prefix.len()));
        };
        if header_bytes > HEADER_BYTES_MAX {
            return Err(HeaderError::Damaged { kind });
        }
        let record = read_up_to(reader, header_bytes as usize)?;
        if record.len() < header_bytes as usize {
            return Err(torn(prefix.len() + record.len()));
        }
        if crc32c::crc32c_append(crc32c::crc32c(&prefix[..16]), &record) != stored_crc {
            return Err(HeaderError::Damaged { kind });
        }
        let header = encoding::decode(&record).map_err(|_| HeaderError::Damaged { kind })?;
        Ok((header, (PREFIX_BYTES + record.len()) as u64))
    }
}
