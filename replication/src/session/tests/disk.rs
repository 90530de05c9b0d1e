//! The guest's disk: flushes wait for both hosts, a host whose disk fails leaves.

use super::*;

fn flushed(id: u64) -> SessionEvent {
    SessionEvent::DiskFlushed { id }
}

fn failed(id: u64) -> SessionEvent {
    SessionEvent::DiskFailed { id, description: "request 3".into() }
}

fn tell(through: u64) -> Action {
    Action::CompleteFlushes { through }
}

#[test]
fn a_flush_is_told_when_both_disks_have_it() {
    let mut pair = Pair::following(|_| {});
    pair.primary.step(flushed(3));
    pair.pump();
    assert_eq!(pair.primary.take_done(), []);
    pair.backup.step(flushed(3));
    assert_eq!(pair.backup.take_done(), [], "its log says when its guest hears of it");
    pair.pump();
    assert_eq!(pair.primary.take_done(), [tell(3)]);

    pair.backup.step(flushed(7));
    pair.pump();
    assert_eq!(pair.primary.take_done(), []);
    pair.primary.step(flushed(7));
    assert_eq!(pair.primary.take_done(), [tell(7)]);
}

#[test]
fn a_flush_is_told_when_the_primary_is_sure_to_be_alone() {
    let mut pair = Pair::following(|_| {});
    pair.primary.step(flushed(3));
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_done(), [Action::ClaimTerm(Term(2))]);
    pair.primary.step(flushed(4));
    pair.primary.answer(2, true);
    let alone = Action::GoAlone { term: Term(2) };
    assert_eq!(pair.primary.take_done(), [alone, tell(4)]);
    pair.primary.step(flushed(5));
    assert_eq!(pair.primary.take_done(), [tell(5)]);
}

#[test]
fn a_backup_that_took_over_waits_for_nobody() {
    let mut pair = Pair::following(|_| {});
    pair.backup.step(flushed(2));
    pair.backup.take_outbox();
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    assert!(pair.backup.take_done().contains(&tell(2)));
    pair.backup.step(flushed(3));
    assert_eq!(pair.backup.take_done(), [tell(3)]);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(9) });
    pair.backup.step(flushed(4));
    assert_eq!(pair.backup.take_done(), [tell(4)]);
    assert_eq!(pair.backup.take_outbox(), []);
}

#[test]
fn a_backup_whose_disk_does_not_get_there_is_lost() {
    let mut pair = Pair::following(|_| {});
    pair.primary.step(flushed(3));
    for _ in 0..11_000 / 40 {
        pair.primary.wait(40 * MS);
        pair.backup.wait(40 * MS);
        pair.pump();
    }
    assert!(pair.primary.take_rows().starts_with('F'));
}

#[test]
fn a_host_whose_disk_fails_leaves_and_the_other_goes_on() {
    let mut pair = Pair::following(|_| {});
    pair.primary.step(failed(3));
    let reason = StopReason::DiskFailed { description: "request 3".into() };
    assert_eq!(pair.primary.take_done(), [Action::HangUp, Action::Stop(reason.clone())]);
    assert_eq!(pair.primary.take_outbox(), [], "a goodbye would stop the backup as well");
    pair.backup.disconnect();
    assert_eq!(pair.backup.take_done(), [Action::ClaimTerm(Term(2))]);

    let mut pair = Pair::following(|_| {});
    pair.backup.step(failed(3));
    assert_eq!(pair.backup.take_done(), [Action::HangUp, Action::Stop(reason)]);
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_done(), [Action::ClaimTerm(Term(2))]);
}

#[test]
fn the_last_host_tells_its_guest_of_a_failure() {
    let mut pair = Pair::following(|_| {});
    pair.primary.disconnect();
    pair.primary.answer(2, true);
    pair.primary.take_done();
    pair.primary.step(failed(3));
    assert_eq!(pair.primary.take_done(), [Action::CompleteDisk { id: 3 }]);

    let mut pair = Pair::following(|_| {});
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    pair.backup.take_done();
    pair.backup.step(failed(3));
    assert_eq!(pair.backup.take_done(), [Action::CompleteDisk { id: 3 }]);
}

/// What it has claimed or won meanwhile is no guest, and what it has not executed is no divergence.
#[test]
fn a_backup_whose_state_cannot_be_restored_leaves() {
    let unusable = || SessionEvent::StateUnusable { description: "no room".into() };
    let mut pair = Pair::following(|_| {});
    pair.backup.step(unusable());
    let reason = StopReason::StateUnusable { description: "no room".into() };
    assert_eq!(pair.backup.take_done(), [Action::HangUp, Action::Stop(reason.clone())]);
    assert_eq!(pair.backup.take_outbox(), [], "a goodbye would stop the primary as well");

    let claiming: fn(&mut Pair) = |pair| pair.backup.disconnect();
    let live: fn(&mut Pair) = |pair| {
        pair.backup.disconnect();
        pair.backup.answer(2, true);
    };
    let challenged: fn(&mut Pair) = |pair| {
        pair.primary.step(SessionEvent::GuestEnded { state_digest: [1; 32] });
        pair.backup.step(SessionEvent::GuestEnded { state_digest: [2; 32] });
        pair.pump();
        assert_eq!(pair.backup.session.state_name(), "AwaitingVerdict");
    };
    for meanwhile in [claiming, live, challenged] {
        let mut pair = Pair::following(|config| config.on_divergence = DivergencePolicy::Resync);
        meanwhile(&mut pair);
        pair.backup.take_done();
        let _ = pair.backup.take_outbox();
        pair.backup.step(unusable());
        let done = pair.backup.take_done();
        assert_eq!(done.last(), Some(&Action::Stop(reason.clone())));
        assert!(!done.iter().any(|action| matches!(action, Action::Incident(_))), "{done:?}");
        assert_eq!(pair.backup.take_outbox(), []);
    }
}
