//! Framing, foreign peers and damage.

use proptest::prelude::*;

use super::*;
use crate::digest::OutputDigest;
use crate::fingerprint::tests::example;
use crate::incident::{DivergenceCause, Evidence, OutputEvidence};
use crate::message::{ByeReason, Frames};
use crate::policy::{DivergencePolicy, Refusal, ReleasePolicy, Role};
use crate::record::{Ordinal, OutputOrdinal, Term};
use crate::state::StatePart;
use crate::witness::Nonce;

/// One message of every kind, in the order of the tags.
fn samples() -> Vec<Message> {
    let term = Term(3);
    let digest = OutputDigest([7; 16]);
    let evidence = Evidence {
        output: Some(OutputEvidence {
            output: OutputOrdinal(4),
            at: Ordinal(400),
            digest,
            frame: vec![1, 2, 3],
        }),
        produced_through: OutputOrdinal(5),
        executed_through: Ordinal(399),
        state_digest: Some([9; 32]),
        fault: Some("chain differs".into()),
        last_records: vec!["1 time 0.000000001 s".into()],
    };
    let cause = DivergenceCause::Output { output: OutputOrdinal(4) };
    let released_through = OutputOrdinal(2);
    vec![
        Message::Hello {
            role: Role::Backup,
            build: crate::build_id::tests::example(),
            fingerprint: example(),
            highest_term: Term(2),
            runs: false,
        },
        Message::Welcome {
            term,
            rtc_epoch_s: 1_700_000_000,
            release: ReleasePolicy::Ack,
            on_divergence: DivergencePolicy::Halt,
        },
        Message::Refuse { refusal: Refusal::SameRole { role: Role::Primary } },
        Message::Ready { term },
        Message::Log { term, released_through, group: vec![0xaa; 300].into() },
        Message::Heartbeat { term, released_through },
        Message::Ack { term, received_through: Ordinal(80), executed_through: Ordinal(70) },
        Message::Digest { term, output: OutputOrdinal(3), at: Ordinal(333), digest },
        Message::Fault { term, evidence: evidence.clone() },
        Message::Challenge { term, cause, evidence: evidence.clone() },
        Message::Evidence { term, evidence },
        Message::StandDown { term },
        Message::Finished { term, state_digest: [8; 32] },
        Message::Bye { term, reason: ByeReason::Ended },
        Message::Attach {
            term,
            release: ReleasePolicy::Compare,
            on_divergence: DivergencePolicy::Resync,
            believe: Role::Backup,
        },
        Message::State { term, part: StatePart::Pages(vec![5; 100]) },
        Message::StateEnd {
            term,
            outputs_through: OutputOrdinal(9),
            at: Ordinal(77),
            machine: vec![6; 50],
        },
        Message::StateRestored { term, restored_bytes: 1 << 33 },
        Message::Yield { term, through: Ordinal(77), released_through, follows: true },
        Message::Promoted { term: Term(4) },
        Message::DiskFlushed { term, id: 1 << 40 },
        Message::Strays { term, frames: Frames(vec![vec![1; 60], vec![2; 90]]) },
        Message::Held { term, at: Ordinal(76), digest, frame: vec![3; 60] },
        Message::ClientLink { up: false },
        Message::Prove { nonce: Nonce([9; 16]), place: "file:/w".to_owned().into() },
        Message::Proved { nonce: Nonce([9; 16]), found: true },
        Message::Resume { own: Nonce([9; 16]), theirs: Nonce([8; 16]), received: 1 << 33 },
        Message::Received { messages: 1 << 33 },
        Message::LeaseRequest { term, number: 1 << 33 },
        Message::LeaseGrant { term, number: 1 << 33, lease_ns: 125_000_000 },
    ]
}

fn stream(messages: &[Message]) -> Vec<u8> {
    let mut bytes = PREAMBLE.to_vec();
    messages.iter().for_each(|message| encode(message, &mut bytes));
    bytes
}

fn decode_all(decoder: &mut Decoder) -> Result<Vec<Message>, WireError> {
    let mut messages = Vec::new();
    while let Some(message) = decoder.next_message()? {
        messages.push(message);
    }
    Ok(messages)
}

#[test]
fn tags_have_these_numbers_and_retired_ones_stay_reserved() {
    let expected = [
        (1, "Hello"),
        (2, "Welcome"),
        (3, "Refuse"),
        (4, "Ready"),
        (5, "Log"),
        (6, "Heartbeat"),
        (7, "Ack"),
        (8, "Digest"),
        (9, "Fault"),
        (10, "Challenge"),
        (11, "Evidence"),
        (12, "StandDown"),
        (13, "Finished"),
        (14, "Bye"),
        (15, "Attach"),
        (16, "State"),
        (17, "StateEnd"),
        (18, "StateRestored"),
        (19, "Yield"),
        (20, "Promoted"),
        (21, "DiskFlushed"),
        (22, "Strays"),
        (23, "Held"),
        (24, "ClientLink"),
        (25, "Prove"),
        (26, "Proved"),
        (27, "Resume"),
        (28, "Received"),
        (30, "LeaseRequest"),
        (31, "LeaseGrant"),
    ];
    assert_eq!(Message::TAGS, expected);
    let used: Vec<(u8, &str)> = samples().iter().map(|m| (m.tag(), m.name())).collect();
    assert_eq!(used, expected, "samples() has one message of every kind");
    assert!(Message::RETIRED_TAGS.iter().all(|tag| !used.iter().any(|(used, _)| used == tag)));
    assert!(Message::decode_body(0, &[]).is_none());
}

#[test]
fn every_message_survives_the_wire_byte_by_byte() {
    let bytes = stream(&samples());
    let mut decoder = Decoder::new();
    let mut seen = Vec::new();
    for byte in bytes {
        decoder.push(&[byte]);
        seen.extend(decode_all(&mut decoder).unwrap());
    }
    assert_eq!(seen, samples());
}

#[test]
fn a_foreign_peer_is_named_from_its_first_byte_on() {
    let mut decoder = Decoder::new();
    decoder.push(b"GET / HTTP/1.1\r\n");
    let error = decoder.next_message().unwrap_err();
    assert_eq!(error, WireError::NotFtvmm { first_bytes: b"GET / HT".to_vec() });
    assert_eq!(error.to_string(), "peer does not speak ftvmm: it began with \"GET / HT\"");
    assert_eq!(decoder.next_message(), Err(error), "the decoder stays at its error");

    let mut decoder = Decoder::new();
    decoder.push(b"F");
    assert_eq!(decoder.next_message(), Ok(None));
    decoder.push(b"O");
    assert_eq!(decoder.next_message(), Err(WireError::NotFtvmm { first_bytes: b"FO".to_vec() }));
}

#[test]
fn another_version_is_refused_by_name() {
    let mut decoder = Decoder::new();
    decoder.push(b"FTVMM\0\x02\x01");
    let error = decoder.next_message().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("wire version differs: ours is {WIRE_VERSION}, theirs is 258")
    );
}

#[test]
fn a_length_above_the_limit_is_refused_before_the_body_comes() {
    let mut decoder = Decoder::new();
    decoder.push(&PREAMBLE);
    decoder.push(&(BODY_BYTES_MAX + 1).to_le_bytes());
    decoder.push(&[0; 5]);
    let length_bytes = BODY_BYTES_MAX + 1;
    assert_eq!(decoder.next_message(), Err(WireError::TooLong { length_bytes }));
}

#[test]
fn unknown_tags_and_bytes_left_over_are_malformed() {
    for (tag, body) in [(0u8, &[][..]), (15, &[]), (4, &[]), (4, &[1, 1]), (4, &[0x81, 0])] {
        let mut decoder = Decoder::new();
        decoder.push(&PREAMBLE);
        decoder.push(&(body.len() as u32).to_le_bytes());
        decoder.push(&frame_crc(body.len() as u32, tag, body).to_le_bytes());
        decoder.push(&[tag]);
        decoder.push(body);
        assert_eq!(decoder.next_message(), Err(WireError::Malformed { tag }), "tag {tag}");
    }
}

#[test]
fn any_flipped_bit_is_told() {
    let bytes = stream(&samples()[1..4]);
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let mut decoder = Decoder::new();
        decoder.push(&flipped);
        let mut seen = Vec::new();
        let mut went_on = false;
        let error = loop {
            match decoder.next_message() {
                Ok(Some(message)) => seen.push(message),
                // A length that grew looks like a stream that goes on; whatever comes next tells.
                Ok(None) if !went_on => {
                    went_on = true;
                    decoder.push(&vec![0; BODY_BYTES_MAX as usize]);
                }
                Ok(None) => panic!("bit {bit} went unnoticed"),
                Err(error) => break error,
            }
        };
        assert!(seen.len() < 3 && seen[..] == samples()[1..1 + seen.len()], "bit {bit}: {error}");
    }
}

proptest! {
    #[test]
    fn any_truncation_yields_a_prefix(cut in any::<prop::sample::Index>()) {
        let bytes = stream(&samples());
        let mut decoder = Decoder::new();
        decoder.push(&bytes[..cut.index(bytes.len())]);
        let seen = decode_all(&mut decoder).unwrap();
        prop_assert!(seen.len() < samples().len());
        prop_assert_eq!(&seen[..], &samples()[..seen.len()]);
    }

    #[test]
    fn an_accepted_body_is_the_encoding_of_its_message(
        sample in any::<prop::sample::Index>(),
        place in any::<prop::sample::Index>(),
    ) {
        let sample = &samples()[sample.index(samples().len())];
        let mut body = sample.encode_body(Vec::new());
        // Zero with a byte more than it needs, or another number.
        let place = place.index(body.len());
        body[place] |= 0x80;
        body.insert(place + 1, 0);
        if let Some(message) = Message::decode_body(sample.tag(), &body) {
            prop_assert_eq!(message.encode_body(Vec::new()), body);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        tag in 0..30u8,
        body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Some(message) = Message::decode_body(tag, &body) {
            prop_assert_eq!(message.encode_body(Vec::new()), &body[..]);
        }
        let mut decoder = Decoder::new();
        decoder.push(&body);
        let _ = decode_all(&mut decoder);
    }
}
