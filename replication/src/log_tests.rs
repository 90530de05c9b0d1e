//! What the log file promises: everything before a tear, and damage told from a tear.

use proptest::prelude::*;

use super::*;
use crate::file_header::HEADER_BYTES_MAX;
use crate::fingerprint::tests::example;
use crate::group::GroupEncoder;
use crate::record::{Event, Record};
use ftvmm_devices::Input;

fn header() -> LogHeader {
    LogHeader {
        build: crate::build_id::tests::example(),
        fingerprint: example(),
        rtc_epoch_s: 1_700_000_000,
        kernel_path: "/boot/bzImage".into(),
        initramfs_path: None,
        start: None,
    }
}

fn net(at: u64, frame: &[u8]) -> Record {
    Record { at: Ordinal(at), event: Event::Input(Input::NetRx { frame: frame.to_vec() }) }
}

/// A file of `count` groups, and the offset at which each ends.
fn file(count: u64) -> (Vec<u8>, Vec<usize>) {
    let mut encoder = GroupEncoder::new();
    let mut writer = LogWriter::new(Vec::new(), &header()).unwrap();
    let mut ends = vec![writer.written_bytes() as usize];
    for index in 1..=count {
        encoder.push(&net(index * 10, &[index as u8; 33]));
        writer.write_group(&encoder.finish(Ordinal(index * 10))).unwrap();
        ends.push(writer.written_bytes() as usize);
    }
    (writer.finish().unwrap(), ends)
}

fn read_all(bytes: &[u8]) -> Result<(u64, Tail), LogError> {
    let mut reader = LogReader::new(bytes)?;
    let mut count = 0;
    while let Some(group) = reader.next_group()? {
        count += 1;
        assert_eq!(group.records, [net(count * 10, &[count as u8; 33])]);
    }
    Ok((count, reader.tail().cloned().unwrap()))
}

#[test]
fn what_is_written_is_read() {
    let (bytes, ends) = file(20);
    assert_eq!(LogReader::new(&bytes[..]).unwrap().header(), &header());
    assert_eq!(read_all(&bytes).unwrap(), (20, Tail::Clean));
    assert_eq!(bytes.len(), *ends.last().unwrap());
}

#[test]
fn the_version_is_readable_from_the_first_bytes_alone() {
    let (bytes, _) = file(0);
    assert_eq!(bytes[..8], LOG_MAGIC);
    assert_eq!(bytes[8..12], LOG_VERSION.to_le_bytes());
    let mut older = bytes[..12].to_vec();
    older[8] = 4;
    let error = LogReader::new(&older[..]).unwrap_err();
    assert_eq!(error.to_string(), "log has version 4, this program reads version 5");
}

#[test]
fn a_foreign_file_is_named() {
    let error = LogReader::new(&b"\x7fELF\x02\x01\x01\x00 and so on"[..]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "not an ftvmm log: it begins with \"\\x7fELF\\x02\\x01\\x01\\x00\""
    );
    assert!(matches!(LogReader::new(&b""[..]), Err(LogError::Header(HeaderError::Foreign { .. }))));
}

#[test]
fn every_truncation_yields_the_groups_before_it() {
    let (bytes, ends) = file(5);
    for length in 0..bytes.len() {
        let whole = ends.iter().filter(|end| **end <= length).count();
        let read = read_all(&bytes[..length]);
        if length == 0 {
            assert!(matches!(read, Err(LogError::Header(HeaderError::Foreign { .. }))));
        } else if whole == 0 {
            let Err(LogError::Header(HeaderError::Torn { got_bytes, .. })) = read else {
                panic!("cut at {length}")
            };
            assert_eq!(got_bytes, length as u64);
        } else {
            let (count, tail) = read.unwrap();
            assert_eq!(count, whole as u64 - 1, "cut at {length}");
            match tail {
                Tail::Clean => assert!(ends.contains(&length)),
                Tail::Torn { offset_bytes, .. } => {
                    assert!(!ends.contains(&length));
                    assert_eq!(offset_bytes, ends[whole - 1] as u64);
                }
            }
        }
    }
}

#[test]
fn a_tail_of_zeroes_is_a_tear() {
    let (mut bytes, ends) = file(3);
    bytes.truncate(ends[2] + 7);
    bytes.resize(ends[2] + 4096, 0);
    let (count, tail) = read_all(&bytes).unwrap();
    assert_eq!(count, 2);
    assert!(matches!(tail, Tail::Torn { offset_bytes, .. } if offset_bytes == ends[2] as u64));
}

#[test]
fn any_flipped_bit_before_the_last_group_is_damage() {
    let (bytes, ends) = file(4);
    for bit in 0..ends[3] * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        match read_all(&flipped) {
            Err(LogError::GroupDamaged { offset_bytes, .. }) => {
                let damaged = ends.iter().rposition(|end| *end <= bit / 8).unwrap();
                assert_eq!(offset_bytes, ends[damaged] as u64, "bit {bit}");
            }
            Err(_) => assert!(bit / 8 < ends[0], "bit {bit} is not in the header"),
            Ok(read) => panic!("bit {bit} went unnoticed: {read:?}"),
        }
    }
}

#[test]
fn damage_in_a_group_larger_than_the_scan_is_damage() {
    let mut random = fastrand::Rng::with_seed(1);
    let mut encoder = GroupEncoder::new();
    let mut writer = LogWriter::new(Vec::new(), &header()).unwrap();
    for at in 1..=60 {
        let frame: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(60_000).collect();
        encoder.push(&net(at, &frame));
    }
    writer.write_group(&encoder.finish(Ordinal(60))).unwrap();
    let end = writer.written_bytes() as usize;
    assert!(end > 2 * SCAN_BYTES);
    encoder.push(&net(70, &[7; 33]));
    writer.write_group(&encoder.finish(Ordinal(70))).unwrap();
    let mut bytes = writer.finish().unwrap();
    bytes[end / 2] ^= 1;
    let mut reader = LogReader::new(&bytes[..]).unwrap();
    assert!(matches!(reader.next_group(), Err(LogError::GroupDamaged { .. })));
    // With nothing behind it, it is a tear.
    let mut reader = LogReader::new(&bytes[..end]).unwrap();
    assert!(matches!(reader.next_group(), Ok(None)));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = read_all(&bytes);
        let (mut file, _) = file(1);
        file.extend_from_slice(&bytes);
        if let Ok(mut reader) = LogReader::new(&file[..]) {
            while let Ok(Some(_)) = reader.next_group() {}
        }
    }
}

/// Gives one byte a read, as a pipe may.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(1);
        self.0.read(&mut buffer[..wanted])
    }
}

#[test]
fn short_reads_make_no_difference() {
    let (bytes, _) = file(3);
    let mut reader = LogReader::new(Trickle(&bytes)).unwrap();
    for index in 1..=3 {
        assert_eq!(reader.next_group().unwrap().unwrap().horizon, Ordinal(index * 10));
    }
    assert!(reader.next_group().unwrap().is_none());
    assert_eq!(reader.tail(), Some(&Tail::Clean));
}

#[test]
fn a_header_beyond_the_limit_is_refused() {
    let mut header = header();
    header.fingerprint.cmdline = "x".repeat(HEADER_BYTES_MAX as usize);
    let error = LogWriter::new(Vec::new(), &header).unwrap_err();
    assert!(matches!(error, LogError::Header(HeaderError::TooLong { .. })));
}
