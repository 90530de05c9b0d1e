//! Kernel files: an ELF as it is, or a bzImage whose payload is decompressed here and never by the
//! guest's own stub (the stub reads the TSC for KASLR; decision 0022).

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
pub const UNPACKED_BYTES_MAX: u64 = 512 << 20;
/// Linux packs with the legacy LZ4 frame: blocks of at most 8 MiB unpacked.
const LZ4_LEGACY_BLOCK_BYTES: usize = 8 << 20;

/// What the xz decoder may take: its dictionary is as large as the file says. Linux packs with 128
/// MiB at most.
const XZ_MEMORY_BYTES_MAX: u64 = 256 << 20;

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
        "is no kernel: it starts with {first_bytes:02x?}; wanted is an x86-64 bzImage or ELF \
         vmlinux"
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
    /// An ELF file for another processor.
    #[error("is a {bits}-bit ELF for {machine}; wanted is a 64-bit one for x86-64")]
    OtherElf {
        /// Of its class.
        bits: u8,
        /// Its machine, by name where there is one here.
        machine: String,
    },
    /// It has a boot protocol header but no packed kernel.
    #[error(
        "has a bzImage's header and no packed kernel, as memtest86+ and boot loaders have: it \
         would run in 16- or \
         32-bit mode, which this machine does not start in; wanted is a Linux bzImage or an x86-64 \
         ELF vmlinux"
    )]
    NoPayload,
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
    #[error("has a damaged {format} payload: {cause}")]
    DamagedPayload {
        /// Which format.
        format: &'static str,
        /// The cause.
        cause: std::io::Error,
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
            check_elf(&file)?;
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
        if header.payload_length == 0 {
            return Err(ImageError::NoPayload);
        }
        let payload =
            file.get(start..end).ok_or(ImageError::CutOff { end, file_bytes: file.len() })?;
        let elf = unpack(payload)?;
        if !elf.starts_with(ELF_MAGIC) {
            return Err(ImageError::NotAKernel { first_bytes: first_bytes(&elf) });
        }
        check_elf(&elf)?;
        Ok(Self { elf, header })
    }
}

/// Refuses an ELF file that is for another processor (System V ABI, ELF header: EI_CLASS,
/// e_machine).
fn check_elf(file: &[u8]) -> Result<(), ImageError> {
    const CLASS: usize = 4;
    const MACHINE: usize = 18;
    let bits = match file.get(CLASS) {
        Some(1) => 32,
        _ => 64,
    };
    let machine = match file.get(MACHINE..MACHINE + 2) {
        Some(bytes) => u16::from_le_bytes([bytes[0], bytes[1]]),
        None => 0,
    };
    let name = match machine {
        62 if bits == 64 => return Ok(()),
        3 => "Intel 80386".to_owned(),
        62 => "x86-64".to_owned(),
        183 => "AArch64".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("machine {other}"),
    };
    Err(ImageError::OtherElf { bits, machine: name })
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
    unpack(payload).map_err(|cause| ImageError::DamagedPayload { format, cause })
}

fn read_bounded(reader: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(UNPACKED_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > UNPACKED_BYTES_MAX { Err(too_long()) } else { Ok(bytes) }
}

fn too_long() -> std::io::Error {
    std::io::Error::other(format!("it unpacks to more than {} MiB", UNPACKED_BYTES_MAX >> 20))
}

fn unpack_gzip(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    read_bounded(flate2::read::GzDecoder::new(payload))
}

fn unpack_xz(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES_MAX, 0)?;
    read_bounded(liblzma::read::XzDecoder::new_stream(payload, stream))
}

fn unpack_zstd(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    let decoder =
        ruzstd::decoding::StreamingDecoder::new(payload).map_err(std::io::Error::other)?;
    read_bounded(decoder)
}

/// A magic, then blocks of (packed size, bytes). Linux appends the unpacked size behind the last
/// block, too short to be one.
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
        if unpacked.len() as u64 > UNPACKED_BYTES_MAX {
            return Err(too_long());
        }
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
        elf(2, 62)
    }

    fn elf(class: u8, machine: u16) -> Vec<u8> {
        let mut file = [ELF_MAGIC, &[7; 100_000]].concat();
        file[4] = class;
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file
    }

    #[test]
    fn an_elf_for_another_processor_is_named() {
        for (class, machine, says) in
            [(1, 3, "32-bit ELF for Intel 80386"), (2, 183, "64-bit ELF for AArch64")]
        {
            let error = KernelImage::parse(elf(class, machine)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn what_packs_no_kernel_is_named() {
        let error = KernelImage::parse(bzimage(&[])).unwrap_err().to_string();
        assert!(error.contains("memtest86+"), "{error}");
    }

    #[test]
    fn every_format_stops_at_the_same_length() {
        let zeroes = vec![0; LZ4_LEGACY_BLOCK_BYTES];
        let blocks = UNPACKED_BYTES_MAX as usize / zeroes.len() + 1;
        let block = lz4_flex::block::compress(&zeroes);
        let packed = [&(block.len() as u32).to_le_bytes()[..], &block].concat().repeat(blocks);
        let lz4 = [&b"\x02\x21\x4c\x18"[..], &packed].concat();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        (0..blocks).for_each(|_| gzip.write_all(&zeroes).unwrap());
        for packed in [lz4, gzip.finish().unwrap()] {
            let error = KernelImage::parse(bzimage(&packed)).unwrap_err().to_string();
            assert!(error.contains("unpacks to more than 512 MiB"), "{error}");
        }
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

    #[test]
    fn what_a_bzimage_must_say_is_checked_in_turn() {
        let told = |change: fn(&mut setup_header), payload: &[u8]| {
            let mut file = bzimage(payload);
            let mut header = setup_header_of(&file).unwrap();
            change(&mut header);
            let bytes = header.as_slice();
            file[SETUP_HEADER_OFFSET..SETUP_HEADER_OFFSET + bytes.len()].copy_from_slice(bytes);
            KernelImage::parse(file).unwrap_err().to_string()
        };
        let packed = gzip(&vmlinux());
        let old = told(|header| header.version = 0x0207, &packed);
        assert!(old.contains("boot protocol 0x0207, oldest supported is 0x0208"), "{old}");
        let unknown = told(|_| {}, b"BZh91AY&SY");
        assert!(unknown.contains("payload that starts with [42, 5a, 68"), "{unknown}");
        let no_kernel = told(|_| {}, &gzip(b"#!/bin/sh"));
        assert!(no_kernel.contains("is no kernel: it starts with [23, 21"), "{no_kernel}");
        let no_magic = told(|header| header.header = 0, &packed);
        assert!(no_magic.contains("is no kernel"), "{no_magic}");
        for (machine, says) in [(3, "Intel 80386"), (243, "RISC-V"), (8, "machine 8")] {
            let error = told(|_| {}, &gzip(&elf(2, machine)));
            assert!(error.contains(&format!("64-bit ELF for {says}")), "{error}");
        }
        let narrow = told(|_| {}, &gzip(&elf(1, 62)));
        assert!(narrow.contains("32-bit ELF for x86-64"), "{narrow}");
        let cut = KernelImage::parse(ELF_MAGIC.to_vec()).unwrap_err().to_string();
        assert!(cut.contains("machine 0"), "{cut}");
    }

    #[test]
    fn no_number_of_setup_sectors_means_four() {
        let packed = gzip(&vmlinux());
        let mut file = bzimage(&packed);
        let mut header = setup_header_of(&file).unwrap();
        header.setup_sects = 0;
        let bytes = header.as_slice();
        file[SETUP_HEADER_OFFSET..SETUP_HEADER_OFFSET + bytes.len()].copy_from_slice(bytes);
        file.splice(2 * SECTOR_BYTES..2 * SECTOR_BYTES, [0; 3 * SECTOR_BYTES]);
        assert_eq!(KernelImage::parse(file).unwrap().elf, vmlinux());
    }

    #[test]
    fn an_lz4_block_that_is_cut_is_damage() {
        let block = lz4_flex::block::compress(&vmlinux());
        let size = (block.len() as u32).to_le_bytes();
        let packed = [&b"\x02\x21\x4c\x18"[..], &size, &block[..block.len() - 1]].concat();
        let answer = KernelImage::parse(bzimage(&packed));
        assert!(matches!(answer, Err(ImageError::DamagedPayload { format: "lz4", .. })));
    }
}
