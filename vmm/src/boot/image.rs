//! Kernel files: an ELF as it is, or a bzImage whose payload is decompressed here and never by the guest's
//! own stub (the stub reads the TSC for KASLR; design.md section 2).

use std::io::Read;

use linux_loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::ByteValued;

/// Offset of `setup_header` in a bzImage (Linux Documentation/arch/x86/boot.rst).
const SETUP_HEADER_OFFSET: usize = 0x1f1;
/// "HdrS", at offset 0x202.
const SETUP_MAGIC: u32 = 0x5372_6448;
/// `payload_offset` exists from boot protocol 2.08 on.
const OLDEST_PROTOCOL: u16 = 0x0208;
const SECTOR_BYTES: usize = 512;
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Kernels are some 50 MiB; a payload that claims more than this is not one.
const UNPACKED_BYTES_MAX: u64 = 512 << 20;
/// Linux packs with the legacy LZ4 frame: blocks of at most 8 MiB unpacked.
const LZ4_LEGACY_BLOCK_BYTES: usize = 8 << 20;

type Unpack = fn(&[u8]) -> std::io::Result<Vec<u8>>;

/// Payload formats by their first bytes (Linux lib/decompress.c).
const FORMATS: [(&[u8], &str, Unpack); 4] = [
    (b"\x1f\x8b", "gzip", unpack_gzip),
    (b"\xfd7zXZ\x00", "xz", unpack_xz),
    (b"\x02\x21\x4c\x18", "lz4", unpack_lz4_legacy),
    (b"\x28\xb5\x2f\xfd", "zstd", unpack_zstd),
];

/// Why a file is no kernel.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Neither magic is there.
    #[error(
        "is no kernel: it starts with {first_bytes:02x?}; wanted is an x86-64 bzImage or ELF vmlinux"
    )]
    NotAKernel {
        /// The file's first bytes.
        first_bytes: Vec<u8>,
    },
    /// The boot protocol is from before 2008.
    #[error("speaks boot protocol {got:#06x}, oldest supported is {OLDEST_PROTOCOL:#06x}")]
    TooOld {
        /// The file's version.
        got: u16,
    },
    /// The payload lies outside the file.
    #[error("is cut off: its payload ends at byte {end}, the file at {file_bytes}")]
    CutOff {
        /// Where the payload should end.
        end: usize,
        /// The file's size.
        file_bytes: usize,
    },
    /// The payload's format is unknown.
    #[error("has a payload that starts with {first_bytes:02x?}; known are gzip, xz, lz4 and zstd")]
    UnknownPayload {
        /// The payload's first bytes.
        first_bytes: Vec<u8>,
    },
    /// The payload is damaged.
    #[error("has a damaged {format} payload: {source}")]
    DamagedPayload {
        /// Which format.
        format: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}

/// An uncompressed kernel ELF.
#[derive(Debug)]
pub struct KernelImage {
    /// The ELF file.
    pub elf: Vec<u8>,
    /// The setup header the bzImage came with; zeroed for a bare ELF.
    pub header: setup_header,
}

impl KernelImage {
    /// Reads a kernel out of the bytes of its file.
    ///
    /// # Errors
    /// Says what the bytes are not.
    pub fn parse(file: Vec<u8>) -> Result<Self, ImageError> {
        if file.starts_with(ELF_MAGIC) {
            return Ok(Self { elf: file, header: setup_header::default() });
        }
        let header = setup_header_of(&file)
            .ok_or_else(|| ImageError::NotAKernel { first_bytes: first_bytes(&file) })?;
        if header.version < OLDEST_PROTOCOL {
            return Err(ImageError::TooOld { got: header.version });
        }
        let setup_sectors =
            if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
        let start = (setup_sectors + 1) * SECTOR_BYTES + header.payload_offset as usize;
        let end = start + header.payload_length as usize;
        let payload =
            file.get(start..end).ok_or(ImageError::CutOff { end, file_bytes: file.len() })?;
        let elf = unpack(payload)?;
        if !elf.starts_with(ELF_MAGIC) {
            return Err(ImageError::NotAKernel { first_bytes: first_bytes(&elf) });
        }
        Ok(Self { elf, header })
    }
}

fn setup_header_of(file: &[u8]) -> Option<setup_header> {
    let bytes = file.get(SETUP_HEADER_OFFSET..)?.get(..size_of::<setup_header>())?;
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(bytes);
    (header.header == SETUP_MAGIC).then_some(header)
}

fn first_bytes(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().take(8).copied().collect()
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>, ImageError> {
    let (_, format, unpack) = FORMATS
        .iter()
        .find(|(magic, ..)| payload.starts_with(magic))
        .ok_or_else(|| ImageError::UnknownPayload { first_bytes: first_bytes(payload) })?;
    unpack(payload).map_err(|source| ImageError::DamagedPayload { format, source })
}

fn read_bounded(reader: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(UNPACKED_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn unpack_gzip(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    read_bounded(flate2::read::GzDecoder::new(payload))
}

fn unpack_xz(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    read_bounded(liblzma::read::XzDecoder::new(payload))
}

fn unpack_zstd(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    let decoder =
        ruzstd::decoding::StreamingDecoder::new(payload).map_err(std::io::Error::other)?;
    read_bounded(decoder)
}

/// A magic, then blocks of (packed size, bytes). Linux appends the unpacked size behind the last block, too
/// short to be one.
fn unpack_lz4_legacy(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut rest = &payload[4..];
    let mut unpacked = Vec::new();
    while let Some((size, tail)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        let Some(block) = tail.get(..size) else {
            if tail.is_empty() {
                break;
            }
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        };
        let block = lz4_flex::block::decompress(block, LZ4_LEGACY_BLOCK_BYTES)
            .map_err(std::io::Error::other)?;
        unpacked.extend_from_slice(&block);
        rest = &tail[size..];
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let header = setup_header {
            header: SETUP_MAGIC,
            version: 0x020f,
            setup_sects: 1,
            payload_offset: 16,
            payload_length: payload.len() as u32,
            ..Default::default()
        };
        let mut file = vec![0; 2 * SECTOR_BYTES + 16];
        let bytes = header.as_slice();
        file[SETUP_HEADER_OFFSET..SETUP_HEADER_OFFSET + bytes.len()].copy_from_slice(bytes);
        file.extend_from_slice(payload);
        file
    }

    fn vmlinux() -> Vec<u8> {
        [ELF_MAGIC, &[7; 100_000]].concat()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn unpacks_gzip() {
        assert_eq!(KernelImage::parse(bzimage(&gzip(&vmlinux()))).unwrap().elf, vmlinux());
    }

    #[test]
    fn unpacks_xz() {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(&vmlinux()).unwrap();
        let packed = encoder.finish().unwrap();
        assert_eq!(KernelImage::parse(bzimage(&packed)).unwrap().elf, vmlinux());
    }

    #[test]
    fn unpacks_zstd() {
        let packed = ruzstd::encoding::compress_to_vec(
            &vmlinux()[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        assert_eq!(KernelImage::parse(bzimage(&packed)).unwrap().elf, vmlinux());
    }

    #[test]
    fn unpacks_lz4_with_the_appended_size() {
        let block = lz4_flex::block::compress(&vmlinux());
        let mut packed = b"\x02\x21\x4c\x18".to_vec();
        packed.extend((block.len() as u32).to_le_bytes());
        packed.extend(&block);
        packed.extend((vmlinux().len() as u32).to_le_bytes());
        assert_eq!(KernelImage::parse(bzimage(&packed)).unwrap().elf, vmlinux());
    }

    #[test]
    fn a_text_file_is_named_as_no_kernel() {
        let answer = KernelImage::parse(b"#!/bin/sh\nexit 0\n".to_vec());
        assert!(matches!(answer, Err(ImageError::NotAKernel { .. })));
    }

    #[test]
    fn a_cut_off_image_is_named() {
        let mut file = bzimage(&gzip(&vmlinux()));
        file.truncate(file.len() - 1);
        assert!(matches!(KernelImage::parse(file), Err(ImageError::CutOff { .. })));
    }

    #[test]
    fn a_damaged_payload_is_named_with_its_format() {
        let mut packed = gzip(&vmlinux());
        let middle = packed.len() / 2;
        packed[middle] ^= 0xff;
        let answer = KernelImage::parse(bzimage(&packed));
        assert!(matches!(answer, Err(ImageError::DamagedPayload { format: "gzip", .. })));
    }
}
