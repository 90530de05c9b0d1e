//! A primary that was away, and a backup that keeps its promise.

use super::*;

/// The lease of the default configuration.
const LEASE_NS: u64 = 125 * MS;

fn broken() -> SessionEvent {
    let description = "connection reset".into();
    SessionEvent::Disconnected { reason: DisconnectReason::Transport { description } }
}

/// A pair in which the backup has produced frame 1, and the digest is on its way.
fn with_digest_under_way() -> Pair {
    let mut pair = Pair::following(|_| {});
    pair.primary.output(1);
    pair.primary.log(10);
    pair.pump();
    pair.backup.output(1);
    pair
}

#[test]
fn a_primary_that_was_away_releases_when_the_backup_still_follows() {
    let mut pair = with_digest_under_way();
    pair.primary.now_ns += LEASE_NS;
    let digest = pair.backup.take_wire();
    pair.primary.receive(digest);
    assert_eq!(pair.primary.transmitted(), []);
    assert!(matches!(pair.primary.wire[..], [Message::LeaseRequest { .. }]));
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1]);
}

#[test]
fn a_primary_that_was_away_too_long_releases_nothing_of_what_waited_in_its_socket() {
    let mut pair = with_digest_under_way();
    let digest = pair.backup.take_wire();
    pair.backup.wait(500 * MS);
    assert_eq!(pair.backup.take_rows(), "O");
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.transmitted(), [1]);
    pair.primary.now_ns += 7000 * MS;
    pair.primary.step(SessionEvent::Tick);
    pair.primary.receive(digest);
    pair.primary.output(2);
    pair.primary.wait(100 * MS);
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "F");
    pair.primary.answer(2, false);
    assert_eq!(pair.primary.take_rows(), "M");
    assert_eq!(pair.primary.transmitted(), []);
}

#[test]
fn a_primary_that_was_away_goes_on_when_the_witness_says_so() {
    let mut pair = with_digest_under_way();
    pair.primary.now_ns += 7000 * MS;
    let digest = pair.backup.take_wire();
    pair.primary.receive(digest);
    pair.primary.disconnect();
    assert_eq!(pair.primary.transmitted(), []);
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.transmitted(), [1]);
}

#[test]
fn a_pause_between_the_decision_and_the_release_counts_too() {
    let mut pair = with_digest_under_way();
    let mut actions = Vec::new();
    let Host { session, now_ns, .. } = &mut pair.primary;
    let digest = pair.backup.outbox.pop().unwrap();
    session.step(*now_ns, SessionEvent::Received(digest), &mut actions);
    assert!(session.has_release() && session.may_speak(*now_ns));
    session.release(*now_ns + LEASE_NS, &mut actions);
    assert_eq!(actions, [], "the decision is older than the lease");
    assert!(!session.may_speak(*now_ns + LEASE_NS));
    session.release(*now_ns, &mut actions);
    assert_eq!(actions, [], "time does not go back");
}

#[test]
fn a_lease_is_renewed_before_it_is_over_and_nothing_waits() {
    let mut pair = Pair::following(|_| {});
    let mut requests = 0;
    for number in 1..=100 {
        pair.primary.wait(20 * MS);
        pair.backup.wait(20 * MS);
        requests += pair.primary.wire.iter().filter(|message| is_of_lease(message)).count();
        pair.pump();
        assert!(pair.primary.session.may_speak(pair.primary.now_ns));
        pair.output(number);
        assert_eq!(pair.primary.transmitted().len(), usize::from(number));
    }
    // Every 62.5 ms, at a tick or an event.
    assert!((25..=33).contains(&requests), "{requests} requests in two seconds");
}

#[test]
fn a_request_without_an_answer_is_made_again() {
    let mut pair = with_digest_under_way();
    let digest = pair.backup.take_wire();
    pair.primary.wait(70 * MS);
    let lost = pair.primary.take_wire();
    assert_eq!(lost.iter().filter(|message| is_of_lease(message)).count(), 1);
    pair.primary.receive(digest);
    assert_eq!(pair.primary.transmitted(), [1], "the first lease is not over");
    pair.primary.wait(LEASE_NS);
    assert_eq!(pair.primary.wire.iter().filter(|message| is_of_lease(message)).count(), 1);
    assert!(!pair.primary.session.may_speak(pair.primary.now_ns));
    pair.pump();
    assert!(pair.primary.session.may_speak(pair.primary.now_ns));
    // The answer to the one that was lost: its lease would be over.
    let [.., Message::LeaseRequest { term, number }] = lost[..] else { panic!("{lost:?}") };
    pair.primary.receive(vec![Message::LeaseGrant { term, number, lease_ns: LEASE_NS }]);
    assert_eq!(pair.primary.take_rows(), "");
}

#[test]
fn a_lease_nobody_asked_for_is_a_breach_and_a_long_one_is_cut() {
    let grant = |number, lease_ns| Message::LeaseGrant { term: Term(1), number, lease_ns };
    let mut pair = Pair::following(|_| {});
    pair.primary.receive(vec![grant(2, LEASE_NS)]);
    assert_eq!(pair.primary.take_rows(), "F");
    let mut pair = Pair::following(|_| {});
    pair.primary.wait(63 * MS);
    pair.primary.receive(vec![grant(2, u64::MAX)]);
    pair.primary.now_ns += LEASE_NS;
    assert!(!pair.primary.session.may_speak(pair.primary.now_ns));
    let request = Message::LeaseRequest { term: Term(1), number: 1 };
    pair.primary.receive(vec![request.clone()]);
    assert_eq!(pair.primary.take_rows(), "F", "a backup releases nothing");
    pair.backup.receive(vec![grant(1, LEASE_NS)]);
    assert_eq!(pair.backup.take_rows(), "AT", "a primary grants nothing");
    let mut early = Host::new(config(Role::Backup));
    early.step(SessionEvent::Connected);
    early.receive(vec![request]);
    assert!(early.done.contains(&Action::HangUp), "it follows nobody");
}

#[test]
fn the_guest_is_told_of_no_flush_without_a_lease() {
    let mut pair = Pair::following(|_| {});
    pair.primary.step(SessionEvent::DiskFlushed { id: 4 });
    pair.backup.step(SessionEvent::DiskFlushed { id: 4 });
    pair.primary.now_ns += LEASE_NS;
    let flushed = pair.backup.take_wire();
    pair.primary.receive(flushed);
    let told = Action::CompleteFlushes { through: 4 };
    assert!(!pair.primary.done.contains(&told));
    pair.pump();
    assert!(pair.primary.done.contains(&told));
}

#[test]
fn no_goodbye_before_the_last_frame_has_left() {
    let mut pair = with_digest_under_way();
    let ended = SessionEvent::GuestEnded { state_digest: [1; 32] };
    pair.primary.step(ended.clone());
    pair.backup.step(ended);
    pair.primary.now_ns += LEASE_NS;
    let last = pair.backup.take_wire();
    pair.primary.receive(last);
    assert_eq!(pair.primary.stop_reason(), None);
    assert_eq!(pair.primary.outbox, []);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1]);
    assert_eq!(pair.primary.stop_reason(), Some(&StopReason::Clean));
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Clean));
}

#[test]
fn row_at_a_backup_whose_connection_breaks_claims_when_the_lease_is_over() {
    let mut pair = Pair::following(|_| {});
    pair.backup.wait(20 * MS);
    pair.backup.step(broken());
    assert_eq!(pair.backup.take_rows(), "AT");
    let promise_ns = LEASE_NS + LEASE_NS / 8;
    pair.backup.wait(promise_ns - 20 * MS - 1);
    assert_eq!(pair.backup.take_done(), []);
    pair.backup.wait(1);
    assert_eq!(pair.backup.take_done(), [Action::ClaimTerm(Term(2))]);
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.take_rows(), "R");

    let mut pair = Pair::following(|_| {});
    pair.backup.wait(promise_ns);
    pair.backup.step(broken());
    assert_eq!(pair.backup.take_rows(), "O", "the lease is over already");
    let mut pair = Pair::following(|_| {});
    pair.backup.disconnect();
    assert_eq!(pair.backup.take_rows(), "O", "a primary that hung up releases nothing more");
}

#[test]
fn a_backup_that_claims_or_knows_of_a_divergence_grants_nothing() {
    let request = Message::LeaseRequest { term: Term(1), number: 7 };
    let mut pair = Pair::following(|_| {});
    pair.backup.step(SessionEvent::ReplayFault { description: "elsewhere".into() });
    pair.backup.take_wire();
    pair.backup.receive(vec![request.clone()]);
    assert_eq!(pair.backup.wire, []);
    assert_eq!(pair.backup.session.state_name(), "AwaitingVerdict");
    let mut pair = Pair::following(|_| {});
    pair.backup.wait(500 * MS);
    pair.backup.receive(vec![request]);
    assert!(!pair.backup.wire.iter().any(is_of_lease));
}

#[test]
fn after_a_switch_the_new_primary_has_a_lease_of_its_own() {
    let mut pair = Pair::following(|_| {});
    pair.output(1);
    pair.primary.step(SessionEvent::Yield { through: Ordinal(10) });
    pair.pump();
    assert!(!pair.primary.session.may_speak(pair.primary.now_ns), "it has asked");
    pair.backup.answer(2, true);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(10) });
    assert!(!pair.backup.session.may_speak(pair.backup.now_ns));
    pair.backup.wait(0);
    pair.pump();
    assert!(pair.backup.session.may_speak(pair.backup.now_ns));
    assert!(!pair.primary.session.may_speak(pair.primary.now_ns));
}
