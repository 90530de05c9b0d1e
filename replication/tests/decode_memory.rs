//! What decoding costs in memory, whatever the bytes claim: a small part more than a full message.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use ftvmm_devices::Input;
use ftvmm_replication::group::{GROUP_BYTES_MAX, RECORDS_MAX};
use ftvmm_replication::message::{Frames, STRAYS_MAX};
use ftvmm_replication::state::unpack_pages;
use ftvmm_replication::wire::{self, BODY_BYTES_MAX, Decoder, PREAMBLE};
use ftvmm_replication::{
    CodecError, Event, Evidence, Group, GroupEncoder, Message, Ordinal, Record, Term, WireError,
    decode_group,
};

const MIB: usize = 1 << 20;

/// The system's allocator, which counts.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract, which is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What `call` returns, and the most bytes it held at a time beside what there was.
fn measured<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let result = call();
    (result, MOST.load(Ordering::Relaxed).saturating_sub(before))
}

/// A frame of the wire with any body.
fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_le_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&length), &[tag]), body);
    [&length[..], &crc.to_le_bytes(), &[tag], body].concat()
}

fn received(frame: &[u8]) -> Result<Option<Message>, WireError> {
    let mut decoder = Decoder::new();
    decoder.push(&PREAMBLE);
    decoder.push(frame);
    decoder.next_message()
}

fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// As many empty items as a body holds, behind `head`.
fn empty_items(tag: u8, head: &[u8]) -> Vec<u8> {
    let count = BODY_BYTES_MAX as usize - 64;
    let body = [head, &varint(count), &vec![0; count]].concat();
    frame(tag, &body)
}

/// One test, since all tests of a program share its memory.
#[test]
fn no_message_and_no_group_costs_more_than_its_bounds() {
    let body = BODY_BYTES_MAX as usize;

    // Strays, and the quoted records of evidence: no output, nothing executed, no digest, no fault.
    for hostile in [empty_items(22, &[1]), empty_items(11, &[1, 0, 0, 0, 0, 0])] {
        let (message, most) = measured(|| received(&hostile));
        assert!(matches!(message, Err(WireError::Malformed { .. })), "{:?}", message.is_ok());
        // The decoder holds the frame itself, in a buffer that has grown.
        assert!(most < 2 * body + MIB, "{most} bytes for {}", hostile.len());
    }
    let term = Term(1);
    let evidence = Evidence { last_records: vec!["line".into(); 32], ..Evidence::default() };
    for message in [
        Message::Strays { term, frames: Frames(vec![vec![7; 1500]; STRAYS_MAX]) },
        Message::Evidence { term, evidence },
    ] {
        let mut bytes = Vec::new();
        wire::encode(&message, &mut bytes);
        assert_eq!(received(&bytes), Ok(Some(message)), "what a host sends is taken");
    }

    a_group_costs_no_more_than_its_records();
    a_length_that_cannot_be_is_given_no_room();
}

fn a_group_costs_no_more_than_its_records() {
    // A group: as many records of two bytes as its body holds.
    let group = |records: u64| {
        let body = [0x0f, 0x02].repeat(records as usize);
        let packed = lz4_flex::block::compress(&body);
        let head = varint((records as usize) << 2 | 2);
        let fields = [&head[..], &[9, 9], &varint(body.len()), &packed].concat();
        let length = varint(fields.len());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&length), &fields);
        [&length[..], &crc.to_le_bytes(), &fields].concat()
    };
    let many = 8 << 20;
    let (hostile, small) = (group(many - 1), group(RECORDS_MAX));
    assert!(hostile.len() < 100_000, "{} bytes", hostile.len());
    let (decoded, most) = measured(|| decode_group(&hostile));
    assert_eq!(decoded, Err(CodecError::RecordCount { record_count: many - 1 }));
    assert!(most < MIB, "{most} bytes for {}", hostile.len());
    let (decoded, most) = measured(|| decode_group(&small));
    assert_eq!(decoded.unwrap().records.len() as u64, RECORDS_MAX);
    assert!(most < 16 * MIB, "{most} bytes for {}", small.len());

    // The other extreme: one record, as long as a body may be. Its bytes are held twice, packed
    // out and in the record.
    let most_bytes = GROUP_BYTES_MAX as usize;
    let mut encoder = GroupEncoder::new();
    let bytes = vec![7; most_bytes - 1024];
    encoder.push(&Record { at: Ordinal(1), event: Event::Input(Input::Entropy { bytes }) });
    let long = encoder.finish(Ordinal(1));
    assert!(long.len() < 100_000, "{} bytes", long.len());
    let (decoded, most) = measured(|| decode_group(&long));
    assert_eq!(decoded.unwrap().records.len(), 1);
    assert!(most < 2 * most_bytes + MIB, "{most} bytes for {}", long.len());

    // A recorder ends its groups long before.
    let mut encoder = GroupEncoder::new();
    let record = Record { at: Ordinal(1), event: Event::Input(Input::Nmi) };
    while !encoder.is_full() {
        encoder.push(&record);
    }
    let Group { records, .. } = decode_group(&encoder.finish(Ordinal(1))).unwrap();
    assert!(records.len() as u64 <= RECORDS_MAX / 2);
}

fn a_length_that_cannot_be_is_given_no_room() {
    // Lengths that a few bytes cannot decompress to.
    let large = [(1u32 << 20).to_le_bytes().as_slice(), &[0; 20]].concat();
    let (unpacked, most) = measured(|| unpack_pages(&large, |_, _| ()));
    assert!(unpacked.is_err() && most < MIB / 2, "{most} bytes");
    let fields = [&varint(1 << 2 | 2)[..], &[9, 9], &varint(16 << 20), &[0; 20]].concat();
    let length = varint(fields.len());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&length), &fields);
    let claims = [&length[..], &crc.to_le_bytes(), &fields].concat();
    let (decoded, most) = measured(|| decode_group(&claims));
    assert_eq!(decoded, Err(CodecError::Decompress { expected_bytes: 16 << 20 }));
    assert!(most < MIB / 2, "{most} bytes");
}
