//! Statistics and differences of small logs.

use super::*;
use crate::fingerprint::tests::example;
use crate::group::GroupEncoder;
use crate::log::{LogHeader, LogWriter};
use crate::record::{EndReason, Ordinal, Record, SnapshotMark};
use ftvmm_devices::DiskOutcome;

fn disk_done(id: u64, outcome: DiskOutcome) -> Event {
    Event::Input(Input::DiskDone { id, outcome })
}

pub(crate) fn records() -> Vec<Record> {
    let at = |at, event| Record { at: Ordinal(at), event };
    let reason = EndReason::PowerOff;
    let end = End { state_digest: [0xab; 32], chain: 1, outputs: 2, reason };
    vec![
        at(3, Event::Input(Input::Time { now_ns: 10_000_000 })),
        at(3, Event::Input(Input::NetRx { frame: vec![1; 72] })),
        at(4, Event::Check(Box::new(crate::Check { chain: 77, ..Default::default() }))),
        at(9, Event::Input(Input::ConsoleRx { bytes: b"ls\n".to_vec() })),
        at(9, Event::Input(Input::Entropy { bytes: vec![7; 64] })),
        at(10, disk_done(1, DiskOutcome::Done { data: vec![5; 512] })),
        at(10, disk_done(2, DiskOutcome::Failed)),
        at(11, Event::Input(Input::PowerButton)),
        at(12, Event::Snapshot(SnapshotMark { path: "/s".into(), memory_digest: 1 })),
        at(12, Event::Input(Input::Time { now_ns: 2_000_000_000 })),
        at(20, Event::End(end)),
    ]
}

pub(crate) fn file(records: &[Record], records_per_group: usize, rtc_epoch_s: u64) -> Vec<u8> {
    let header = LogHeader {
        build: crate::build_id::tests::example(),
        fingerprint: example(),
        rtc_epoch_s,
        kernel_path: "/boot/bzImage".into(),
        initramfs_path: None,
        start: None,
    };
    let mut writer = LogWriter::new(Vec::new(), &header).unwrap();
    let mut encoder = GroupEncoder::new();
    for group in records.chunks(records_per_group) {
        group.iter().for_each(|record| encoder.push(record));
        let horizon = group.last().unwrap().at.0 - 1;
        writer.write_group(&encoder.finish(Ordinal(horizon))).unwrap();
    }
    let horizon = records.last().unwrap().at.max(Ordinal(20));
    writer.write_group(&encoder.finish(horizon)).unwrap();
    writer.finish().unwrap()
}

#[test]
fn everything_is_counted() {
    let bytes = file(&records(), 4, 5);
    let stat = stat(&mut LogReader::new(&bytes[..]).unwrap()).unwrap();
    let expected = LogStat {
        build: "0.1.0+0123456789abcdef".into(),
        exits: 20,
        groups: 4,
        log_bytes: bytes.len() as u64,
        duration_ns: 2_000_000_000,
        time_inputs: 2,
        net_rx_inputs: 1,
        net_rx_bytes: 72,
        console_rx_inputs: 1,
        console_rx_bytes: 3,
        entropy_inputs: 1,
        entropy_bytes: 64,
        disk_inputs: 2,
        disk_bytes: 512,
        other_inputs: 1,
        checks: 1,
        slices: 0,
        slice_bytes: 0,
        snapshots: 1,
        end_reason: Some("power-off".into()),
        state_digest: Some("ab".repeat(32)),
        torn_at_bytes: None,
    };
    assert_eq!(stat, expected);
    let text = stat.to_string();
    assert!(text.contains("inputs      8\n"), "{text}");
    assert!(text.contains("guest time  2.000 s\n"), "{text}");
    assert!(text.contains("end         power-off\n"), "{text}");
}

#[test]
fn a_tear_is_reported() {
    let bytes = file(&records(), 6, 5);
    let stat = stat(&mut LogReader::new(&bytes[..bytes.len() - 1]).unwrap()).unwrap();
    assert_eq!(stat.torn_at_bytes, Some(stat.log_bytes));
    assert!(stat.log_bytes < bytes.len() as u64 - 1);
}
