//! What may be fed any bytes: from a peer, a file, a client or a guest.
//!
//! Each function here takes bytes and must come back: no panic, no endless loop, no memory beyond
//! the bounds of the format. In every `cargo test`, `fuzz/tests/never_panic.rs` runs them on random
//! bytes, and `fuzz/tests/corpus.rs` on each file of `fuzz/corpus`. libFuzzer runs them for as long
//! as it is left:
//!
//! ```sh
//! cargo xtask fuzz --seconds 600 wire    # all of them without a name
//! cargo run --package ftvmm-fuzz --bin fuzz_wire -- FILE    # the same bytes again
//! ```
//!
//! Checksums are made to hold, because no fuzzer finds one that does.

mod guest;
mod machine;
#[doc(hidden)]
pub mod seeds;
mod small;
mod stream;

use ftvmm_replication::wire::{Decoder, PREAMBLE};
use ftvmm_replication::{LogReader, SnapshotReader, peek_group};
use ftvmm_runtime::control::http::Connection;

pub use guest::{blk_request, virtqueue};
pub use machine::{kernel, machine_state, page_tables, template};
pub use small::{channel_key, disk_label, registers, slice, state_part, witness};

use crate::stream::Client;

/// A recording and a snapshot that are whole, for their headers.
const LOG: &[u8] = include_bytes!("../../replication/tests/golden/log-v5.bin");
const SNAPSHOT: &[u8] = include_bytes!("../../replication/tests/golden/snapshot-v3.bin");

/// A function of this crate.
pub type Target = fn(&[u8]);

/// Every function of this crate, by the name of its target.
pub const TARGETS: [(&str, Target); 17] = [
    ("blk_request", blk_request),
    ("channel_key", channel_key),
    ("decode_group", decode_group),
    ("disk_label", disk_label),
    ("http", http),
    ("kernel", kernel),
    ("log", log),
    ("machine_state", machine_state),
    ("page_tables", page_tables),
    ("registers", registers),
    ("slice", slice),
    ("snapshot", snapshot),
    ("state_part", state_part),
    ("template", template),
    ("virtqueue", virtqueue),
    ("wire", wire),
    ("witness", witness),
];

/// Makes a fuzz target of a function of this crate: with the feature `libfuzzer` libFuzzer's,
/// without it a program that runs the function on each file that it is given.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        #[cfg(feature = "libfuzzer")]
        $crate::libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::$name(bytes));

        #[cfg(not(feature = "libfuzzer"))]
        fn main() -> std::io::Result<()> {
            $crate::run_files($crate::$name)
        }
    };
}

#[cfg(feature = "libfuzzer")]
#[doc(hidden)]
pub use libfuzzer_sys;

/// Runs a function on each file named on the command line.
///
/// # Errors
/// When a file cannot be read.
pub fn run_files(run: Target) -> std::io::Result<()> {
    for file in std::env::args_os().skip(1) {
        run(&std::fs::read(file)?);
    }
    Ok(())
}

/// A group of log records: as it comes, and as the payload of a group whose length and checksum
/// hold.
pub fn decode_group(bytes: &[u8]) {
    let _ = peek_group(bytes);
    let _ = ftvmm_replication::decode_group(bytes);
    let _ = ftvmm_replication::decode_group(&group(bytes));
}

/// A recording: as it comes, and as the groups after a header that holds.
pub fn log(bytes: &[u8]) {
    read_log(bytes);
    let header_bytes = file_header_bytes(LOG);
    read_log(&[&LOG[..header_bytes], bytes].concat());
    read_log(&[&LOG[..header_bytes], &group(bytes)].concat());
}

/// A snapshot: as it comes, and as a part after a header that holds.
pub fn snapshot(bytes: &[u8]) {
    read_snapshot(bytes);
    let header = &SNAPSHOT[..file_header_bytes(SNAPSHOT)];
    read_snapshot(&[header, bytes].concat());
    let length = (bytes.len() as u32).to_le_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&length), bytes).to_le_bytes();
    read_snapshot(&[header, &length, &crc, bytes].concat());
}

/// What comes from a peer: as a stream in two pieces, and as a message whose frame holds; the first
/// byte is its tag.
pub fn wire(bytes: &[u8]) {
    decode(bytes);
    decode(&stream(bytes));
}

/// What a client of the control socket sends.
pub fn http(bytes: &[u8]) {
    let mut connection = Connection::new(Client::new(bytes));
    while let Ok(request) = connection.receive() {
        if request.is_last {
            break;
        }
    }
}

fn decode(bytes: &[u8]) {
    let mut decoder = Decoder::new();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    for piece in [first, second] {
        decoder.push(piece);
        while let Ok(Some(_)) = decoder.next_message() {}
    }
}

/// A stream with one message, whose tag is the first byte: `docs/protocol.md`, "On the wire".
fn stream(bytes: &[u8]) -> Vec<u8> {
    let Some((tag, body)) = bytes.split_first() else { return PREAMBLE.to_vec() };
    let length = (body.len() as u32).to_le_bytes();
    let head = crc32c::crc32c_append(crc32c::crc32c(&length), &[*tag]);
    let crc = crc32c::crc32c_append(head, body).to_le_bytes();
    [&PREAMBLE[..], &length, &crc, &[*tag], body].concat()
}

fn read_log(bytes: &[u8]) {
    if let Ok(mut reader) = LogReader::new(bytes) {
        while let Ok(Some(_)) = reader.next_group() {}
    }
}

fn read_snapshot(bytes: &[u8]) {
    if let Ok(mut reader) = SnapshotReader::new(bytes) {
        while let Ok(Some(_)) = reader.next_part() {}
    }
}

/// A group with this payload: `docs/log-format.md`, "A group".
fn group(payload: &[u8]) -> Vec<u8> {
    let mut group = Vec::new();
    let mut length = payload.len();
    while length >= 0x80 {
        group.push(length as u8 | 0x80);
        length >>= 7;
    }
    group.push(length as u8);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&group), payload);
    group.extend(crc.to_le_bytes());
    group.extend(payload);
    group
}

/// Magic, version, length and checksum, and the header itself: `docs/log-format.md`, "The file".
fn file_header_bytes(file: &[u8]) -> usize {
    let length = file[12..16].try_into().map_or(0, u32::from_le_bytes);
    20 + length as usize
}

#[cfg(test)]
mod tests {
    use ftvmm_replication::wire::WireError;

    use super::*;

    /// Were it wrong, nothing behind a checksum would ever be reached.
    #[test]
    fn what_is_put_around_the_bytes_holds() {
        assert!(LogReader::new(&LOG[..file_header_bytes(LOG)]).is_ok());
        assert!(SnapshotReader::new(&SNAPSHOT[..file_header_bytes(SNAPSHOT)]).is_ok());
        let mut decoder = Decoder::new();
        decoder.push(&stream(&[0xff, 1]));
        assert_eq!(decoder.next_message(), Err(WireError::Malformed { tag: 0xff }));
        // No records, raw, at exit 300.
        for payload in [&[1, 0xac, 2][..], &[1, 0x80, 0x80, 0x80, 1]] {
            assert!(peek_group(&group(payload)).is_ok());
        }
        assert!(peek_group(&group(&[1; 300])).is_ok(), "a length of two bytes");
    }
}
