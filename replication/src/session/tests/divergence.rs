//! The rows of the decision table about divergence, and the evidence both sides keep.

use super::*;
use crate::incident::DivergenceCause;

/// A pair that agreed on output 1 and differs in output 2, both sides knowing.
fn diverged(tweak: impl FnOnce(&mut SessionConfig)) -> Pair {
    let mut pair = Pair::following(tweak);
    pair.output(1);
    pair.primary.take_done();
    pair.primary.output(2);
    pair.primary.horizon(20);
    pair.pump();
    pair.backup.output_with(2, 7);
    pair.pump();
    pair
}

/// The same, but the backup's answer to the challenge has not arrived.
fn challenged(tweak: impl FnOnce(&mut SessionConfig)) -> Pair {
    let mut pair = Pair::following(tweak);
    pair.primary.output(1);
    pair.primary.horizon(10);
    pair.backup.output_with(1, 7);
    let digest = pair.backup.take_outbox();
    pair.primary.receive(digest);
    assert_eq!(pair.primary.session.state_name(), "AwaitingEvidence");
    pair
}

fn fault() -> SessionEvent {
    SessionEvent::ReplayFault { description: "RIP differs".into() }
}

#[test]
fn row_h_without_the_backups_evidence_the_primary_settles_with_its_own() {
    let mut pair = challenged(|_| {});
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "HI");
    let incident = pair.primary.incident().unwrap();
    assert_eq!(incident.backup, None);
    assert_eq!(incident.primary.as_ref().unwrap().output.as_ref().unwrap().frame, [1]);
    assert_eq!(pair.primary.done.last(), Some(&Action::ClaimTerm(Term(2))));
}

#[test]
fn row_i_the_primary_is_believed_and_goes_on_alone() {
    let mut pair = diverged(|_| {});
    assert_eq!(pair.primary.take_rows(), "I");
    assert_eq!(pair.primary.transmitted(), [], "nothing leaves before the term is won");
    pair.primary.answer(2, true);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [2]);
    assert_eq!(pair.primary.session.state_name(), "Alone");
    assert_eq!(pair.backup.take_rows(), "Y");
    assert_eq!(pair.backup.transmitted(), []);
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
}

#[test]
fn row_i_evidence_is_waited_for_only_so_long() {
    let mut pair = challenged(|_| {});
    // The backup is alive but does not answer.
    for _ in 0..9 {
        pair.primary.wait(100 * MS);
        let ack = Message::Ack {
            term: Term(1),
            received_through: Ordinal(0),
            executed_through: Ordinal(0),
        };
        pair.primary.receive(vec![ack]);
    }
    assert_eq!(pair.primary.take_rows(), "");
    pair.primary.wait(100 * MS);
    assert_eq!(pair.primary.take_rows(), "I");
    assert!(pair.primary.incident().is_some());
}

#[test]
fn row_j_under_halt_both_stop_and_neither_frame_leaves() {
    let mut pair = diverged(halt);
    assert_eq!(pair.primary.take_rows(), "J");
    assert_eq!(pair.backup.take_rows(), "Y");
    for host in [&pair.primary, &pair.backup] {
        assert_eq!(host.stop_reason(), Some(&StopReason::Divergence));
        assert_eq!(host.transmitted(), []);
        assert!(host.incident().is_some());
    }
}

#[test]
fn both_reports_hold_both_frames_digests_and_the_records_before() {
    let pair = diverged(|_| {});
    let (at_primary, at_backup) =
        (pair.primary.incident().unwrap(), pair.backup.incident().unwrap());
    assert_eq!((at_primary.reporter, at_backup.reporter), (Role::Primary, Role::Backup));
    for report in [at_primary, at_backup] {
        assert_eq!(report.cause, DivergenceCause::Output { output: OutputOrdinal(2) });
        let sides = [report.primary.as_ref().unwrap(), report.backup.as_ref().unwrap()];
        let outputs = sides.map(|side| side.output.clone().unwrap());
        assert_eq!(outputs.clone().map(|output| output.frame), [[2], [2]]);
        assert_eq!(outputs.clone().map(|output| output.at), [Ordinal(20); 2]);
        assert_ne!(outputs[0].digest, outputs[1].digest);
        for side in sides {
            assert_eq!(side.last_records, ["10 time 0.000010000 s"]);
        }
    }
    let text = at_primary.to_string();
    assert!(
        text.starts_with("divergence in term 1: output 2 differs\nprimary: 2 outputs"),
        "{text}"
    );
}

#[test]
fn an_ack_release_compares_too_and_still_has_both_frames() {
    let mut pair = Pair::following(|config| config.release = ReleasePolicy::Ack);
    pair.primary.output(1);
    pair.primary.log(10);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1]);
    pair.primary.log(11); // tells the backup that 1 has left
    pair.pump();
    pair.backup.output_with(1, 7);
    pair.pump();
    for host in [&pair.primary, &pair.backup] {
        let incident = host.incident().unwrap();
        assert!(incident.primary.as_ref().unwrap().output.is_some());
        assert!(incident.backup.as_ref().unwrap().output.is_some());
    }
}

#[test]
fn an_early_digest_that_differs_is_found_when_the_own_output_comes() {
    let mut pair = Pair::following(halt);
    pair.primary.horizon(10);
    pair.pump();
    pair.backup.output_with(1, 7);
    pair.pump();
    assert_eq!(pair.primary.done, []);
    pair.primary.output(1);
    pair.pump();
    assert_eq!(pair.primary.stop_reason(), Some(&StopReason::Divergence));
    assert_eq!(pair.primary.transmitted(), []);
}

#[test]
fn unequal_final_states_are_a_divergence() {
    let mut pair = Pair::following(halt);
    pair.primary.step(SessionEvent::GuestEnded { state_digest: [1; 32] });
    pair.backup.step(SessionEvent::GuestEnded { state_digest: [2; 32] });
    pair.pump();
    for host in [&pair.primary, &pair.backup] {
        let incident = host.incident().unwrap();
        assert_eq!(incident.cause, DivergenceCause::FinalState);
        assert_eq!(incident.primary.as_ref().unwrap().state_digest, Some([1; 32]));
        assert_eq!(incident.backup.as_ref().unwrap().state_digest, Some([2; 32]));
        assert_eq!(host.stop_reason(), Some(&StopReason::Divergence));
    }
}

#[test]
fn an_output_only_one_side_produced_is_a_divergence_at_the_end() {
    for only_primary in [true, false] {
        let mut pair = Pair::following(halt);
        pair.primary.horizon(10);
        pair.pump();
        let host = if only_primary { &mut pair.primary } else { &mut pair.backup };
        host.output(1);
        pair.primary.step(SessionEvent::GuestEnded { state_digest: [1; 32] });
        pair.backup.step(SessionEvent::GuestEnded { state_digest: [1; 32] });
        pair.pump();
        let incident = pair.primary.incident().unwrap();
        assert_eq!(incident.cause, DivergenceCause::Output { output: OutputOrdinal(1) });
        assert_eq!(incident.primary.as_ref().unwrap().output.is_some(), only_primary);
        assert_eq!(incident.backup.as_ref().unwrap().output.is_some(), !only_primary);
        assert_eq!(pair.primary.transmitted(), []);
    }
}

#[test]
fn row_q_a_backup_known_to_differ_never_takes_over() {
    for silence in [false, true] {
        let mut pair = diverged(|_| {});
        pair.backup.take_done();
        if silence {
            pair.backup.wait(500 * MS);
        } else {
            pair.backup.disconnect();
        }
        assert_eq!(pair.backup.take_rows(), "Q");
        assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
    }
}

#[test]
fn row_t_a_fault_during_the_claim_stops_the_backup() {
    let mut pair = Pair::following(|_| {});
    pair.backup.disconnect();
    pair.backup.step(fault());
    assert_eq!(pair.backup.take_rows(), "OT");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
    let incident = pair.backup.incident().unwrap();
    assert_eq!(incident.backup.as_ref().unwrap().fault.as_deref(), Some("RIP differs"));
}

#[test]
fn row_u_a_fault_while_the_rest_of_the_log_is_executed_stops_the_backup() {
    let mut pair = Pair::following(|_| {});
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    pair.backup.step(fault());
    assert_eq!(pair.backup.take_rows(), "ORU");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
    assert!(pair.backup.incident().is_some());
}

/// The backup's fault and the primary's order cross.
#[test]
fn a_backup_that_has_found_a_difference_does_not_take_over_at_a_switch() {
    let policies = [
        (DivergencePolicy::Failover, Role::Backup, "I"),
        (DivergencePolicy::Halt, Role::Backup, "J"),
        (DivergencePolicy::Resync, Role::Primary, "AB"),
        (DivergencePolicy::Resync, Role::Backup, "AL"),
    ];
    for (on_divergence, believe, row) in policies {
        let mut pair = Pair::following(|config| {
            (config.on_divergence, config.believe) = (on_divergence, believe);
        });
        pair.primary.horizon(10);
        pair.pump();
        pair.primary.step(SessionEvent::Yield { through: Ordinal(10) });
        pair.backup.step(fault());
        pair.pump();
        assert_eq!(pair.primary.take_rows(), row);
        let rows = pair.backup.take_rows();
        assert_eq!(rows.contains("AM"), row == "AL", "{on_divergence:?}, {believe}: {rows}");
    }
}

#[test]
fn row_v_a_goodbye_before_the_verdict_is_no_permission_to_speak() {
    let mut pair = diverged(|_| {});
    pair.primary.step(SessionEvent::HostStop);
    pair.pump();
    assert_eq!(pair.backup.take_rows(), "V");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
}

#[test]
fn row_w_a_fault_is_put_to_the_primary() {
    let mut pair = Pair::following(halt);
    pair.primary.log(10);
    pair.pump();
    pair.backup.step(SessionEvent::Executed(Ordinal(9)));
    pair.backup.step(fault());
    assert_eq!(pair.backup.take_rows(), "W");
    pair.pump();
    let description = "RIP differs".to_owned();
    for host in [&pair.primary, &pair.backup] {
        let incident = host.incident().unwrap();
        let description = description.clone();
        assert_eq!(incident.cause, DivergenceCause::ReplayFault { description });
        assert_eq!(incident.backup.as_ref().unwrap().last_records, ["10 time 0.000010000 s"]);
        assert!(incident.primary.is_some());
        assert_eq!(host.stop_reason(), Some(&StopReason::Divergence));
    }
}

#[test]
fn a_fault_the_primary_does_not_answer_is_reported_with_one_side() {
    let mut pair = Pair::following(|config| config.heartbeat_ns = 100 * MS);
    pair.backup.step(fault());
    for _ in 0..10 {
        pair.backup.wait(100 * MS);
        let released_through = OutputOrdinal(0);
        pair.backup.receive(vec![Message::Heartbeat { term: Term(1), released_through }]);
    }
    assert_eq!(pair.backup.incident().unwrap().primary, None);
    assert!(!pair.backup.session.is_stopped(), "the verdict is the primary's");
}

#[test]
fn row_x_a_backup_stood_down_without_a_challenge_stops() {
    let mut pair = Pair::following(|_| {});
    pair.backup.receive(vec![Message::StandDown { term: Term(1) }]);
    assert_eq!(pair.backup.take_rows(), "X");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
}

#[test]
fn row_y_the_verdict_stops_the_backup() {
    let mut pair = diverged(|_| {});
    pair.backup.receive(vec![Message::StandDown { term: Term(1) }]);
    assert_eq!(pair.backup.take_rows(), "Y");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
}
