//! The documents say what the code does: names in tables, and the golden file byte by byte.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod golden;

use std::path::Path;

use ftvmm_devices::{DiskOutcome, Input};
use ftvmm_replication::log::LOG_VERSION;
use ftvmm_replication::session::decision::DECISIONS;
use ftvmm_replication::snapshot::SNAPSHOT_VERSION;
use ftvmm_replication::{
    Check, CpuCheck, DiskAnswer, End, EndReason, Event, Fingerprint, Group, GroupEncoder,
    LogHeader, LogReader, LogWriter, Message, OnPanic, OnReset, Ordinal, Record, SnapshotMark,
    SnapshotReader, SnapshotWriter, StatePart, Tail, TscMode, decode_group,
};
use golden::Golden;

/// The golden file of that name, which is what the code makes `now`.
fn golden_file(name: &'static str, version: u32, constant: &'static str, now: &[u8]) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let (extension, package) = ("bin", "ftvmm-replication");
    Golden { folder, name, extension, version, constant, package }.check(now)
}

fn golden_log() -> Vec<u8> {
    golden_file("log", LOG_VERSION, "LOG_VERSION in replication/src/log.rs", &written())
}

fn golden_snapshot() -> Vec<u8> {
    let constant = "SNAPSHOT_VERSION in replication/src/snapshot.rs";
    golden_file("snapshot", SNAPSHOT_VERSION, constant, &written_snapshot())
}

/// A compressed group as version 1 wrote it. What an encoder makes of the same records may change
/// with the lz4 library; that this decodes may not.
const GOLDEN_LZ4: &str =
    "2623b9b9430607018305ff04038005474554202f20485454502f312e310d0a1000ffff59602f312e310d0a";

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    std::fs::read_to_string(path).unwrap()
}

/// Rows of the table under the heading, cells trimmed, without its two head lines.
fn table(document: &str, heading: &str) -> Vec<Vec<String>> {
    let section = document.split("\n## ").find(|section| section.starts_with(heading));
    let section = section.unwrap_or_else(|| panic!("no section {heading}"));
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    let cells = |row: &str| {
        row.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    rows.map(cells).collect()
}

fn columns(rows: &[Vec<String>], indices: &[usize]) -> Vec<String> {
    rows.iter()
        .map(|row| indices.iter().map(|i| row[*i].as_str()).collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn the_message_table_is_the_enum() {
    let documented = columns(&table(&document("protocol.md"), "Messages"), &[0, 1]);
    let defined: Vec<String> =
        Message::TAGS.iter().map(|(tag, name)| format!("{tag} {name}")).collect();
    assert_eq!(documented, defined);
}

#[test]
fn the_decision_table_is_the_code() {
    let documented = columns(&table(&document("protocol.md"), "Decisions"), &[0, 1, 2, 3, 4]);
    let defined: Vec<String> = DECISIONS
        .iter()
        .map(|row| {
            let (letter, reason) = (row.letter, row.reason);
            format!("{letter} {:?} {:?} {:?} {reason}", row.situation, row.trouble, row.decision)
        })
        .collect();
    for (documented, defined) in documented.iter().zip(&defined) {
        assert_eq!(documented, defined);
    }
    assert_eq!(documented.len(), defined.len());
}

#[test]
fn every_state_is_in_the_diagram() {
    let document = document("protocol.md");
    let primary = include_str!("../src/session/primary.rs");
    let backup = include_str!("../src/session/backup.rs");
    let mut states = 0;
    for source in [primary, backup] {
        let body = source.split("fn state_name").nth(1).unwrap().split("fn ").next().unwrap();
        for name in body.split("=> \"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
            states += 1;
            assert!(document.contains(name), "{name} is not in the document");
        }
    }
    assert_eq!(states, 18);
}

fn header() -> LogHeader {
    LogHeader {
        build: "0.1.0+0123456789abcdef".try_into().unwrap(),
        fingerprint: Fingerprint {
            protocol_version: 4,
            kernel_sha256: [0x11; 32],
            initramfs_sha256: Some([0x22; 32]),
            disk_bytes: Some(1 << 20),
            disk_sha256: Some([0x44; 32]),
            cmdline: "console=ttyS0".into(),
            cpu_template: "x86-64-v1".into(),
            cpu_template_sha256: [0x33; 32],
            tsc: TscMode::Trap,
            memory_mib: 128,
            net_mac: Some([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]),
            net_mtu: Some(1500),
            on_reset: OnReset::Restart,
            on_panic: OnPanic::End,
        },
        rtc_epoch_s: 1_700_000_000,
        kernel_path: "bzImage".into(),
        initramfs_path: Some("initrd".into()),
        start: None,
    }
}

fn at(at: u64, event: Event) -> Record {
    Record { at: Ordinal(at), event }
}

fn groups() -> Vec<Group> {
    let cpu = CpuCheck { digest: 5, registers: [1; 18], code: vec![0x90] };
    let check = Check { chain: 6, cpu, memory: None };
    let read = DiskOutcome::Done { data: vec![0xdd, 0xdd] };
    let new_identity = Input::NewIdentity { generation_id: [0x99; 16], unix_s: 1_700_000_000 };
    let reason = EndReason::PowerOff;
    let end = End { state_digest: [0xee; 32], chain: 10, outputs: 11, reason };
    vec![
        Group {
            horizon: Ordinal(1000),
            records: vec![
                at(980, Event::Input(Input::Time { now_ns: 10_000_000 })),
                at(980, Event::Input(Input::Time { now_ns: 10_000_001 })),
                at(994, Event::Input(Input::NetRx { frame: vec![0xaa, 0xbb, 0xcc] })),
                at(1000, Event::Check(Box::new(check))),
                at(1000, Event::Snapshot(SnapshotMark { path: "s1".into(), memory_digest: 9 })),
                at(1001, Event::Input(Input::ConsoleRx { bytes: b"ls\n".to_vec() })),
            ],
        },
        Group { horizon: Ordinal(1200), records: vec![] },
        Group {
            horizon: Ordinal(1300),
            records: vec![
                at(1201, Event::Input(Input::Time { now_ns: 20_000_000 })),
                at(1210, Event::Input(Input::DiskDone { id: 5, outcome: read })),
                at(1210, Event::Input(Input::DiskDone { id: 6, outcome: DiskOutcome::Failed })),
                at(1211, Event::DiskAnswer(DiskAnswer { id: 7, data_xxh3: Some(0x0102) })),
                at(1211, Event::DiskAnswer(DiskAnswer { id: 8, data_xxh3: None })),
                at(1212, Event::Input(Input::PowerButton)),
                at(1212, Event::Input(Input::Nmi)),
                at(1212, Event::Input(Input::ConsoleBreak)),
                at(1212, Event::Input(Input::NetAnnounce)),
                at(1229, Event::Input(new_identity)),
                at(1300, Event::End(end)),
            ],
        },
    ]
}

fn written() -> Vec<u8> {
    let mut writer = LogWriter::new(Vec::new(), &header()).unwrap();
    let mut encoder = GroupEncoder::new();
    for group in groups() {
        group.records.iter().for_each(|record| encoder.push(record));
        writer.write_group(&encoder.finish(group.horizon)).unwrap();
    }
    writer.finish().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_golden_file_is_read_and_written_as_ever() {
    let golden = golden_log();
    let mut reader = LogReader::new(&golden[..]).unwrap();
    assert_eq!(reader.header(), &header());
    for group in groups() {
        assert_eq!(reader.next_group().unwrap(), Some(group));
    }
    assert_eq!(reader.next_group().unwrap(), None);
    assert_eq!(reader.tail(), Some(&Tail::Clean));
}

/// Every byte of `golden` is in the document's table, in order.
fn assert_documented(name: &str, golden: &[u8]) {
    let mut offset = 0;
    for row in table(&document(name), "The golden file") {
        assert_eq!(row[0], offset.to_string(), "offset of {:?}", row[2]);
        let bytes = row[1].replace(' ', "");
        let bytes = match bytes.split_once('×') {
            Some((byte, count)) => byte.repeat(count.parse().unwrap()),
            None => bytes,
        };
        let end = offset + bytes.len() / 2;
        assert_eq!(bytes, hex(&golden[offset..end]), "{:?}", row[2]);
        offset = end;
    }
    assert_eq!(offset, golden.len());
}

#[test]
fn the_golden_file_is_documented_byte_by_byte() {
    assert_documented("log-format.md", &golden_log());
}

fn snapshot_parts() -> Vec<StatePart> {
    vec![
        StatePart::Outline { total_bytes: 4096 },
        StatePart::Pages(vec![0xaa, 0xbb]),
        StatePart::Blocks(vec![0xcc]),
        StatePart::Machine(vec![0xdd, 0xee, 0xff]),
    ]
}

fn written_snapshot() -> Vec<u8> {
    let mut writer = SnapshotWriter::new(Vec::new(), &header()).unwrap();
    snapshot_parts().iter().for_each(|part| writer.write_part(part).unwrap());
    writer.finish().unwrap()
}

#[test]
fn the_golden_snapshot_is_read_and_written_as_ever() {
    let golden = golden_snapshot();
    let mut reader = SnapshotReader::new(&golden[..]).unwrap();
    assert_eq!(reader.header(), &header());
    for part in snapshot_parts() {
        assert_eq!(reader.next_part().unwrap(), Some(part));
    }
    assert_eq!(reader.next_part().unwrap(), None);
}

#[test]
fn the_golden_snapshot_is_documented_byte_by_byte() {
    assert_documented("snapshot-format.md", &golden_snapshot());
}

fn compressible() -> Group {
    let frame = b"GET / HTTP/1.1\r\n".repeat(40);
    Group { horizon: Ordinal(7), records: vec![at(7, Event::Input(Input::NetRx { frame }))] }
}

#[test]
fn a_compressed_group_of_version_1_is_read() {
    let digits = GOLDEN_LZ4.as_bytes().chunks(2);
    let bytes: Vec<u8> =
        digits.map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect();
    assert_eq!(decode_group(&bytes), Ok(compressible()));
}
