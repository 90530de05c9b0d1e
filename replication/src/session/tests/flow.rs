//! The ordinary course: release, acknowledgement, heartbeats, flow control and the end.

use super::*;
use crate::policy::Limits;

#[test]
fn frames_leave_when_both_sides_have_produced_them() {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    pair.primary.output(2);
    pair.primary.log(20);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), []);
    pair.backup.output(1);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1]);
    pair.backup.output(2);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1, 2]);
    assert_eq!(pair.backup.transmitted(), []);
}

#[test]
fn under_ack_frames_leave_when_the_log_through_their_exit_arrived() {
    let mut pair = Pair::following(|config| config.release = ReleasePolicy::Ack);
    pair.primary.output(1);
    pair.primary.log(9);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), []);
    pair.primary.log(10);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1]);
}

#[test]
fn groups_reach_the_cursor_as_they_were() {
    let mut pair = Pair::following(|_| {});
    pair.primary.log(10);
    let [Message::Log { group, .. }] = &pair.primary.outbox[..] else { panic!() };
    let group = group.to_vec();
    pair.pump();
    assert_eq!(pair.backup.take_done(), [Action::DeliverGroup(group)]);
}

#[test]
fn heartbeats_are_sent_in_silence_and_keep_the_peer_alive() {
    let mut pair = Pair::following(|_| {});
    for _ in 0..100 {
        pair.primary.wait(49 * MS);
        pair.backup.wait(49 * MS);
        assert_eq!(pair.primary.outbox, []);
        assert_eq!(pair.backup.outbox, []);
        pair.primary.wait(MS);
        pair.backup.wait(MS);
        assert!(matches!(pair.primary.outbox[..], [Message::Heartbeat { .. }]));
        assert!(matches!(pair.backup.outbox[..], [Message::Ack { .. }]));
        pair.pump();
    }
    assert_eq!(pair.primary.take_rows() + &pair.backup.take_rows(), "");
}

#[test]
fn a_busy_channel_needs_no_heartbeats() {
    let mut pair = Pair::following(|_| {});
    for horizon in 1..100 {
        pair.primary.wait(40 * MS);
        pair.backup.wait(40 * MS);
        pair.primary.log(horizon);
        assert!(matches!(pair.primary.outbox[..], [Message::Log { .. }]));
        pair.pump();
    }
}

#[test]
fn the_own_pause_is_not_the_peers_silence() {
    let mut pair = Pair::following(|_| {});
    pair.primary.wait(50 * MS);
    pair.primary.now_ns += 10_000 * MS;
    pair.primary.step(SessionEvent::Tick);
    assert_eq!(pair.primary.take_rows(), "", "what the peer sent may wait behind this tick");
    pair.primary.wait(450 * MS);
    assert_eq!(pair.primary.take_rows(), "F", "but a peer that stays silent is lost");
}

#[test]
fn messages_of_an_older_term_are_ignored() {
    let tweak = |role| SessionConfig { highest_term: Term(4), ..config(role) };
    let mut pair = Pair::new(tweak(Role::Primary), tweak(Role::Backup));
    pair.connect();
    pair.pump();
    for _ in 0..2 {
        pair.primary.answer(5, true);
        pair.pump();
    }
    pair.primary.output(1);
    pair.primary.horizon(10);
    pair.primary.take_done();
    let digest = OutputDigest::of(Ordinal(10), 0, &[1]);
    let output = OutputOrdinal(1);
    let report = |term| Message::Digest { term, output, at: Ordinal(10), digest };
    pair.primary.receive(vec![report(Term(4))]);
    assert_eq!(pair.primary.done, []);
    pair.primary.receive(vec![report(Term(5))]);
    assert_eq!(pair.primary.transmitted(), [1]);

    let stand_down = |term| Message::StandDown { term };
    pair.backup.receive(vec![
        stand_down(Term(4)),
        Message::Yield {
            term: Term(4),
            through: Ordinal(10),
            released_through: output,
            follows: true,
        },
    ]);
    assert_eq!(pair.backup.take_rows(), "");
    assert!(pair.backup.session.is_protected());
    pair.backup.receive(vec![stand_down(Term(5))]);
    assert_eq!(pair.backup.take_rows(), "X");
}

#[test]
fn a_newer_term_or_a_broken_protocol_is_a_lost_peer() {
    let ack =
        |term| Message::Ack { term, received_through: Ordinal(0), executed_through: Ordinal(0) };
    let wrong = [
        ack(Term(2)),
        Message::Ready { term: Term(1) },
        Message::Heartbeat { term: Term(1), released_through: OutputOrdinal(0) },
        Message::Digest {
            term: Term(1),
            output: OutputOrdinal(2),
            at: Ordinal(1),
            digest: OutputDigest([0; 16]),
        },
    ];
    for message in wrong {
        let mut pair = Pair::following(|_| {});
        pair.primary.receive(vec![message]);
        assert_eq!(pair.primary.take_rows(), "F");
    }
    let log = |group: Vec<u8>| Message::Log {
        term: Term(1),
        released_through: OutputOrdinal(0),
        group: group.into(),
    };
    let (mut ahead, mut behind) = (GroupEncoder::new(), GroupEncoder::new());
    let backwards = vec![log(ahead.finish(Ordinal(9))), log(behind.finish(Ordinal(8)))];
    let heartbeat =
        |output| Message::Heartbeat { term: Term(1), released_through: OutputOrdinal(output) };
    let wrong = [
        vec![ack(Term(1))],
        vec![log(vec![1, 2, 3])],
        backwards,
        vec![heartbeat(3), heartbeat(2)],
        vec![Message::Bye { term: Term(1), reason: ByeReason::Ended }],
    ];
    for messages in wrong {
        let mut pair = Pair::following(|_| {});
        pair.backup.receive(messages);
        assert_eq!(pair.backup.take_rows(), "AT");
        assert!(pair.backup.done.contains(&Action::HangUp));
    }
}

#[test]
fn what_arrives_after_hanging_up_has_no_effect() {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    pair.backup.output(1);
    let late = pair.backup.take_outbox();
    pair.primary.wait(500 * MS);
    pair.primary.receive(late);
    pair.primary.disconnect();
    assert_eq!(pair.primary.transmitted(), []);
    assert_eq!(pair.primary.take_rows(), "F");
}

#[test]
fn an_answer_to_another_claim_has_no_effect() {
    let mut pair = Pair::following(|_| {});
    pair.primary.disconnect();
    pair.primary.answer(1, true);
    pair.primary.answer(3, false);
    assert_eq!(pair.primary.take_rows(), "F");
    assert_eq!(pair.primary.session.state_name(), "ClaimingTerm");
}

fn congestion(host: &mut Host) -> Vec<bool> {
    let changes = host.take_done().into_iter().filter_map(|action| match action {
        Action::Congested(congested) => Some(congested),
        _ => None,
    });
    changes.collect()
}

#[test]
fn the_guest_waits_while_too_many_frames_are_gated() {
    let mut pair = Pair::following(|config| {
        config.limits = Limits { gated_frames_max: 4, ..Limits::default() };
    });
    (1..=3).for_each(|number| pair.primary.output(number));
    assert_eq!(congestion(&mut pair.primary), []);
    pair.primary.output(4);
    assert_eq!(congestion(&mut pair.primary), [true]);
    pair.primary.horizon(40);
    (1..=2).for_each(|number| pair.backup.output(number));
    pair.pump();
    assert_eq!(congestion(&mut pair.primary), [], "half of the limit is the low mark");
    pair.backup.output(3);
    pair.pump();
    assert_eq!(congestion(&mut pair.primary), [false]);
}

#[test]
fn the_guest_waits_while_the_backup_is_far_behind() {
    let mut pair = Pair::following(|config| {
        config.limits = Limits { log_bytes_max: 100, ..Limits::default() };
    });
    let mut horizon = 0;
    while congestion(&mut pair.primary) != [true] {
        horizon += 1;
        pair.primary.log(horizon);
        pair.pump();
    }
    assert!((8..15).contains(&horizon), "congested after {horizon} groups");
    pair.backup.step(SessionEvent::Executed(Ordinal(horizon)));
    pair.backup.wait(50 * MS);
    pair.pump();
    assert_eq!(congestion(&mut pair.primary), [false], "the heartbeat says it at the latest");
}

#[test]
fn a_primary_that_goes_alone_no_longer_waits() {
    let mut pair = Pair::following(|config| {
        config.limits = Limits { gated_bytes_max: 2, ..Limits::default() };
    });
    pair.primary.output(1);
    pair.primary.output(2);
    pair.primary.disconnect();
    assert_eq!(congestion(&mut pair.primary), [true]);
    pair.primary.answer(2, true);
    assert_eq!(congestion(&mut pair.primary), [false]);
}

#[test]
fn a_guest_that_ends_alike_ends_both_in_either_order() {
    for primary_first in [true, false] {
        for release in [ReleasePolicy::Compare, ReleasePolicy::Ack] {
            let mut pair = Pair::following(|config| config.release = release);
            pair.primary.output(1);
            pair.primary.horizon(10);
            pair.pump();
            pair.backup.output(1);
            let ended = SessionEvent::GuestEnded { state_digest: [1; 32] };
            if primary_first {
                pair.primary.step(ended.clone());
                pair.pump();
                pair.backup.step(ended);
            } else {
                pair.backup.step(ended.clone());
                pair.pump();
                pair.primary.step(ended);
            }
            pair.pump();
            assert_eq!(pair.primary.transmitted(), [1]);
            assert_eq!(pair.primary.stop_reason(), Some(&StopReason::Clean));
            assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Clean));
            assert_eq!(pair.backup.transmitted(), []);
        }
    }
}

#[test]
fn a_stopped_session_does_nothing() {
    let mut pair = Pair::following(|_| {});
    pair.primary.step(SessionEvent::HostStop);
    pair.primary.take_done();
    pair.primary.take_outbox();
    pair.primary.output(1);
    pair.primary.disconnect();
    pair.primary.wait(1000 * MS);
    assert_eq!(pair.primary.take_done(), []);
    assert_eq!(pair.primary.session.next_deadline_ns(), None);
}
