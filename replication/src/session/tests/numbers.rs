//! Numbers of a peer that cannot be: the peer is lost and nothing else happens.

use super::attach::{asked_to_take_over, attached, attaching, resyncing, state_end};
use super::*;
use crate::incident::Evidence;
use crate::message::Frames;
use crate::policy::Limits;
use crate::record::COUNTER_MAX;
use crate::state::StatePart;
use crate::{varint, wire};
use ftvmm_devices::FRAME_BYTES_MAX;

/// Far beyond whatever there is; those above [`COUNTER_MAX`] do not get through the wire.
pub(super) const EXTREME: [u64; 5] =
    [1 << 40, COUNTER_MAX, COUNTER_MAX + 1, u64::MAX - 1, u64::MAX];

/// What a host is told of a message that a peer put on the wire.
pub(super) fn arrives(message: &Message) -> SessionEvent {
    let mut bytes = wire::PREAMBLE.to_vec();
    wire::encode(message, &mut bytes);
    let mut decoder = wire::Decoder::new();
    decoder.push(&bytes);
    match decoder.next_message() {
        Ok(Some(message)) => SessionEvent::Received(message),
        Ok(None) => panic!("a whole message"),
        Err(error) => SessionEvent::Disconnected { reason: DisconnectReason::Wire(error) },
    }
}

/// A group without records, whatever its horizon.
pub(super) fn bare_group(horizon: u64) -> Vec<u8> {
    let mut fields = vec![1];
    varint::put(&mut fields, horizon);
    let mut group = Vec::new();
    varint::put(&mut group, fields.len() as u64);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&group), &fields);
    group.extend_from_slice(&crc.to_le_bytes());
    group.extend_from_slice(&fields);
    group
}

fn ack(received: u64, executed: u64) -> Message {
    let (received_through, executed_through) = (Ordinal(received), Ordinal(executed));
    Message::Ack { term: Term(1), received_through, executed_through }
}

fn digest(at: u64) -> Message {
    let digest = OutputDigest::of(Ordinal(10), 0, &[1]);
    Message::Digest { term: Term(1), output: OutputOrdinal(1), at: Ordinal(at), digest }
}

fn fault(evidence: Evidence) -> Message {
    Message::Fault { term: Term(1), evidence }
}

fn flushed(id: u64) -> Message {
    Message::DiskFlushed { term: Term(1), id }
}

fn restored(restored_bytes: u64) -> Message {
    Message::StateRestored { term: Term(1), restored_bytes }
}

/// Output 1 of exit 10 waits for the backup, which was sent the log through exit 9.
fn gated(release: ReleasePolicy) -> Pair {
    let mut pair = Pair::following(|config| config.release = release);
    pair.primary.output(1);
    pair.primary.log(9);
    pair.pump();
    pair.primary.take_done();
    pair
}

/// The backup is lost at once, nothing leaves before the term is won, and the guest goes on.
fn is_lost(mut pair: Pair, messages: &[Message]) {
    messages.iter().for_each(|message| pair.primary.step(arrives(message)));
    assert_eq!(pair.primary.take_rows(), "F", "{messages:?}");
    assert_eq!(pair.primary.transmitted(), [], "{messages:?}");
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.session.state_name(), "Alone");
    assert_eq!(pair.primary.transmitted(), [1]);
}

#[test]
fn a_backup_that_reports_what_it_cannot_have_reached_is_lost() {
    let evidence = |evidence| fault(evidence);
    let with_output = |output: u64, at: u64| {
        let (output, at) = (OutputOrdinal(output), Ordinal(at));
        let digest = OutputDigest([1; 16]);
        let output = crate::OutputEvidence { output, at, digest, frame: vec![] };
        fault(Evidence { output: Some(output), ..Evidence::default() })
    };
    let beyond: Vec<Vec<Message>> = [10]
        .into_iter()
        .chain(EXTREME)
        .flat_map(|number| {
            let executed_through = Ordinal(number);
            vec![
                vec![ack(number, 0)],
                vec![ack(9, number)],
                vec![ack(number, number)],
                vec![digest(number)],
                vec![restored(number)],
                vec![evidence(Evidence { executed_through, ..Evidence::default() })],
                vec![with_output(1, number)],
                vec![Message::Promoted { term: Term(number) }],
            ]
        })
        .collect();
    let outputs = EXTREME.into_iter().flat_map(|number| {
        let produced_through = OutputOrdinal(number);
        let too_many = evidence(Evidence { produced_through, ..Evidence::default() });
        vec![vec![too_many], vec![with_output(number, 9)]]
    });
    let going_back = [
        vec![ack(9, 4), ack(8, 4)],
        vec![ack(9, 4), ack(9, 3)],
        vec![ack(5, 6)],
        vec![Message::Finished { term: Term(1), state_digest: [1; 32] }; 2],
        vec![flushed(3), flushed(2)],
    ];
    for messages in beyond.into_iter().chain(outputs).chain(going_back) {
        for release in [ReleasePolicy::Compare, ReleasePolicy::Ack] {
            is_lost(gated(release), &messages);
        }
    }
}

#[test]
fn a_number_that_no_exit_has_and_then_a_fault_do_not_end_the_primary() {
    for number in EXTREME {
        is_lost(gated(ReleasePolicy::Ack), &[ack(9, number), fault(Evidence::default())]);
    }
}

#[test]
fn one_acknowledgement_does_not_release_what_comes_later() {
    for number in [100].into_iter().chain(EXTREME) {
        let mut pair = gated(ReleasePolicy::Ack);
        pair.primary.step(arrives(&ack(number, 0)));
        pair.primary.output(2);
        pair.primary.output(3);
        assert_eq!(pair.primary.transmitted(), [], "{number}");
    }
}

#[test]
fn a_message_of_a_term_far_ahead_loses_the_peer_on_either_side() {
    for number in [2].into_iter().chain(EXTREME) {
        let term = Term(number);
        let bye = Message::Bye { term, reason: ByeReason::HostRequest };
        is_lost(gated(ReleasePolicy::Compare), &[Message::Ready { term }]);
        is_lost(gated(ReleasePolicy::Compare), std::slice::from_ref(&bye));
        let mut pair = Pair::following(|_| {});
        pair.backup.step(arrives(&bye));
        assert_eq!(pair.backup.take_rows(), "AT", "{number}");
    }
}

#[test]
fn a_flush_that_was_never_asked_for_loses_the_backup_when_the_guest_leaves_the_exit() {
    for number in [8].into_iter().chain(EXTREME) {
        let mut pair = gated(ReleasePolicy::Compare);
        pair.primary.step(SessionEvent::FlushAsked { id: 7 });
        pair.primary.step(SessionEvent::DiskFlushed { id: 7 });
        pair.primary.step(arrives(&flushed(number)));
        assert!(pair.primary.done.is_empty(), "flush 7 was not reported: {number}");
        pair.primary.log(11);
        assert_eq!(pair.primary.take_rows(), "F", "{number}");
        assert!(
            !pair
                .primary
                .done
                .iter()
                .any(|action| matches!(action, Action::CompleteFlushes { .. }))
        );
    }
}

#[test]
fn a_backup_may_flush_before_the_primarys_guest_has_asked() {
    let mut pair = gated(ReleasePolicy::Compare);
    pair.primary.step(arrives(&flushed(7)));
    pair.primary.step(SessionEvent::FlushAsked { id: 7 });
    pair.primary.log(11);
    assert_eq!(pair.primary.take_rows(), "");
    pair.primary.step(SessionEvent::DiskFlushed { id: 7 });
    assert_eq!(pair.primary.take_done(), [Action::CompleteFlushes { through: 7 }]);
}

#[test]
fn a_state_restored_beyond_what_was_sent_loses_the_backup() {
    for number in [4].into_iter().chain(EXTREME) {
        let mut pair = attaching(|_| {});
        pair.primary.take_done();
        pair.primary.step(arrives(&restored(number)));
        let state = pair.primary.session.state_name();
        assert_eq!((state, &*pair.primary.take_rows()), ("Alone", "Z"), "{number}");
        assert!(!pair.primary.done.iter().any(|a| matches!(a, Action::BackupRestored { .. })));
    }
    let mut pair = attaching(|_| {});
    pair.primary.step(arrives(&restored(3)));
    assert_eq!(pair.primary.take_rows(), "", "that much was sent");
    pair.primary.step(arrives(&restored(2)));
    assert_eq!(pair.primary.take_rows(), "Z", "it goes back");
}

#[test]
fn a_backup_that_was_not_asked_does_not_take_over() {
    let mut pair = gated(ReleasePolicy::Compare);
    pair.primary.step(SessionEvent::Yield { through: Ordinal(9) });
    assert_eq!(pair.primary.session.state_name(), "Yielding");
    pair.primary.step(arrives(&Message::Promoted { term: Term(2) }));
    assert_eq!(pair.primary.take_rows(), "AI");
    assert_eq!(pair.primary.session.role(), Role::Primary);
}

/// What the backup said before it had the whole state is of another log.
#[test]
fn what_comes_between_the_end_of_a_state_and_ready_releases_nothing() {
    let mut pair = resyncing(Role::Primary);
    pair.primary.step(state_end(45));
    pair.primary.take_done();
    pair.primary.take_rows();
    let digest = OutputDigest::of(Ordinal(30), 0, &[3]);
    let (term, output, at) = (Term(1), OutputOrdinal(3), Ordinal(30));
    let early = [
        Message::Digest { term, output, at, digest },
        ack(44, 44),
        flushed(9),
        Message::Finished { term, state_digest: [1; 32] },
        fault(Evidence::default()),
    ];
    early.iter().for_each(|message| pair.primary.step(arrives(message)));
    assert_eq!((pair.primary.transmitted(), &*pair.primary.take_rows()), (vec![], ""));
    pair.primary.step(arrives(&Message::Ready { term }));
    grant_lease(&mut pair.primary);
    assert_eq!(pair.primary.transmitted(), [3]);
}

/// Answers the lease that the primary has asked for last.
fn grant_lease(primary: &mut Host) {
    let asked = primary.take_wire().into_iter().rev().find_map(|message| match message {
        Message::LeaseRequest { term, number } => Some((term, number)),
        _ => None,
    });
    let (term, number) = asked.expect("a lease is asked for");
    primary.step(arrives(&Message::LeaseGrant { term, number, lease_ns: 125 * MS }));
}

/// A backup that follows: it has the log through exit 10 and has reported output 1.
fn following(release: ReleasePolicy) -> Pair {
    let mut pair = Pair::following(|config| config.release = release);
    pair.output(1);
    pair.backup.take_done();
    pair.backup.take_rows();
    pair
}

/// The primary is lost, and this host claims the next term when the primary's lease is over.
fn claims(mut pair: Pair, message: &Message) {
    pair.backup.step(arrives(message));
    assert_eq!(pair.backup.take_rows(), "AT", "{message:?}");
    pair.backup.wait(config(Role::Backup).failure_ns);
    assert_eq!(pair.backup.take_done().last(), Some(&Action::ClaimTerm(Term(2))));
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.session.state_name(), "Live");
}

fn log(released: u64, group: Vec<u8>) -> Message {
    let released_through = OutputOrdinal(released);
    Message::Log { term: Term(1), released_through, group: group.into() }
}

#[test]
fn a_primary_whose_numbers_cannot_be_is_lost() {
    let (term, release) = (Term(1), ReleasePolicy::Compare);
    let (believe, on_divergence) = (Role::Primary, DivergencePolicy::Failover);
    for number in [11].into_iter().chain(EXTREME) {
        let (released_through, through) = (OutputOrdinal(number), Ordinal(number));
        let known = OutputOrdinal(1);
        let attach = Message::Attach { term: Term(number), release, on_divergence, believe };
        let yields = |through, released_through| Message::Yield {
            term,
            through,
            released_through,
            follows: true,
        };
        let wrong = [
            log(number, bare_group(11)),
            Message::Heartbeat { term, released_through },
            yields(Ordinal(10), released_through),
            yields(through, known),
            Message::Yield { term, through, released_through: known, follows: false },
            attach,
        ];
        wrong.iter().for_each(|message| claims(following(release), message));
    }
    for horizon in EXTREME.into_iter().chain([9]) {
        claims(following(release), &log(1, bare_group(horizon)));
    }
    let beat = |released| Message::Heartbeat { term, released_through: OutputOrdinal(released) };
    let mut pair = following(release);
    pair.backup.step(arrives(&beat(1)));
    claims(pair, &beat(0));
}

#[test]
fn a_log_may_run_ahead_by_what_a_guest_can_do_and_no_further() {
    let most = 10 + Limits::default().lag_exits_max + (1 << 17);
    let mut pair = following(ReleasePolicy::Compare);
    pair.backup.step(arrives(&log(1, bare_group(most))));
    assert_eq!(pair.backup.take_rows(), "");
    claims(following(ReleasePolicy::Compare), &log(1, bare_group(most + 1)));
}

#[test]
fn under_ack_a_primary_may_have_released_what_a_backup_behind_has_not_produced() {
    let most = 1 + 2 * Limits::default().gated_frames_max + 4096;
    let beat =
        |released| Message::Heartbeat { term: Term(1), released_through: OutputOrdinal(released) };
    let mut pair = following(ReleasePolicy::Ack);
    pair.backup.step(arrives(&beat(most)));
    assert_eq!(pair.backup.take_rows(), "");
    claims(following(ReleasePolicy::Ack), &beat(most + 1));
}

/// A backup that has the primary's hello and knows of term 5.
fn greeted() -> Host {
    let mut backup = Host::new(SessionConfig { highest_term: Term(5), ..config(Role::Backup) });
    let mut primary = Host::new(SessionConfig { highest_term: Term(5), ..config(Role::Primary) });
    backup.step(SessionEvent::Connected);
    primary.step(SessionEvent::Connected);
    backup.receive(primary.take_outbox());
    backup
}

#[test]
fn a_backup_follows_only_in_a_term_that_follows_from_its_witness() {
    let (release, on_divergence) = (ReleasePolicy::Compare, DivergencePolicy::Failover);
    let offers: [fn(Term, ReleasePolicy, DivergencePolicy) -> Message; 2] = [
        |term, release, on_divergence| Message::Welcome {
            term,
            rtc_epoch_s: 0,
            release,
            on_divergence,
        },
        |term, release, on_divergence| Message::Attach {
            term,
            release,
            on_divergence,
            believe: Role::Primary,
        },
    ];
    for offer in offers {
        let mut backup = greeted();
        backup.step(arrives(&offer(Term(5 + 1024), release, on_divergence)));
        assert_ne!(backup.session.state_name(), "AwaitingWelcome");
        for number in [5 + 1025, 1 << 40, COUNTER_MAX] {
            let mut backup = greeted();
            backup.step(arrives(&offer(Term(number), release, on_divergence)));
            assert_eq!((backup.take_done(), &*backup.take_rows()), (vec![Action::HangUp], "N"));
            assert_eq!(backup.session.term(), Some(Term(5)), "nothing was learnt");
        }
        for number in [COUNTER_MAX + 1, u64::MAX] {
            let mut backup = greeted();
            backup.step(arrives(&offer(Term(number), release, on_divergence)));
            let told = backup.stop_reason().map(ToString::to_string).unwrap_or_default();
            assert!(told.contains("malformed message with tag"), "{told}");
        }
    }
}

#[test]
fn a_state_that_cannot_be_ends_a_joining_backup_by_name() {
    let (term, digest) = (Term(1), OutputDigest([1; 16]));
    let held = |at, bytes| Message::Held { term, at: Ordinal(at), digest, frame: vec![1; bytes] };
    let end = |at, outputs| Message::StateEnd {
        term,
        outputs_through: OutputOrdinal(outputs),
        at: Ordinal(at),
        machine: vec![],
    };
    let frames_max = 2 * (Limits::default().gated_frames_max as usize + 256);
    let bytes_max = 2 * (Limits::default().gated_bytes_max as usize + 256 * FRAME_BYTES_MAX);
    let longest = bytes_max / FRAME_BYTES_MAX + 2;
    let wrong = [
        vec![Message::State { term, part: StatePart::Machine(vec![1]) }],
        vec![held(9, 1), held(8, 1)],
        vec![held(9, FRAME_BYTES_MAX + 1)],
        vec![held(9, 0); frames_max + 1],
        vec![held(9, FRAME_BYTES_MAX); longest],
        vec![held(9, 1), end(8, 1)],
        vec![held(9, 1), end(9, 0)],
        vec![end(0, 0)],
    ];
    for messages in wrong {
        let mut pair = attaching(|_| {});
        messages.iter().for_each(|message| pair.backup.step(arrives(message)));
        assert_eq!(pair.backup.take_rows(), "AE", "{:?}", messages.last());
        assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Incomplete));
    }
    let mut pair = attaching(|_| {});
    let right = [held(9, FRAME_BYTES_MAX), held(9, 0), end(9, 2)];
    right.iter().for_each(|message| pair.backup.step(arrives(message)));
    assert_eq!(pair.backup.session.state_name(), "Following");
}

#[test]
fn more_strays_than_a_host_sends_at_once_lose_the_backup() {
    let strays = |count, bytes| Message::Strays {
        term: Term(1),
        frames: Frames(vec![vec![7; bytes]; count]),
    };
    is_lost(gated(ReleasePolicy::Compare), &[strays(65, 0)]);
    is_lost(gated(ReleasePolicy::Compare), &[strays(1 << 20, 0)]);
    is_lost(gated(ReleasePolicy::Compare), &[strays(1, FRAME_BYTES_MAX + 1)]);
    let mut pair = gated(ReleasePolicy::Compare);
    pair.primary.step(arrives(&strays(64, FRAME_BYTES_MAX)));
    let frames = vec![vec![7; FRAME_BYTES_MAX]; 64];
    assert_eq!(pair.primary.done, [Action::Receive(frames)]);
}

/// A host answers a foreign hello with the difference, which has to fit into a message.
#[test]
fn a_hello_with_a_fact_that_is_too_long_is_malformed() {
    let mut fingerprint = example();
    fingerprint.cmdline = "x".repeat((16 << 20) - 1000);
    let (role, build) = (Role::Backup, build_id::tests::example());
    let hello = Message::Hello { role, build, fingerprint, highest_term: Term(0), runs: false };
    let mut primary = Host::new(config(Role::Primary));
    primary.step(SessionEvent::Connected);
    primary.step(arrives(&hello));
    assert_eq!((primary.take_rows(), primary.session.is_stopped()), ("A".into(), false));
}

// What a backup reports is what it did. Each of these found a break of the code that all other
// tests let pass.

#[test]
fn a_backup_acknowledges_what_it_executed_and_not_what_it_received() {
    let mut pair = Pair::following(|_| {});
    pair.primary.log(10);
    pair.pump();
    pair.backup.step(SessionEvent::Executed(Ordinal(4)));
    pair.backup.wait(50 * MS);
    assert_eq!(pair.backup.take_outbox(), [ack(10, 4)]);
}

#[test]
fn a_backup_reports_the_flush_that_its_disk_has_done() {
    let mut pair = Pair::following(|_| {});
    pair.backup.step(SessionEvent::FlushAsked { id: 3 });
    pair.backup.step(SessionEvent::DiskFlushed { id: 3 });
    assert_eq!(pair.backup.take_outbox(), [flushed(3)]);
    // The old primary, of the last that it has done, when the roles have changed.
    let mut pair = attached(|_| {});
    pair.primary.step(SessionEvent::FlushAsked { id: 6 });
    pair.primary.step(SessionEvent::DiskFlushed { id: 6 });
    pair.primary.step(SessionEvent::Yield { through: Ordinal(24) });
    pair.primary.take_outbox();
    pair.primary.step(arrives(&Message::Promoted { term: Term(2) }));
    assert_eq!(pair.primary.take_outbox(), [Message::DiskFlushed { term: Term(2), id: 6 }]);
}

#[test]
fn ready_counts_as_the_flushes_of_the_state_and_as_no_later_one() {
    let mut pair = attached(|_| {});
    pair.primary.step(SessionEvent::FlushAsked { id: 7 });
    pair.primary.step(SessionEvent::DiskFlushed { id: 7 });
    pair.primary.log(30);
    pair.pump();
    assert_eq!(pair.primary.take_done(), [], "the backup has not said that it has it");
    pair.primary.step(arrives(&flushed(7)));
    assert_eq!(pair.primary.take_done(), [Action::CompleteFlushes { through: 7 }]);
}

#[test]
fn a_flush_that_was_held_is_told_when_the_peer_is_lost_after_yield() {
    let told = Action::CompleteFlushes { through: 6 };
    // On the host that takes over: it waits for the old primary, which is gone.
    let mut pair = asked_to_take_over();
    pair.backup.step(SessionEvent::DiskFlushed { id: 6 });
    pair.backup.answer(2, true);
    assert!(!pair.backup.done.contains(&told), "the old primary will follow");
    pair.backup.disconnect();
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(24) });
    assert!(pair.backup.done.contains(&told));
    // On the host that yields: the backup did not take over.
    let mut pair = attached(|_| {});
    pair.primary.step(SessionEvent::DiskFlushed { id: 6 });
    pair.primary.step(SessionEvent::Yield { through: Ordinal(24) });
    pair.primary.disconnect();
    assert!(!pair.primary.done.contains(&told));
    pair.primary.answer(2, true);
    assert!(pair.primary.done.contains(&told));
}
