//! How two sides meet, and every reason for which they do not.

use super::*;
use crate::fingerprint::tests::changed;

fn refused(host: &Host) -> &Refusal {
    match host.stop_reason() {
        Some(StopReason::BadConfiguration(refusal)) => refusal,
        other => panic!("stopped with {other:?}"),
    }
}

#[test]
fn the_guest_starts_on_both_sides_after_the_term_is_won() {
    let mut pair = Pair::new(
        SessionConfig { highest_term: Term(6), ..config(Role::Primary) },
        SessionConfig { highest_term: Term(6), rtc_epoch_s: 5, ..config(Role::Backup) },
    );
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.take_done(), [Action::HoldTerm(Term(7))]);
    assert_eq!(pair.backup.take_done(), []);
    pair.primary.answer(7, true);
    pair.pump();
    assert_eq!(pair.primary.take_done(), [Action::ClaimTerm(Term(7))]);
    pair.primary.answer(7, true);
    // The primary's date and policy count on both sides.
    let begin = Action::Begin {
        term: Term(7),
        rtc_epoch_s: 1_700_000_000,
        release: ReleasePolicy::Compare,
    };
    assert_eq!(pair.primary.take_done(), std::slice::from_ref(&begin));
    assert_eq!(pair.backup.take_done(), [begin]);
}

#[test]
fn every_fact_that_differs_is_refused_by_name_on_both_sides() {
    for (fact, other) in changed() {
        let other = SessionConfig { fingerprint: other, ..config(Role::Backup) };
        let mut pair = Pair::new(config(Role::Primary), other);
        pair.connect();
        pair.pump();
        let Refusal::Fingerprint(ours) = refused(&pair.primary) else { panic!("{fact}") };
        let Refusal::Fingerprint(theirs) = refused(&pair.backup) else { panic!("{fact}") };
        assert_eq!(ours.fact, fact);
        assert_eq!(*theirs, ours.clone().swapped());
        assert_eq!(refused(&pair.primary), refused(&pair.primary));
    }
}

#[test]
fn another_build_is_refused_by_name_on_both_sides() {
    let newer: BuildId = "0.2.0+fedcba9876543210".try_into().unwrap();
    // Whatever else differs: another build explains it.
    let (_, fingerprint) = changed().remove(0);
    let other = SessionConfig { build: newer.clone(), fingerprint, ..config(Role::Backup) };
    let mut pair = Pair::new(config(Role::Primary), other);
    pair.connect();
    pair.pump();
    let own = build_id::tests::example();
    let text = |own, other| {
        format!(
            "the other host runs build {other}, this one build {own}; run the same build on both"
        )
    };
    assert_eq!(refused(&pair.primary).to_string(), text(&own, &newer));
    assert_eq!(refused(&pair.backup).to_string(), text(&newer, &own));
}

#[test]
fn one_side_finds_the_difference_and_tells_the_other() {
    for (finder, told) in [(Role::Primary, Role::Backup), (Role::Backup, Role::Primary)] {
        let (_, other) = changed().remove(1);
        let mut finder = Host::new(config(finder));
        let mut told = Host::new(SessionConfig { fingerprint: other, ..config(told) });
        finder.step(SessionEvent::Connected);
        told.step(SessionEvent::Connected);
        finder.take_outbox();
        finder.receive(told.take_outbox());
        let refusal = finder.take_outbox();
        assert!(matches!(refusal[..], [Message::Refuse { .. }]));
        told.receive(refusal);
        assert_eq!(*refused(&told), refused(&finder).clone().swapped());
        assert!(refused(&told).to_string().starts_with("kernel differs: ours is sha256 00"));
    }
}

#[test]
fn two_of_the_same_role_refuse_each_other() {
    for role in [Role::Primary, Role::Backup] {
        let mut pair = Pair::new(config(role), config(role));
        pair.connect();
        pair.pump();
        for host in [&pair.primary, &pair.backup] {
            assert_eq!(refused(host), &Refusal::SameRole { role });
        }
    }
}

#[test]
fn a_backup_whose_witness_knows_a_later_term_refuses() {
    let late = SessionConfig { highest_term: Term(5), ..config(Role::Backup) };
    let mut pair = Pair::new(config(Role::Primary), late);
    pair.connect();
    pair.pump();
    pair.primary.answer(1, true);
    pair.pump();
    let stale = Refusal::StaleTerm { offered: Term(1), known: Term(5) };
    assert_eq!(refused(&pair.primary), &stale);
    assert_eq!(refused(&pair.backup), &stale);
}

#[test]
fn a_host_that_is_just_taking_over_has_no_time_for_a_joining_backup() {
    let mut pair = Pair::following(|_| {});
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    let mut joining = Pair { primary: Host::new(config(Role::Primary)), backup: pair.backup };
    joining.connect();
    joining.pump();
    assert_eq!(refused(&joining.primary), &Refusal::AlreadyRunning { term: Term(2) });
    assert_eq!(joining.backup.session.state_name(), "Live");
}

#[test]
fn another_wire_version_stops_both() {
    for role in [Role::Primary, Role::Backup] {
        let mut host = Host::new(config(role));
        host.step(SessionEvent::Connected);
        let error = WireError::VersionMismatch { ours: 1, theirs: 2 };
        let reason = DisconnectReason::Wire(error.clone());
        host.step(SessionEvent::Disconnected { reason });
        assert_eq!(refused(&host), &Refusal::Wire(error));
    }
}

#[test]
fn a_stranger_does_not_stop_a_primary_but_a_wrong_address_stops_a_backup() {
    let stranger = || SessionEvent::Disconnected {
        reason: DisconnectReason::Wire(WireError::NotFtvmm { first_bytes: b"GET /".to_vec() }),
    };
    let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
    pair.primary.step(SessionEvent::Connected);
    pair.primary.step(stranger());
    pair.primary.take_outbox();
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.done, [Action::HoldTerm(Term(1))]);

    let mut backup = Host::new(config(Role::Backup));
    backup.step(SessionEvent::Connected);
    backup.step(stranger());
    assert!(matches!(refused(&backup), Refusal::Wire(WireError::NotFtvmm { .. })));
}

#[test]
fn a_silent_peer_is_hung_up_on_and_the_next_is_served() {
    let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
    pair.primary.step(SessionEvent::Connected);
    pair.primary.wait(4999 * MS);
    assert_eq!(pair.primary.done, []);
    pair.primary.wait(MS);
    assert_eq!(pair.primary.take_done(), [Action::HangUp]);
    pair.primary.take_outbox();
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.done, [Action::HoldTerm(Term(1))]);
}

#[test]
fn a_welcome_without_a_hello_is_out_of_place() {
    let mut backup = Host::new(config(Role::Backup));
    backup.step(SessionEvent::Connected);
    backup.receive(vec![Message::Welcome {
        term: Term(1),
        rtc_epoch_s: 0,
        release: ReleasePolicy::Compare,
        on_divergence: DivergencePolicy::Failover,
    }]);
    assert_eq!(backup.done, [Action::HangUp]);
    assert_eq!(backup.session.state_name(), "AwaitingWelcome");
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let slow = SessionConfig { heartbeat_ns: 300 * MS, ..config(Role::Primary) };
    assert!(matches!(Session::new(slow), Err(SessionConfigError::Heartbeat { .. })));
    let mut narrow = config(Role::Primary);
    narrow.limits.gated_frames_max = 1;
    assert!(matches!(Session::new(narrow), Err(SessionConfigError::Limits { .. })));
}

#[test]
fn a_backup_that_is_not_wanted_yet_hangs_up_and_may_come_again() {
    let has = Refusal::HasBackup { backup: Some(([10, 0, 0, 2], 7).into()), for_s: 90 };
    assert_eq!(has.to_string(), "the guest there has a backup already, at 10.0.0.2:7, for 90 s");
    let is = Refusal::IsBackup { primary: None, for_s: 1 };
    for refusal in [has, is, Refusal::AlreadyRunning { term: Term(1) }] {
        let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
        pair.backup.step(SessionEvent::Connected);
        pair.backup.receive(vec![Message::Refuse { refusal: refusal.clone() }]);
        assert_eq!(pair.backup.take_done(), [Action::HangUp, Action::TurnedAway(refusal)]);
        pair.backup.take_outbox();
        pair.connect();
        pair.pump();
        assert_eq!(pair.primary.take_done(), [Action::HoldTerm(Term(1))]);
    }
    // Whoever has said Hello has accepted the connection: that is no time to say it.
    let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
    pair.connect();
    pair.pump();
    let late = Refusal::AlreadyRunning { term: Term(1) };
    pair.backup.receive(vec![Message::Refuse { refusal: late.clone() }]);
    assert_eq!(refused(&pair.backup), &late);
}

#[test]
fn only_who_has_a_peer_for_good_sends_another_away() {
    let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
    let answers = |pair: &Pair| {
        [&pair.primary, &pair.backup].map(|host| host.session.refuses_another(None, 5))
    };
    assert_eq!(answers(&pair), [None, None]);
    pair.connect();
    pair.pump();
    assert_eq!(answers(&pair), [None, None], "one that has only begun keeps nobody out");
    for _ in 0..2 {
        pair.primary.answer(1, true);
        pair.pump();
    }
    let wanted = [
        Some(Refusal::HasBackup { backup: None, for_s: 5 }),
        Some(Refusal::IsBackup { primary: None, for_s: 5 }),
    ];
    assert_eq!(answers(&pair), wanted);
    pair.primary.disconnect();
    pair.backup.disconnect();
    assert_eq!(answers(&pair), [None, None], "its place may be free in a moment");
}

/// Where anybody can connect, whoever does not fit has the wrong number.
#[test]
fn without_proof_no_stranger_ends_a_primary_that_waits() {
    let version = WireError::VersionMismatch { ours: 1, theirs: 2 };
    let refusal = Refusal::Wire(version.clone());
    let build: BuildId = "0.2.0+fedcba9876543210".try_into().unwrap();
    let hello = Message::Hello {
        role: Role::Backup,
        build,
        fingerprint: example(),
        highest_term: Term(0),
        runs: false,
    };
    let strange = [
        SessionEvent::Received(Message::Refuse { refusal }),
        SessionEvent::Received(hello),
        SessionEvent::Disconnected { reason: DisconnectReason::Wire(version) },
    ];
    for offered in [false, true] {
        for event in &strange {
            let open = |role| SessionConfig { peer_is_proved: false, ..config(role) };
            let mut pair = Pair::new(open(Role::Primary), open(Role::Backup));
            if offered {
                pair.connect();
                pair.pump();
                pair.primary.answer(1, true);
                pair.primary.take_outbox();
                assert_eq!(pair.primary.session.state_name(), "AwaitingReady");
                pair.backup = Host::new(open(Role::Backup));
            } else {
                pair.primary.step(SessionEvent::Connected);
            }
            pair.primary.take_rows();
            pair.primary.step(event.clone());
            assert_eq!(pair.primary.take_rows().len(), 1, "{event:?}");
            assert_eq!(pair.primary.session.state_name(), "AwaitingBackup", "{event:?}");
            pair.primary.take_wire();
            pair.backup.take_wire();
            pair.connect();
            pair.pump();
            let term = if offered { 2 } else { 1 };
            pair.primary.answer(term, true);
            pair.pump();
            pair.primary.answer(term, true);
            assert_eq!(pair.primary.session.state_name(), "Protected", "{event:?}");
        }
    }
}
