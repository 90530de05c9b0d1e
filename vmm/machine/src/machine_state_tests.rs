//! The bytes of a machine's state are pinned, down to the devices' and KVM's structures.
//!
//! The examples are made of JSON, so that the private fields of every part can be given by name: a
//! field that is added is missing here and fails, one that moves changes the bytes.

use std::path::Path;

use ftvmm_devices::{
    DiskOp, DiskRequest, GuestFault, HeaderProblem, Output, PowerEvent, VlanKind, ZeroRange,
};
use ftvmm_replication::PROTOCOL_VERSION;
use ftvmm_replication::encoding::encode;
use serde_json::{Value, json};

use super::*;
use golden::{Golden, every};

#[path = "../../../replication/tests/golden/mod.rs"]
mod golden;

fn golden(name: &'static str, version: u32, constant: &'static str) -> Golden {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    Golden { folder, name, extension: "txt", version, constant, package: "ftvmm-machine" }
}

/// A structure of KVM's as its bytes; their number is checked by serde, which refuses more.
fn structure(bytes: usize) -> Value {
    (0..bytes).map(|at| Value::from(at % 251 + 1)).collect()
}

fn vcpu() -> Value {
    json!({
        "regs": structure(144),
        "sregs": structure(312),
        "xsave": structure(4096),
        "xcrs": structure(392),
        "debug": structure(128),
        "msrs": (1..=9u64).map(|msr| Value::from(msr << 40)).collect::<Value>(),
        "events": structure(64),
    })
}

fn chip(init_step: &str, first: u8) -> Value {
    json!({
        "lines": first, "requests": first + 1, "in_service": first + 2, "mask": first + 3,
        "level_triggered": first + 4, "vector_base": first + 5, "highest": first + 6,
        "init_step": init_step, "single": true, "needs_icw4": true, "auto_eoi": true,
        "rotate_on_auto_eoi": true, "special_fully_nested": true, "special_mask": true,
        "read_in_service": true, "poll": true,
    })
}

fn counter(access: &str, first: u16) -> Value {
    json!({
        "mode_bits": 5, "bcd": true, "access": access, "count": u32::from(first) + 0x1_0000,
        "first_byte": 6, "read_high_next": true, "latched_count": first + 1, "latched_status": 7,
        "run": { "at_tick": u64::from(first) << 33, "count": first + 2 },
        "successor": { "at_tick": u64::from(first) << 34, "count": first + 3 },
        "stopped_at_elapsed": u64::from(first) << 35,
    })
}

fn transport(first: u32, fault: Value) -> Value {
    let queue = |first: u16| {
        json!({
            "max_size": first, "next_avail": first + 1, "next_used": first + 2,
            "event_idx_enabled": true, "size": first + 3, "ready": true,
            "desc_table": u64::from(first) << 40, "avail_ring": u64::from(first) << 41,
            "used_ring": u64::from(first) << 42,
        })
    };
    let last = json!({ "QueueSize": { "queue": 3, "size": first + 7 } });
    json!({
        "status": first, "interrupt_status": first + 1, "config_generation": first + 2,
        "device_features_select": first + 3, "driver_features_select": first + 4,
        "driver_features": u64::from(first) << 36, "queue_select": first + 5,
        "queues": [queue(300), queue(400)],
        "faults": { "count": first + 6, "first": fault, "last": last },
    })
}

fn net() -> Value {
    let source = |kind: &str| {
        let tags = [json!({ "kind": kind, "id": 300 }), json!({ "kind": "Customer", "id": 301 })];
        json!({ "mac": [2, 3, 4, 5, 6, 7], "tags": tags })
    };
    let fault = json!({ "FrameHeader": { "problem": "HeaderLength" } });
    json!({
        "config": { "mac": [0x52, 0x54, 0x12, 0x34, 0x56, 0x78], "mtu": 1500 },
        "transport": transport(500, fault),
        "backlog": [[1, 2, 3], [4]],
        "announce": true,
        "sources": [source("Service"), source("Customer")],
        "counters": {
            "tx_frames": 601, "rx_frames": 602, "rx_dropped_not_ready": 603,
            "rx_dropped_backlog_full": 604, "rx_refused": 605, "tx_malformed": 606,
            "announcements": 607,
        },
    })
}

fn disk() -> Value {
    let fault = json!({ "QueueOutsideMemory": { "queue": 1 } });
    json!({
        "capacity_sectors": 0x1_0000_0001u64,
        "transport": transport(700, fault),
        "in_flight": [{
            "id": 801, "head": 802, "read_bytes": 803, "data_bytes": 804,
            "writable": [{ "address": 0x1_0000_0003u64, "length_bytes": 805 }],
        }],
        "last_id": 806,
        "counters": {
            "reads": 901, "read_bytes": 902, "writes": 903, "written_bytes": 904, "flushes": 905,
            "discards": 906, "write_zeroes": 907, "failed": 908,
        },
    })
}

/// One of every kind, with one of every [`DiskOp`].
fn outputs() -> Value {
    let ops = every!(DiskOp {
        DiskOp::Read { .. } => DiskOp::Read { sector: 300, length_bytes: 4096 },
        DiskOp::Write { .. } => DiskOp::Write { sector: 301, data: vec![1, 2] },
        DiskOp::Flush => DiskOp::Flush,
        DiskOp::Zero { .. } => DiskOp::Zero { ranges: vec![ZeroRange {
            sector: 302, sector_count: 303, unmap: true,
        }] },
    });
    let requests = ops.into_iter().map(|op| Output::Disk(DiskRequest { id: 400, op }));
    let kinds = every!(Output {
        Output::Frame(_) => Output::Frame(vec![1, 2]),
        Output::Console(_) => Output::Console(vec![3]),
        Output::Disk(_) => Output::Disk(DiskRequest { id: 500, op: DiskOp::Flush }),
    });
    serde_json::to_value(kinds.into_iter().chain(requests).collect::<Vec<_>>()).unwrap()
}

fn board() -> Value {
    json!({
        "now_ns": 1_000_000_001u64,
        "pic": { "chips": [chip("Icw4", 20), chip("Icw3", 40)] },
        "pit": {
            "now_ns": 1_000_000_002u64,
            "counters": [counter("LowThenHigh", 300), counter("High", 310), counter("Low", 320)],
            "port_b": 60, "owed_ticks": 61, "lost_ticks": 62,
        },
        "rtc": {
            "now_s": 1001, "epoch_s": 1_700_000_000, "offset_s": -1002,
            "frozen": {
                "year": 2031, "month": 2, "day": 3, "hour": 4, "minute": 5, "second": 6,
            },
            "index": 7, "flags": 8, "ram": [9, 10, 11],
        },
        "console": {
            "uart": {
                "baud_divisor_low": 21, "baud_divisor_high": 22, "interrupt_enable": 23,
                "interrupt_identification": 24, "line_control": 25, "line_status": 26,
                "modem_control": 27, "modem_status": 28, "scratch": 29, "in_buffer": [30, 31],
            },
            "backlog": [256, 257], "in_break": true, "dropped_bytes": 1003,
        },
        "reset": { "reset_control": 32, "event": "Panic" },
        "acpi": {
            "status": 1004, "gpe_status": 33, "gpe_enable": 34, "enable": 1005, "control": 1006,
            "powered_off": true,
        },
        "virtio": {
            "net": net(),
            "entropy": {
                "transport": transport(1100, json!({ "QueueNotReady": { "queue": 9 } })),
                "wanted_bytes": 1201, "supplied_bytes": 1202,
            },
            "disk": disk(),
        },
        "panic": { "event": true, "matched": 35, "reason": [36, 37], "printed": true },
        "nmi_pending": true,
        "resets": 1007,
        "outputs": outputs(),
    })
}

/// Every value of the enums of the devices' states of which [`board`] has only some.
fn device_enums() -> Vec<(String, Vec<u8>)> {
    let (queue, head) = (300, 301);
    let mut faults = every!(GuestFault {
        GuestFault::QueueSize { .. } => GuestFault::QueueSize { queue, size: 302 },
        GuestFault::QueueAlignment { .. } => {
            GuestFault::QueueAlignment { queue, address_low: 303 }
        },
        GuestFault::QueueOutsideMemory { .. } => GuestFault::QueueOutsideMemory { queue },
        GuestFault::QueueNotReady { .. } => GuestFault::QueueNotReady { queue: 304 },
        GuestFault::AvailableIndex { .. } => GuestFault::AvailableIndex { queue },
        GuestFault::BrokenChain { .. } => GuestFault::BrokenChain { queue, head },
        GuestFault::LongChain { .. } => GuestFault::LongChain { queue, head },
        GuestFault::WrongDirection { .. } => GuestFault::WrongDirection { queue, head },
        GuestFault::BufferOutsideMemory { .. } => {
            GuestFault::BufferOutsideMemory { queue, address: 305, length_bytes: 306 }
        },
        GuestFault::EmptyBuffer { .. } => GuestFault::EmptyBuffer { queue, head },
        GuestFault::DiskRequestTooShort { .. } => GuestFault::DiskRequestTooShort { head },
        GuestFault::ReceiveBufferTooSmall { .. } => {
            GuestFault::ReceiveBufferTooSmall { head, frame_bytes: 307 }
        },
        GuestFault::FrameHeader { .. } => {
            GuestFault::FrameHeader { problem: HeaderProblem::HeaderLength }
        },
    });
    let problems = every!(HeaderProblem {
        HeaderProblem::ShortFrame => HeaderProblem::ShortFrame,
        HeaderProblem::ChecksumNotNegotiated => HeaderProblem::ChecksumNotNegotiated,
        HeaderProblem::ChecksumOutsideFrame => HeaderProblem::ChecksumOutsideFrame,
        HeaderProblem::SegmentationNotNegotiated => HeaderProblem::SegmentationNotNegotiated,
        HeaderProblem::SegmentationIncomplete => HeaderProblem::SegmentationIncomplete,
        HeaderProblem::HeaderLength => HeaderProblem::HeaderLength,
    });
    faults.extend(problems.into_iter().map(|problem| GuestFault::FrameHeader { problem }));
    let powers = every!(PowerEvent {
        PowerEvent::Reset => PowerEvent::Reset,
        PowerEvent::PowerOff => PowerEvent::PowerOff,
        PowerEvent::Panic => PowerEvent::Panic,
    });
    let vlans = every!(VlanKind {
        VlanKind::Customer => VlanKind::Customer,
        VlanKind::Service => VlanKind::Service,
    });
    let faults = faults.iter().map(|fault| (format!("{fault:?}"), encode(fault)));
    let powers = powers.iter().map(|power| (format!("{power:?}"), encode(power)));
    let vlans = vlans.iter().map(|vlan| (format!("{vlan:?}"), encode(vlan)));
    faults.chain(powers).chain(vlans).collect()
}

fn tsc() -> Value {
    let hook = |first: u64| {
        json!({
            "first": { "address": first << 40, "original": [41, 42] },
            "second": { "address": first << 41, "original": [43, 44] },
            "halfway": true,
        })
    };
    json!({
        "guest_tsd": true,
        "entry": {
            "idt": [0x1_0000_0005u64, 4095], "gate": (51..67).collect::<Vec<u8>>(),
            "gate_gpa": 0x1_0000_0006u64, "handler": 0x1_0000_0007u64,
            "places": [0x1_0000_0008u64, 0x1_0000_0009u64], "original": [71, 72],
        },
        "seen": { "pages": { "300": { "gpa": 301, "bytes": 302, "hash": 303 } } },
        "hooks": [hook(3), hook(5)],
        "other_kernel": {
            "rdtsc_sites": 401, "cr4_sites": 402,
            "sections": [{
                "addresses": { "start": 0x1_0000_000au64, "end": 0x1_0000_000bu64 },
                "decoys": [403, 404],
            }],
            "hooks": [hook(7)],
            "marks": [[0x1_0000_000cu64, [81, 82]]],
        },
    })
}

fn machine(resume_point: &str) -> Value {
    json!({
        "at": 2001, "resume_point": resume_point, "vcpu": vcpu(), "board": board(), "tsc": tsc(),
        "chain": 0x1_0000_000du64, "outputs": 0x1_0000_000eu64, "inputs": 2002, "slices": 2003,
        "memory_digest": 0x1_0000_000fu64,
        "disk_answers": [
            {
                "id": 2004, "sector": 2005, "is_flush": true,
                "outcome": { "Done": { "data": [91] } },
                "error": "EIO",
            },
            { "id": 2006, "sector": 2007, "is_flush": true, "outcome": "Failed", "error": "EIO" },
        ],
    })
}

fn made<T: serde::de::DeserializeOwned>(example: Value) -> T {
    serde_json::from_value(example).unwrap()
}

/// A field that is zero or absent shows neither its place nor its size.
fn assert_telling(value: &Value, path: &str) {
    match value {
        Value::Object(fields) => {
            assert!(!fields.is_empty(), "{path} is empty");
            fields
                .iter()
                .for_each(|(name, value)| assert_telling(value, &format!("{path}.{name}")));
        }
        Value::Array(items) => {
            assert!(!items.is_empty(), "{path} is empty");
            items.iter().for_each(|value| assert_telling(value, path));
        }
        Value::String(text) => assert!(!text.is_empty(), "{path} is empty"),
        Value::Number(number) => assert_ne!(number.as_i64(), Some(0), "{path} is zero"),
        Value::Bool(is_set) => assert!(is_set, "{path} is false"),
        Value::Null => panic!("{path} is absent"),
    }
}

#[test]
fn every_field_of_the_examples_has_a_value() {
    for resume_point in ["Halt", "Slice"] {
        assert_telling(&machine(resume_point), "machine");
    }
}

#[test]
fn a_machines_state_is_encoded_as_ever() {
    let mut examples = Vec::new();
    let points = every!(ResumePoint {
        ResumePoint::Slice => ResumePoint::Slice,
        ResumePoint::Halt => ResumePoint::Halt,
    });
    for resume_point in points {
        let name = format!("{resume_point:?}");
        let bytes = made::<MachineState>(machine(&name)).encode();
        assert_eq!(MachineState::decode(&bytes).unwrap().encode(), bytes);
        examples.push((format!("machine at a {name}"), bytes));
    }
    examples.extend(device_enums());
    golden(
        "machine-state",
        MACHINE_STATE_VERSION,
        "MACHINE_STATE_VERSION in vmm/machine/src/machine_state.rs",
    )
    .check_examples(&examples);
}

/// What goes into the log, or into digests in it, without the log's format saying so.
#[test]
fn what_a_replay_compares_is_encoded_as_ever() {
    let slice: SliceState = made(json!({ "vcpu": vcpu(), "memory_digest": 0x1_0000_0010u64 }));
    let requests: Vec<Output> = made(outputs());
    let mut examples = vec![
        ("processor in a slice".to_owned(), slice.encode()),
        ("devices in the digest of the end".to_owned(), encode(&made::<BoardState>(board()))),
        ("traps in the digest of the end".to_owned(), encode(&made::<TscTrapState>(tsc()))),
    ];
    for output in requests {
        let Output::Disk(request) = output else { continue };
        let name = format!("request {:?} in the digest of exits", request.op);
        examples.push((name, encode(&request)));
    }
    golden("replayed", PROTOCOL_VERSION, "PROTOCOL_VERSION in replication/src/fingerprint.rs")
        .check_examples(&examples);
}

#[test]
fn a_state_that_is_cut_or_goes_on_is_damaged() {
    let bytes = made::<MachineState>(machine("Halt")).encode();
    let longer = [&bytes[..], &[0]].concat();
    for damaged in [&bytes[..bytes.len() - 1], &bytes[..3], &longer] {
        assert!(matches!(MachineState::decode(damaged), Err(StateError::Damaged)));
    }
    // The first number behind the version is that of the exit, with a byte more than it needs.
    let mut overlong = bytes.clone();
    overlong[5] |= 0x80;
    overlong.insert(6, 0);
    assert!(matches!(MachineState::decode(&overlong), Err(StateError::Damaged)));
}
