//! The rows of the decision table about lost peers and claims.

use super::*;

/// A primary that has asked the witness for its first term.
fn claiming_first() -> Pair {
    let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.take_done(), [Action::HoldTerm(Term(1))]);
    pair
}

/// One whose backup is ready.
fn beginning() -> Pair {
    let mut pair = claiming_first();
    pair.primary.answer(1, true);
    pair.pump();
    assert_eq!(pair.primary.session.state_name(), "Beginning");
    assert_eq!(pair.primary.take_done(), [Action::ClaimTerm(Term(1))], "the guest waits");
    pair.primary.take_rows();
    pair
}

#[test]
fn row_a_a_peer_lost_before_its_hello_changes_nothing() {
    let mut primary = Host::new(config(Role::Primary));
    primary.step(SessionEvent::Connected);
    primary.disconnect();
    assert_eq!(primary.take_rows(), "A");
    assert_eq!(primary.done, []);
    assert_eq!(primary.session.state_name(), "AwaitingBackup");
}

#[test]
fn row_b_a_term_that_was_not_offered_serves_the_next_backup() {
    let mut pair = claiming_first();
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "B");
    pair.primary.answer(1, true);
    assert_eq!(pair.primary.take_rows(), "C");
    assert_eq!(pair.primary.take_outbox(), []);
    pair.backup = Host::new(config(Role::Backup));
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.session.state_name(), "Beginning");
    assert!(!pair.primary.done.iter().any(|action| matches!(action, Action::HoldTerm(_))));
}

#[test]
fn row_b_a_second_backup_may_come_while_the_witness_thinks() {
    let mut pair = claiming_first();
    pair.primary.disconnect();
    pair.backup = Host::new(config(Role::Backup));
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.done, [], "one claim is enough");
    pair.primary.answer(1, true);
    pair.pump();
    assert_eq!(pair.primary.session.state_name(), "Beginning");
}

#[test]
fn row_c_a_term_won_is_offered() {
    let mut pair = claiming_first();
    pair.primary.answer(1, true);
    assert_eq!(pair.primary.take_rows(), "C");
    assert!(matches!(pair.primary.outbox[..], [Message::Welcome { term: Term(1), .. }]));
    assert_eq!(pair.primary.done, [], "the guest waits for the backup");
}

#[test]
fn row_d_a_first_term_denied_stops() {
    let mut pair = claiming_first();
    pair.primary.answer(1, false);
    assert_eq!(pair.primary.take_rows(), "D");
    assert_eq!(pair.primary.stop_reason(), Some(&StopReason::LostWitness { term: Term(1) }));
}

#[test]
fn row_e_an_offered_term_is_never_used_again() {
    let mut pair = claiming_first();
    pair.primary.answer(1, true);
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "CE");
    pair.primary.take_outbox();
    pair.backup = Host::new(config(Role::Backup));
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.take_done(), [Action::HoldTerm(Term(2))]);
    // The first backup took term 2 when the connection broke.
    pair.primary.answer(2, false);
    assert_eq!(pair.primary.take_rows(), "D");
    assert!(pair.primary.session.is_stopped());
}

#[test]
fn row_e_a_welcome_that_is_not_answered_is_an_offer_too() {
    let mut pair = claiming_first();
    pair.primary.answer(1, true);
    pair.primary.wait(5000 * MS);
    assert_eq!(pair.primary.take_rows(), "CE");
    assert_eq!(pair.primary.done, [Action::HangUp]);
}

#[test]
fn row_au_the_guest_starts_when_the_witness_knows_that_it_runs() {
    let mut pair = beginning();
    // However long that takes, the two tell each other that they are there.
    for _ in 0..40 {
        pair.primary.wait(50 * MS);
        pair.backup.wait(50 * MS);
        pair.pump();
    }
    assert_eq!((pair.primary.take_done(), &*pair.primary.take_rows()), (vec![], ""));
    pair.primary.answer(1, true);
    assert_eq!(pair.primary.take_rows(), "AU");
    assert!(matches!(pair.primary.take_done()[..], [Action::Begin { term: Term(1), .. }]));
    assert_eq!(pair.primary.session.state_name(), "Protected");
}

#[test]
fn row_av_a_guest_that_is_started_elsewhere_first_does_not_start_here() {
    let mut pair = beginning();
    pair.primary.answer(1, false);
    assert_eq!(pair.primary.take_rows(), "AV");
    assert_eq!(pair.primary.stop_reason(), Some(&StopReason::LostWitness { term: Term(2) }));
    assert!(!pair.primary.done.iter().any(|action| matches!(action, Action::Begin { .. })));
}

#[test]
fn row_aw_a_backup_that_is_lost_before_the_guest_starts_may_take_it_over() {
    let mut pair = beginning();
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "AW");
    pair.primary.answer(1, true);
    assert_eq!(pair.primary.take_done(), [], "the answer is late, and starts nothing");
    pair.primary.take_outbox();
    pair.backup = Host::new(config(Role::Backup));
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.take_done(), [Action::HoldTerm(Term(2))]);
}

#[test]
fn row_f_a_lost_backup_makes_the_primary_claim_and_nothing_leaves_meanwhile() {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    pair.primary.wait(499 * MS);
    assert_eq!(pair.primary.done, []);
    pair.primary.wait(MS);
    assert_eq!(pair.primary.take_rows(), "F");
    assert_eq!(pair.primary.take_done(), [Action::HangUp, Action::ClaimTerm(Term(2))]);
    pair.primary.output(2);
    assert_eq!(pair.primary.done, []);
}

#[test]
fn a_backup_that_lives_but_gets_nowhere_is_lost_too() {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    let mut waited_ms = 0;
    while pair.primary.rows.is_empty() {
        assert!(waited_ms <= 10_020, "the client waits for ever");
        for host in [&mut pair.primary, &mut pair.backup] {
            host.wait(20 * MS);
        }
        pair.pump();
        waited_ms += 20;
    }
    assert!(waited_ms >= 10_000, "given up after {waited_ms} ms");
    assert_eq!(pair.primary.take_rows(), "F");
    assert_eq!(pair.primary.take_done(), [Action::HangUp, Action::ClaimTerm(Term(2))]);
}

#[test]
fn row_g_a_backup_that_says_goodbye_is_lost_at_once() {
    let mut pair = Pair::following(|_| {});
    pair.backup.step(SessionEvent::HostStop);
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::HostRequest));
    pair.pump();
    assert_eq!(pair.primary.take_rows(), "G");
    assert_eq!(pair.primary.done, [Action::HangUp, Action::ClaimTerm(Term(2))]);
}

#[test]
fn row_k_a_connection_lost_during_the_claim_changes_nothing() {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    pair.primary.horizon(10);
    pair.backup.output_with(1, 7);
    pair.pump();
    assert_eq!(pair.primary.take_rows(), "I");
    pair.primary.take_done();
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "K");
    assert_eq!(pair.primary.take_done(), []);
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.transmitted(), [1]);
}

#[test]
fn row_l_the_primary_alone_releases_all_in_order_and_later_outputs_at_once() {
    let mut pair = Pair::following(|_| {});
    pair.output(1);
    assert_eq!(pair.primary.transmitted(), [1]);
    pair.primary.take_done();
    pair.primary.output(2);
    pair.primary.disconnect();
    pair.primary.output(3);
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.take_rows(), "FL");
    assert_eq!(pair.primary.transmitted(), [2, 3]);
    pair.primary.output(4);
    assert_eq!(pair.primary.transmitted(), [2, 3, 4]);
    pair.primary.log(50);
    assert_eq!(pair.primary.outbox, []);
}

#[test]
fn row_l_a_guest_that_has_ended_stops_the_primary_after_its_frames_left() {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    pair.primary.step(SessionEvent::GuestEnded { state_digest: [1; 32] });
    pair.primary.disconnect();
    pair.primary.take_done();
    pair.primary.answer(2, true);
    assert_eq!(
        pair.primary.done,
        [
            Action::GoAlone { term: Term(2) },
            Action::Transmit(vec![1]),
            Action::Stop(StopReason::Clean)
        ]
    );
}

#[test]
fn row_m_a_primary_that_loses_the_term_stops_and_keeps_its_frames() {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    pair.primary.disconnect();
    pair.primary.answer(2, false);
    assert_eq!(pair.primary.take_rows(), "FM");
    assert_eq!(pair.primary.transmitted(), []);
    let lost = StopReason::LostWitness { term: Term(2) };
    assert_eq!(pair.primary.stop_reason(), Some(&lost));
}

#[test]
fn row_n_a_primary_lost_before_its_welcome_leaves_nothing_to_take_over() {
    let mut backup = Host::new(config(Role::Backup));
    backup.step(SessionEvent::Connected);
    backup.disconnect();
    assert_eq!(backup.take_rows(), "N");
    assert_eq!(backup.done, []);
}

#[test]
fn row_o_a_lost_primary_makes_the_backup_claim() {
    let mut pair = Pair::following(|_| {});
    pair.backup.wait(500 * MS);
    assert_eq!(pair.backup.take_rows(), "O");
    assert_eq!(pair.backup.done, [Action::HangUp, Action::ClaimTerm(Term(2))]);
}

#[test]
fn row_p_a_primary_that_was_asked_to_stop_stops_the_pair() {
    let mut pair = Pair::following(|_| {});
    pair.primary.step(SessionEvent::HostStop);
    pair.pump();
    assert_eq!(pair.backup.take_rows(), "P");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::HostRequest));
}

#[test]
fn row_r_the_backup_live_sends_what_may_not_have_left_before_anything_newer() {
    let mut pair = Pair::following(|_| {});
    pair.output(1);
    pair.primary.log(15); // tells the backup that 1 has left
    pair.pump();
    pair.backup.output(2);
    pair.backup.output(3);
    pair.backup.disconnect();
    pair.backup.output(4);
    assert_eq!(pair.backup.transmitted(), []);
    pair.backup.take_done();
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.take_rows(), "OR");
    assert_eq!(pair.backup.done[0], Action::GoLive { term: Term(2) });
    assert_eq!(pair.backup.transmitted(), [2, 3, 4]);
    pair.backup.output(5);
    assert_eq!(pair.backup.transmitted(), [2, 3, 4, 5]);
}

#[test]
fn row_r_a_backup_behind_does_not_repeat_what_has_left() {
    let mut pair = Pair::following(|config| config.release = ReleasePolicy::Ack);
    pair.primary.output(1);
    pair.primary.log(10);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1]);
    pair.primary.log(11);
    pair.pump();
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    pair.backup.output(1);
    assert_eq!(pair.backup.transmitted(), []);
    pair.backup.output(2);
    assert_eq!(pair.backup.transmitted(), [2]);
}

#[test]
fn row_r_a_guest_that_has_ended_stops_the_backup_after_its_frames_left() {
    let mut pair = Pair::following(|_| {});
    pair.backup.output(1);
    pair.backup.step(SessionEvent::GuestEnded { state_digest: [1; 32] });
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.transmitted(), [1]);
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Clean));
}

#[test]
fn row_s_a_backup_that_loses_the_term_stops_and_keeps_its_frames() {
    let mut pair = Pair::following(|_| {});
    pair.backup.output(1);
    pair.backup.disconnect();
    pair.backup.answer(2, false);
    assert_eq!(pair.backup.take_rows(), "OS");
    assert_eq!(pair.backup.transmitted(), []);
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::LostWitness { term: Term(2) }));
}

/// A primary whose processor is stuck, one frame of its guest still held.
fn stuck() -> Pair {
    let mut pair = Pair::following(|_| ());
    pair.primary.output(1);
    pair.primary.log(10);
    pair.pump();
    pair.primary.step(SessionEvent::VcpuStuck { unseen_ns: 500 * MS });
    pair
}

#[test]
fn row_aq_a_stuck_processor_makes_the_backup_take_over() {
    let mut pair = stuck();
    assert_eq!(pair.primary.take_rows(), "AQ");
    assert_eq!(pair.primary.take_done(), [Action::HangUp]);
    // It may come back now: what it does is seen by nobody.
    pair.primary.output(2);
    pair.primary.log(20);
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    pair.backup.output(1);
    assert_eq!(pair.backup.take_rows(), "OR");
    assert_eq!(pair.backup.transmitted(), [1]);
    pair.primary.wait(3 * 500 * MS);
    assert_eq!(pair.primary.transmitted(), []);
    pair.primary.answer(2, false);
    assert_eq!(pair.primary.take_rows(), "ARM");
    assert_eq!(pair.primary.stop_reason(), Some(&StopReason::LostWitness { term: Term(2) }));
    assert_eq!(pair.primary.transmitted(), []);
}

#[test]
fn row_ar_when_the_backup_was_dead_too_the_stuck_host_keeps_the_guest() {
    let mut pair = stuck();
    pair.primary.take_done();
    pair.primary.wait(500 * MS);
    assert_eq!(pair.primary.take_done(), [], "the backup has its time");
    pair.primary.wait(500 * MS);
    assert_eq!(pair.primary.take_done(), [Action::ClaimTerm(Term(2))]);
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.take_rows(), "AQARL");
    assert_eq!(pair.primary.transmitted(), [1]);
    assert_eq!(pair.primary.session.state_name(), "Alone");
}

#[test]
fn a_stuck_processor_is_no_reason_where_nobody_else_could_go_on() {
    let mut pair = stuck();
    pair.primary.wait(1000 * MS);
    pair.primary.answer(2, true);
    pair.primary.take_rows();
    pair.primary.step(SessionEvent::VcpuStuck { unseen_ns: 500 * MS });
    assert_eq!(pair.primary.take_rows(), "");
    assert_eq!(pair.primary.session.state_name(), "Alone");
    let mut pair = Pair::following(|_| ());
    pair.backup.step(SessionEvent::VcpuStuck { unseen_ns: 500 * MS });
    assert_eq!((pair.backup.take_rows(), pair.backup.done.len()), (String::new(), 0));
}
