//! What the group codec promises: round trip, size, and that damage is noticed.

use proptest::prelude::*;

use super::*;
use crate::check::{Check, CpuCheck, MemoryCheck, PageHash};
use crate::record::{EndReason, SnapshotMark};
use crate::slice::Slice;

pub(crate) fn time(at: u64, now_ns: u64) -> Record {
    Record { at: Ordinal(at), event: Event::Input(Input::Time { now_ns }) }
}

fn events() -> impl Strategy<Value = Event> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        4 => (0..20_000_000u64).prop_map(|now_ns| Event::Input(Input::Time { now_ns })),
        1 => (0..20_000u64)
            .prop_map(|now_us| Event::Input(Input::Time { now_ns: now_us * 1000 })),
        1 => bytes().prop_map(|frame| Event::Input(Input::NetRx { frame })),
        1 => bytes().prop_map(|bytes| Event::Input(Input::ConsoleRx { bytes })),
        1 => bytes().prop_map(|bytes| Event::Input(Input::Entropy { bytes })),
        1 => (any::<u64>(), any::<bool>(), bytes()).prop_map(|(id, done, data)| {
            let outcome = if done { DiskOutcome::Done { data } } else { DiskOutcome::Failed };
            Event::Input(Input::DiskDone { id, outcome })
        }),
        1 => prop::sample::select(vec![
            Input::PowerButton, Input::Nmi, Input::ConsoleBreak, Input::NetAnnounce,
        ]).prop_map(Event::Input),
        1 => (any::<[u8; 16]>(), any::<u64>()).prop_map(|(generation_id, unix_s)| {
            Event::Input(Input::NewIdentity { generation_id, unix_s })
        }),
        1 => (any::<u64>(), any::<Option<u64>>())
            .prop_map(|(id, data_xxh3)| Event::DiskAnswer(DiskAnswer { id, data_xxh3 })),
        1 => (any::<u64>(), any::<[u64; 18]>(), bytes()).prop_map(|(chain, registers, code)| {
            let cpu = CpuCheck { digest: !chain, registers, code };
            let changed = vec![PageHash { page: chain, hash: 7 }];
            let memory = Some(MemoryCheck { digest: chain, changed, renews_copy: chain % 3 == 0 })
                .filter(|_| chain % 2 == 0);
            Event::Check(Box::new(Check { chain, cpu, memory }))
        }),
        1 => (bytes(), any::<Option<u8>>()).prop_map(|(pages, cpu)| {
            Event::Slice(Slice { pages, cpu: cpu.map(|byte| vec![byte; 30]) })
        }),
        1 => ("[a-z/]{0,40}", any::<u64>()).prop_map(|(path, memory_digest)| {
            Event::Snapshot(SnapshotMark { path, memory_digest })
        }),
        1 => (any::<[u8; 32]>(), any::<[u64; 2]>(), 0..EndReason::ALL.len()).prop_map(
            |(state_digest, [chain, outputs], reason)| {
                let reason = EndReason::ALL[reason];
                Event::End(End { state_digest, chain, outputs, reason })
            }
        ),
    ]
}

prop_compose! {
    /// Records with rising ordinals and time, and a horizon they may have.
    pub(crate) fn groups()(
        first in 0..1u64 << 40,
        steps in prop::collection::vec((0..400u64, events()), 0..40),
        horizon_past in 0..300u64,
    ) -> Group {
        let (mut at, mut clock_ns) = (first, first * 7);
        let mut records = Vec::new();
        for (delta, mut event) in steps {
            at += delta;
            if let Event::Input(Input::Time { now_ns }) = &mut event {
                clock_ns += *now_ns;
                *now_ns = clock_ns;
            }
            records.push(Record { at: Ordinal(at), event });
        }
        Group { horizon: Ordinal((at + horizon_past).saturating_sub(1)), records }
    }
}

pub(crate) fn encode(group: &Group) -> Vec<u8> {
    let mut encoder = GroupEncoder::new();
    group.records.iter().for_each(|record| encoder.push(record));
    encoder.finish(group.horizon)
}

proptest! {
    #[test]
    fn round_trip(group in groups()) {
        let bytes = encode(&group);
        prop_assert_eq!(peek_group(&bytes).unwrap().horizon, group.horizon);
        prop_assert_eq!(decode_group(&bytes).unwrap(), group);
    }

    #[test]
    fn any_truncation_is_told(group in groups(), cut in any::<prop::sample::Index>()) {
        let bytes = encode(&group);
        let cut = cut.index(bytes.len());
        let error = decode_group(&bytes[..cut]).unwrap_err();
        prop_assert!(matches!(error, CodecError::Truncated { .. }), "{}", error);
    }

    #[test]
    fn any_flipped_bit_is_told(group in groups(), bit in any::<prop::sample::Index>()) {
        let mut bytes = encode(&group);
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode_group(&bytes).is_err());
        prop_assert!(peek_group(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode_group(&bytes);
        // With a valid frame around them, so that the record decoder sees them too.
        let mut framed = Vec::new();
        varint::put(&mut framed, bytes.len() as u64);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&framed), &bytes);
        framed.extend_from_slice(&crc.to_le_bytes());
        framed.extend_from_slice(&bytes);
        let _ = decode_group(&framed);
    }
}

#[test]
fn tags_have_these_numbers_and_retired_ones_stay_reserved() {
    assert_eq!(Tag::ALL.map(|tag| tag as u8), [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!(Kind::ALL.map(|kind| kind as u8), [1, 2, 3, 4, 5]);
    assert_eq!(Kind::from_number(Kind::KEPT), None);
    // A sixteenth record is a kind.
    assert_eq!(Tag::ALL.len() + Tag::RETIRED.len(), 15);
    assert!(Tag::RETIRED.iter().all(|retired| !Tag::ALL.iter().any(|tag| *tag as u8 == *retired)));
    assert_eq!([Codec::Raw as u8, Codec::Lz4 as u8], [1, 2]);
}

/// A group around hand-made fields, with a checksum that holds.
fn framed(fields: &[u8]) -> Vec<u8> {
    let mut bytes = vec![fields.len() as u8];
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), fields);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(fields);
    bytes
}

#[test]
fn an_unknown_kind_may_be_a_newer_ones() {
    let error = decode_group(&framed(&[0x05, 9, 0, 0x0f, 200])).unwrap_err().to_string();
    assert_eq!(error, "record kind 200 of tag 15 is unknown; was it made by a newer ftvmm?");
}

#[test]
fn each_malformed_field_is_named() {
    let horizon = Ordinal(9);
    let cases: [(&[u8], CodecError); 17] = [
        (&[0x00, 9], CodecError::Codec { codec: 0 }),
        (&[0x03, 9], CodecError::Codec { codec: 3 }),
        (&[0x01], CodecError::Number { field: "horizon" }),
        (&[0x01, 9, 0], CodecError::RecordBounds { index: 0 }),
        (&[0x05, 9, 11, 0x02, 0], CodecError::OutOfReach { index: 0, horizon }),
        (&[0x05, 9, 0, 0x12, 0], CodecError::OutOfReach { index: 0, horizon }),
        (&[0x05, 9, 0, 0x00, 0], CodecError::RecordTag { tag: 0 }),
        (&[0x05, 9, 0, 0x05, 0], CodecError::RecordTag { tag: 5 }),
        (&[0x05, 9, 0, 0x0f, 0], CodecError::RecordKind { kind: 0 }),
        (&[0x05, 9, 0, 0x0f, 6], CodecError::RecordKind { kind: 6 }),
        (&[0x05, 0x89, 0, 0, 0x02, 0], CodecError::Overlong { field: "horizon" }),
        (&[0x05, 9, 0, 0x02, 0x80, 0], CodecError::Overlong { field: "time delta" }),
        (&[0x05, 9, 0, 0x03, 0x81, 0, 1], CodecError::Overlong { field: "payload length" }),
        (&[0x05, 9, 0, 0x0e, 4, 0x81, 0, b's', 9], CodecError::RecordBody { index: 0 }),
        (&[0x05, 9, 0, 0x0f, 5, 1], CodecError::RecordBounds { index: 0 }),
        (&[0x05, 9, 0, 0x06, 0], CodecError::EndReasonNumber { reason: 0 }),
        (&[0x05, 9, 0, 0x03, 5, 1], CodecError::RecordBounds { index: 0 }),
    ];
    for (fields, expected) in cases {
        assert_eq!(decode_group(&framed(fields)), Err(expected), "{fields:?}");
    }
    let snapshot = [0x05, 9, 0, 0x0e, 3, 1, b's', 9];
    assert!(decode_group(&framed(&snapshot)).is_ok(), "the base of the mark");
    assert!(decode_group(&framed(&[0x05, 9, 0, 0x02, 0])).is_ok(), "the base case is well-formed");
}

#[test]
fn a_length_of_zero_or_beyond_the_limit_is_refused() {
    for length_bytes in [0, u64::from(GROUP_BYTES_MAX) + 1, u64::MAX] {
        let mut bytes = Vec::new();
        varint::put(&mut bytes, length_bytes);
        bytes.extend_from_slice(&[0; 64]);
        assert_eq!(decode_group(&bytes), Err(CodecError::Length { length_bytes }));
    }
}

#[test]
fn a_horizon_alone_is_tiny() {
    let mut encoder = GroupEncoder::new();
    assert_eq!(encoder.finish(Ordinal(1_000_000)).len(), 9);
    assert_eq!(encoder.finish(Ordinal(COUNTER_MAX)).len(), 15);
}

#[test]
fn inputs_one_exit_past_the_horizon_are_kept() {
    let group = Group { horizon: Ordinal(5), records: vec![time(6, 10), time(6, 20)] };
    assert_eq!(decode_group(&encode(&group)), Ok(group));
}

#[test]
fn text_is_compressed_and_noise_is_not() {
    let net = |frame| Group {
        horizon: Ordinal(1),
        records: vec![Record { at: Ordinal(1), event: Event::Input(Input::NetRx { frame }) }],
    };
    let text = net(b"GET / HTTP/1.1\r\n".repeat(90));
    assert!(encode(&text).len() < 100);
    assert_eq!(decode_group(&encode(&text)).unwrap(), text);
    let mut noise_state = 1u64;
    let noise: Vec<u8> = core::iter::repeat_with(|| {
        noise_state = noise_state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (noise_state >> 56) as u8
    })
    .take(1400)
    .collect();
    assert!(encode(&net(noise)).len() < 1400 + 16);
}

#[test]
#[should_panic(expected = "record at 4 after 5")]
fn ordinals_must_not_fall() {
    let mut encoder = GroupEncoder::new();
    encoder.push(&time(5, 0));
    encoder.push(&time(4, 0));
}

#[test]
#[should_panic(expected = "horizon is too early")]
fn a_horizon_must_cover_its_records() {
    let mut encoder = GroupEncoder::new();
    encoder.push(&time(7, 0));
    encoder.finish(Ordinal(5));
}

/// Bytes per second of an idle guest an hour after power-on: `ticks` timer ticks, each followed by
/// `reads - 1` clock readings some exits and microseconds later, `group_ticks` ticks to a group.
fn idle_bytes_per_second(ticks: u64, reads: u64, group_ticks: u64) -> u64 {
    let mut encoder = GroupEncoder::new();
    let (mut at, mut bytes) = (20_000_000u64, 0);
    for tick in 1..=ticks {
        let tick_ns = 3_600_000_000_000 + tick * (1_000_000_000 / ticks) / 1000 * 1000;
        for read in 0..reads {
            at += 9;
            encoder.push(&time(at, tick_ns + read * 11_000));
        }
        if tick % group_ticks == 0 {
            bytes += encoder.finish(Ordinal(at)).len() as u64;
        }
    }
    bytes
}

#[test]
fn an_idle_guest_stays_far_under_20_kbit_per_second() {
    // Measured below with times in whole microseconds and a group every 20 ms.
    let limit = 20_000 / 8;
    let seen = [(100, 1, 2), (100, 3, 2), (250, 1, 5), (250, 3, 5)]
        .map(|(ticks, reads, group)| idle_bytes_per_second(ticks, reads, group));
    assert!(seen.iter().all(|bytes| *bytes < limit), "{seen:?}");
    println!("bytes/s with 20 ms groups: {seen:?}");
    println!("bytes/s at 100 Hz, a group a tick: {}", idle_bytes_per_second(100, 3, 1));
}
