//! Bytes that are well-formed, for a fuzzer to start from: those that no golden file has.

use crate::machine::bz_image;

/// Every one: target, name, bytes.
#[must_use]
pub fn all() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let gzip = gzip_of_an_elf();
    vec![
        ("blk_request", "write", blk_request(1, 512)),
        ("blk_request", "flush", blk_request(4, 0)),
        ("blk_request", "discard", blk_request(11, 16)),
        ("blk_request", "identify", blk_request(8, 0)),
        ("channel_key", "key", channel_key()),
        ("disk_label", "active", disk_label("active")),
        ("disk_label", "following", disk_label("following")),
        ("http", "get", b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        (
            "http",
            "post",
            b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n{\"grace_s\":3}"
                .to_vec(),
        ),
        ("kernel", "gzip", gzip),
        ("kernel", "elf", elf()),
        ("page_tables", "code", page_tables()),
        ("registers", "console", registers()),
        ("template", "sse4", include_bytes!("../../vmm/machine/templates/sse4.toml").to_vec()),
        ("template", "small", b"name = \"x\"\n[[cpuid]]\nleaf = 0\neax.set = 1\n".to_vec()),
        ("virtqueue", "chain", virtqueue()),
        ("witness", "live", witness("live", " ran=12")),
        ("witness", "waiting", witness("waiting", " ran=9")),
        ("witness", "old", witness("live", "")),
    ]
}

/// Two bytes of how it is cut, the header, and data (virtio 1.2 §5.2.6).
fn blk_request(kind: u32, data_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![16, 1];
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(1_u64.to_le_bytes());
    bytes.resize(bytes.len() + data_bytes, 1);
    bytes
}

/// The rest of an ELF file after its first bytes (System V ABI, ELF header): one segment and one
/// executable section, which reads the counter.
fn elf() -> Vec<u8> {
    const HEADER_BYTES: u64 = 64;
    const PROGRAM_BYTES: u64 = 56;
    let code_at = HEADER_BYTES + PROGRAM_BYTES;
    let mut bytes = 1_u32.to_le_bytes().to_vec();
    bytes.extend(0x10_0000_u64.to_le_bytes());
    bytes.extend(HEADER_BYTES.to_le_bytes());
    bytes.extend((code_at + 8).to_le_bytes());
    bytes.extend([0; 4]);
    for half in [64_u16, 56, 1, 64, 1, 0] {
        bytes.extend(half.to_le_bytes());
    }
    // The segment: PT_LOAD, readable and executable.
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(5_u32.to_le_bytes());
    for word in [code_at, 0xffff_ffff_8100_0000, 0x1_0000, 8, 8, 0x1000] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([0x0f, 0x31, 0x0f, 0x01, 0xf9, 0xf4, 0xeb, 0xfd]);
    // The section: SHT_PROGBITS, SHF_ALLOC and SHF_EXECINSTR.
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    for word in [6, 0xffff_ffff_8100_0000, code_at, 8, 0, 16, 0] {
        bytes.extend(u64::to_le_bytes(word));
    }
    bytes
}

/// A bzImage whose payload is a gzip file (RFC 1952) of stored blocks (RFC 1951), cut off in its
/// checksum.
fn gzip_of_an_elf() -> Vec<u8> {
    let content = b"\x7fELF";
    let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
    gzip.extend((content.len() as u16).to_le_bytes());
    gzip.extend((!(content.len() as u16)).to_le_bytes());
    gzip.extend(content);
    bz_image(&gzip)
}

/// Tables at the second to the fifth page, which map one page of code at the bottom of the kernel's
/// last two GiB and a bit; the code is RDTSC, RDTSCP and HLT.
#[must_use]
pub fn page_tables() -> Vec<u8> {
    let mut bytes = vec![0, 1];
    bytes.extend(0xffff_ffff_8100_0000_u64.to_le_bytes());
    bytes.extend(0_u64.to_le_bytes());
    let mut memory = vec![0; 0x4000];
    for (table, index, entry) in
        [(0, 511, 0x2003_u64), (1, 510, 0x3003), (2, 8, 0x4003), (3, 0, 0x5003)]
    {
        let at = 0x1000 * table + 8 * index;
        memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    bytes.extend(memory);
    bytes.extend([0x0f, 0x31, 0x0f, 0x01, 0xf9, 0xf4, 0, 0]);
    bytes
}

/// Bytes to the console, its registers read, the clock set, time that passes.
fn registers() -> Vec<u8> {
    const CONSOLE: u16 = 0x3f8;
    let mut bytes = Vec::new();
    for (what, at, data) in [
        (1, CONSOLE + 1, 0x0f),
        (1, CONSOLE, b'x'),
        (0, CONSOLE + 2, 0),
        (5, 0, b'y'),
        (0, CONSOLE, 0),
        (1, 0x43, 0x34),
        (1, 0x40, 0xff),
        (1, 0x40, 0xff),
        (4, 0xffff, 10),
        (6, 0, 0),
        (1, 0x70, 0x0a),
        (0, 0x71, 0),
        (0x22, 0, 0),
        (0x23, 0x70, 3),
        (9, 0x0040, 0),
        (7, 0, 0),
    ] {
        bytes.push(what);
        bytes.extend(u16::to_le_bytes(at));
        bytes.extend([data, 0, 0]);
    }
    bytes
}

/// A chain of two descriptors, and a ring that offers it (virtio 1.2 §2.7): as
/// [`virtqueue`](crate::virtqueue) lays it into memory.
fn virtqueue() -> Vec<u8> {
    let mut bytes = vec![0; 0x110];
    let descriptors = [(0x2000_u64, 16_u32, 1_u16, 1_u16), (0x3000, 2048, 2, 0)];
    for (at, (address, length, flags, next)) in (0..).step_by(16).zip(descriptors) {
        bytes[at..at + 8].copy_from_slice(&address.to_le_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&length.to_le_bytes());
        bytes[at + 12..at + 14].copy_from_slice(&flags.to_le_bytes());
        bytes[at + 14..at + 16].copy_from_slice(&next.to_le_bytes());
    }
    bytes[0x102] = 1;
    bytes
}

/// `ran` is the field with a space before it, or nothing, as before there was one.
fn witness(doing: &str, ran: &str) -> Vec<u8> {
    format!(
        "ftvmm-witness-2 term=12 guest=07070707-0707-4707-8707-070707070707 \
         holder=host-a/4711 doing={doing}{ran} seen=1970-01-01T00:00:00Z\n"
    )
    .into_bytes()
}

/// Without its last line, the checksum of the others.
fn disk_label(state: &str) -> Vec<u8> {
    format!(
        "ftvmm-disk 1\nguest 07070707-0707-4707-8707-070707070707\nstate {state}\nterm 7\n\
         since 1970-01-01T00:00:00Z\n"
    )
    .into_bytes()
}

fn channel_key() -> Vec<u8> {
    format!("ftvmm-channel-key-1 {}\n", "0f".repeat(32)).into_bytes()
}
