//! A guest that runs alone gets a backup; roles change hands; a state replaces another.

use super::*;
use crate::state::StatePart;

/// A primary that runs alone in term 1, and a backup that knows of that term.
fn alone(tweak: impl FnOnce(&mut SessionConfig)) -> Pair {
    let mut primary = config(Role::Primary);
    tweak(&mut primary);
    let mut backup = config(Role::Backup);
    backup.highest_term = Term(1);
    let mut pair = Pair::new(primary, backup);
    pair.primary.step(SessionEvent::StartAlone);
    pair.primary.answer(1, true);
    assert_eq!(pair.primary.session.state_name(), "Alone");
    pair.primary.take_done();
    pair.primary.take_rows();
    pair
}

/// The guest stands at this exit, and its state is whole.
pub(super) fn state_end(at: u64) -> SessionEvent {
    SessionEvent::StateEnd { at: Ordinal(at), machine: vec![], disk_through: 0 }
}

fn part() -> StatePart {
    StatePart::Pages(vec![1, 2, 3])
}

/// The same, the backup connected and half of the state sent.
pub(super) fn attaching(tweak: impl FnOnce(&mut SessionConfig)) -> Pair {
    let mut pair = alone(tweak);
    pair.connect();
    pair.pump();
    assert_eq!(pair.primary.session.state_name(), "Attaching");
    assert_eq!(pair.backup.session.state_name(), "Joining");
    pair.primary.step(SessionEvent::State(part()));
    pair.pump();
    pair
}

/// The same, the backup following from exit 25 on, after output 2 has left.
pub(super) fn attached(tweak: impl FnOnce(&mut SessionConfig)) -> Pair {
    let mut pair = attaching(tweak);
    pair.primary.output(1);
    pair.primary.output(2);
    pair.primary.step(SessionEvent::StateEnd {
        at: Ordinal(25),
        machine: vec![9],
        disk_through: 0,
    });
    pair.pump();
    pair.primary.encoder = GroupEncoder::new();
    for host in [&mut pair.primary, &mut pair.backup] {
        host.take_done();
        host.take_rows();
    }
    pair
}

#[test]
fn a_guest_that_runs_alone_gets_a_backup() {
    let mut pair = attaching(|_| {});
    pair.primary.output(1);
    assert_eq!(pair.primary.transmitted(), [1], "outputs leave at once");
    assert!(pair.primary.done.contains(&Action::SendState));
    assert!(pair.backup.done.contains(&Action::RestoreState(part())));
    pair.backup.step(SessionEvent::StateRestored { restored_bytes: 3 });
    pair.pump();
    assert!(pair.primary.done.contains(&Action::BackupRestored { restored_bytes: 3 }));
    pair.primary.step(SessionEvent::DiskFlushed { id: 4 });
    let told = |through| Action::CompleteFlushes { through };
    assert!(pair.primary.done.contains(&told(4)), "nobody else has a disk");
    pair.primary.step(SessionEvent::StateEnd {
        at: Ordinal(25),
        machine: vec![9],
        disk_through: 4,
    });
    pair.primary.output(3);
    pair.primary.step(SessionEvent::DiskFlushed { id: 5 });
    assert!(!pair.primary.done.contains(&told(5)));
    assert_eq!(pair.primary.transmitted(), [1], "from the end of the state on outputs are held");
    pair.pump();
    assert!(pair.primary.done.contains(&Action::Protect { at: Ordinal(25) }));
    assert!(pair.backup.done.contains(&Action::RestoreState(StatePart::Machine(vec![9]))));
    assert_eq!(pair.backup.session.state_name(), "Following");
    pair.primary.encoder = GroupEncoder::new();
    pair.primary.log(30);
    pair.backup.output(3);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [1, 3], "the numbers go on");
}

#[test]
fn a_backup_that_took_over_gets_the_next_backup() {
    let mut pair = attached(|_| {});
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.session.state_name(), "Live");
    pair.backup.output(3);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(30) });
    assert_eq!(pair.backup.session.role(), Role::Primary);
    assert_eq!(
        (pair.backup.session.state_name(), pair.backup.session.term()),
        ("Alone", Some(Term(2)))
    );
    assert_eq!(pair.backup.transmitted(), [3]);
    let mut joining = config(Role::Backup);
    joining.highest_term = Term(2);
    let mut next = Pair { primary: pair.backup, backup: Host::new(joining) };
    next.connect();
    next.pump();
    next.primary.step(SessionEvent::StateEnd { at: Ordinal(41), machine: vec![], disk_through: 0 });
    next.pump();
    assert_eq!(next.backup.session.state_name(), "Following");
    next.primary.output(5);
    next.primary.log(50);
    next.pump();
    assert_eq!(next.primary.transmitted(), [3]);
    next.backup.output(5);
    next.pump();
    assert_eq!(next.primary.transmitted(), [3, 5]);
}

#[test]
fn what_does_not_fit_is_refused_and_the_guest_goes_on() {
    let mut pair = alone(|_| {});
    let mut other = config(Role::Backup);
    other.fingerprint.memory_mib += 1;
    pair.backup = Host::new(other);
    pair.connect();
    pair.pump();
    assert!(matches!(pair.backup.stop_reason(), Some(StopReason::BadConfiguration(_))));
    assert_eq!(pair.primary.session.state_name(), "Alone");
    assert!(pair.primary.done.contains(&Action::HangUp));
    pair.backup = Host::new(config(Role::Primary));
    pair.connect();
    pair.pump();
    assert!(matches!(
        pair.backup.stop_reason(),
        Some(StopReason::BadConfiguration(Refusal::SameRole { .. }))
    ));
    assert_eq!(pair.primary.session.state_name(), "Alone");
}

#[test]
fn a_leftover_primary_is_refused_by_the_backup() {
    let mut pair = alone(|_| {});
    let mut backup = config(Role::Backup);
    backup.highest_term = Term(7);
    pair.backup = Host::new(backup);
    pair.connect();
    pair.pump();
    let stale = Refusal::StaleTerm { offered: Term(1), known: Term(7) };
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::BadConfiguration(stale)));
    assert_eq!(pair.primary.session.state_name(), "Alone");
}

#[test]
fn row_z_a_backup_lost_while_attaching_costs_nothing() {
    let mut pair = attaching(|_| {});
    pair.primary.disconnect();
    assert_eq!((pair.primary.session.state_name(), &*pair.primary.take_rows()), ("Alone", "Z"));
    pair.primary.output(1);
    assert_eq!(pair.primary.transmitted(), [1]);
    pair.primary.step(SessionEvent::StateEnd { at: Ordinal(25), machine: vec![], disk_through: 0 });
    assert_eq!(pair.primary.session.state_name(), "Alone", "a state nobody waits for");
}

#[test]
fn row_aa_a_backup_that_leaves_while_attaching_costs_nothing() {
    let mut pair = attaching(|_| {});
    pair.backup.step(SessionEvent::HostStop);
    pair.pump();
    assert_eq!((pair.primary.session.state_name(), &*pair.primary.take_rows()), ("Alone", "AA"));
}

#[test]
fn row_ae_half_a_state_never_speaks() {
    let mut pair = attaching(|_| {});
    pair.backup.disconnect();
    assert_eq!(pair.backup.take_rows(), "AE");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Incomplete));
}

#[test]
fn row_af_a_primary_that_stops_takes_the_joining_backup_along() {
    let mut pair = attaching(|_| {});
    pair.primary.step(SessionEvent::HostStop);
    pair.pump();
    assert_eq!(pair.backup.take_rows(), "AF");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::HostRequest));
}

#[test]
fn row_ag_a_state_that_cannot_be_put_in_place_ends_the_joining_backup() {
    let mut pair = attaching(|_| {});
    pair.backup.step(SessionEvent::ReplayFault { description: "damaged".into() });
    assert_eq!(pair.backup.take_rows(), "AG");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Incomplete));
}

#[test]
fn a_backup_with_the_whole_state_takes_over() {
    let mut pair = attached(|_| {});
    pair.primary.output(3);
    pair.primary.log(30);
    pair.pump();
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    pair.backup.output(3);
    assert_eq!(pair.backup.transmitted(), [3], "and 1 and 2 had left");
}

#[test]
fn row_ah_a_detached_backup_leaves_and_the_guest_goes_on() {
    let mut pair = attached(|_| {});
    pair.primary.output(3);
    pair.primary.step(SessionEvent::Detach);
    assert_eq!(pair.primary.take_rows(), "AH");
    assert_eq!(pair.primary.transmitted(), [0u8; 0]);
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.transmitted(), [3]);
    pair.pump();
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::HostRequest));
}

#[test]
fn row_ak_roles_change_hands_without_a_state() {
    let mut pair = attached(|_| {});
    pair.primary.output(3);
    pair.primary.log(30);
    pair.primary.step(SessionEvent::DiskFlushed { id: 6 });
    pair.primary.step(SessionEvent::Yield { through: Ordinal(30) });
    pair.pump();
    assert_eq!(pair.backup.session.state_name(), "Following", "a frame is still held");
    pair.backup.output(3);
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [3]);
    assert_eq!(pair.backup.take_rows(), "AK");
    pair.backup.answer(2, true);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(30) });
    pair.pump();
    let state = |host: &Host| (host.session.role(), host.session.state_name(), host.session.term());
    assert_eq!(state(&pair.backup), (Role::Primary, "Protected", Some(Term(2))));
    assert_eq!(state(&pair.primary), (Role::Backup, "Following", Some(Term(2))));
    let follow = Action::Follow { term: Term(2), through: Ordinal(30) };
    assert!(pair.primary.done.contains(&follow));
    let mut swapped = Pair { primary: pair.backup, backup: pair.primary };
    swapped.backup.take_done();
    swapped.backup.step(SessionEvent::Strays(vec![vec![7], vec![8]]));
    swapped.pump();
    assert!(swapped.primary.done.contains(&Action::Receive(vec![vec![7], vec![8]])));
    swapped.primary.step(SessionEvent::DiskFlushed { id: 6 });
    swapped.primary.step(SessionEvent::DiskFlushed { id: 8 });
    let told = |through| Action::CompleteFlushes { through };
    assert!(swapped.primary.done.contains(&told(6)), "the old primary had it");
    assert!(!swapped.primary.done.contains(&told(8)));
    swapped.backup.step(SessionEvent::DiskFlushed { id: 8 });
    swapped.pump();
    assert!(swapped.primary.done.contains(&told(8)));
    swapped.output(4);
    assert_eq!(swapped.primary.transmitted(), [4]);
    swapped.backup.disconnect();
    swapped.backup.answer(3, true);
    assert_eq!(swapped.backup.session.state_name(), "Live", "and back again");
    assert_eq!(swapped.backup.transmitted(), [4], "what may not have left, and nothing older");
}

fn yielding() -> Pair {
    let mut pair = attached(|_| {});
    pair.primary.step(SessionEvent::Yield { through: Ordinal(25) });
    assert_eq!(pair.primary.session.state_name(), "Yielding");
    pair
}

/// The backup stands where the primary stands and claims the next term.
pub(super) fn asked_to_take_over() -> Pair {
    let mut pair = attached(|_| {});
    pair.primary.step(SessionEvent::Yield { through: Ordinal(24) });
    pair.pump();
    assert_eq!(pair.backup.take_rows(), "AK");
    pair
}

#[test]
fn what_only_the_new_speaker_has_produced_waits_to_be_compared() {
    let mut pair = asked_to_take_over();
    pair.backup.output(3);
    pair.backup.answer(2, true);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(24) });
    pair.pump();
    assert_eq!(pair.backup.transmitted(), [0u8; 0]);
    let mut swapped = Pair { primary: pair.backup, backup: pair.primary };
    swapped.primary.horizon(30);
    swapped.backup.output(3);
    swapped.pump();
    assert_eq!(swapped.primary.transmitted(), [3]);

    let mut pair = asked_to_take_over();
    pair.backup.output(3);
    pair.backup.answer(2, true);
    pair.backup.disconnect();
    assert_eq!(pair.backup.transmitted(), [0u8; 0]);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(24) });
    assert_eq!(pair.backup.transmitted(), [3], "nobody is left to compare it with");
}

#[test]
fn row_ai_a_backup_lost_while_roles_change_leaves_the_guest_here() {
    let mut pair = yielding();
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "AI");
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.session.state_name(), "Alone");
    let mut pair = yielding();
    pair.primary.disconnect();
    pair.primary.answer(2, false);
    assert_eq!(pair.primary.stop_reason(), Some(&StopReason::LostWitness { term: Term(2) }));
}

#[test]
fn row_aj_a_backup_that_leaves_while_roles_change_leaves_the_guest_here() {
    let mut pair = yielding();
    pair.backup.step(SessionEvent::HostStop);
    pair.pump();
    assert_eq!(pair.primary.take_rows(), "AJ");
}

#[test]
fn a_backup_that_does_not_answer_is_lost() {
    let mut pair = yielding();
    let wait_ns = config(Role::Primary).handshake_ns;
    // It says that it lives.
    for _ in 0..wait_ns / (100 * MS) {
        pair.primary.wait(100 * MS);
        let ack = Message::Ack {
            term: Term(1),
            received_through: Ordinal(24),
            executed_through: Ordinal(24),
        };
        pair.primary.step(SessionEvent::Received(ack));
    }
    pair.primary.wait(100 * MS);
    assert_eq!(pair.primary.take_rows(), "AI");
}

/// Primary and backup differ in output 3, which the primary holds.
pub(super) fn resyncing(believe: Role) -> Pair {
    let mut pair = attached(|config| {
        config.on_divergence = DivergencePolicy::Resync;
        config.believe = believe;
    });
    pair.primary.output(3);
    pair.primary.log(30);
    pair.pump();
    pair.backup.output_with(3, 7);
    pair.pump();
    pair
}

#[test]
fn row_ab_the_believed_primary_sends_its_state_and_then_the_frame() {
    let mut pair = resyncing(Role::Primary);
    assert_eq!(pair.primary.take_rows(), "AB");
    assert_eq!(pair.primary.session.state_name(), "Attaching");
    assert_eq!(pair.backup.session.state_name(), "Joining");
    assert!(pair.primary.incident().is_some() && pair.backup.incident().is_some());
    pair.primary.output(4);
    assert_eq!(pair.primary.transmitted(), [0u8; 0], "nothing leaves before the state is there");
    pair.primary.step(SessionEvent::StateEnd { at: Ordinal(45), machine: vec![], disk_through: 0 });
    assert_eq!(pair.primary.transmitted(), [0u8; 0]);
    pair.primary.wait(60 * MS);
    pair.pump();
    assert_eq!(pair.backup.session.state_name(), "Following", "a heartbeat takes nothing back");
    assert_eq!(pair.primary.transmitted(), [3, 4]);
    pair.primary.take_done();
    pair.primary.encoder = GroupEncoder::new();
    pair.output(5);
    assert_eq!(pair.primary.transmitted(), [5]);
}

#[test]
fn a_backup_that_has_the_state_has_the_frames_that_were_held() {
    let mut pair = resyncing(Role::Primary);
    pair.primary.step(SessionEvent::StateEnd { at: Ordinal(45), machine: vec![], disk_through: 0 });
    let sent = pair.primary.take_outbox();
    pair.backup.receive(sent);
    // The primary dies before it hears that the state is there.
    pair.backup.disconnect();
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.transmitted(), [3]);
}

#[test]
fn a_switch_right_after_an_attach_waits_for_the_backup() {
    let mut pair = attaching(|_| {});
    pair.primary.step(SessionEvent::StateEnd { at: Ordinal(25), machine: vec![], disk_through: 0 });
    pair.primary.step(SessionEvent::Yield { through: Ordinal(24) });
    pair.backup.step(SessionEvent::StateRestored { restored_bytes: 3 });
    pair.pump();
    pair.backup.answer(2, true);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(24) });
    pair.pump();
    assert_eq!(pair.primary.session.state_name(), "Following");
    assert_eq!(pair.backup.session.state_name(), "Protected");
}

#[test]
fn a_guest_that_ends_in_a_resync_is_not_cut_short() {
    let mut pair = resyncing(Role::Primary);
    pair.primary.step(SessionEvent::GuestEnded { state_digest: [1; 32] });
    assert_eq!(pair.primary.session.state_name(), "ClaimingTerm");
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.transmitted(), [3]);
    assert_eq!(pair.primary.stop_reason(), Some(&StopReason::Clean));
}

#[test]
fn row_ac_a_backup_lost_in_a_resync_may_have_taken_over() {
    let mut pair = resyncing(Role::Primary);
    pair.primary.take_rows();
    pair.primary.disconnect();
    assert_eq!(pair.primary.take_rows(), "AC");
    pair.primary.answer(2, true);
    assert_eq!(pair.primary.transmitted(), [3]);
}

#[test]
fn row_ad_a_backup_that_leaves_in_a_resync() {
    let mut pair = resyncing(Role::Primary);
    pair.primary.take_rows();
    pair.backup.step(SessionEvent::HostStop);
    pair.pump();
    assert_eq!(pair.primary.take_rows(), "AD");
}

#[test]
fn row_al_and_row_am_the_believed_backup_speaks_and_sends_its_state() {
    let mut pair = resyncing(Role::Backup);
    assert_eq!(pair.primary.take_rows(), "AL");
    assert_eq!(pair.backup.take_rows(), "AM");
    pair.backup.answer(2, true);
    assert_eq!(pair.backup.transmitted(), [3], "its frame, not the primary's");
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(30) });
    pair.pump();
    assert_eq!(pair.primary.transmitted(), [0u8; 0]);
    assert_eq!(pair.primary.session.state_name(), "Joining");
    pair.backup.step(SessionEvent::StateEnd { at: Ordinal(31), machine: vec![], disk_through: 0 });
    pair.pump();
    let mut swapped = Pair { primary: pair.backup, backup: pair.primary };
    swapped.primary.take_done();
    swapped.output(4);
    assert_eq!(swapped.primary.transmitted(), [4]);
}

#[test]
fn row_an_and_row_ao_a_guest_starts_alone_when_the_witness_says_so() {
    let mut host = Host::new(config(Role::Primary));
    host.step(SessionEvent::StartAlone);
    host.answer(1, true);
    assert_eq!(host.take_rows(), "AN");
    assert!(host.done.iter().any(|action| matches!(action, Action::Begin { .. })));
    let mut host = Host::new(config(Role::Primary));
    host.step(SessionEvent::StartAlone);
    host.answer(1, false);
    assert_eq!(host.take_rows(), "AO");
    assert_eq!(host.stop_reason(), Some(&StopReason::LostWitness { term: Term(1) }));
}

#[test]
fn row_ap_a_joining_backup_that_is_told_to_stand_down_stops() {
    let mut pair = attaching(|_| {});
    pair.backup.step(SessionEvent::Received(Message::StandDown { term: Term(1) }));
    assert_eq!(pair.backup.take_rows(), "AP");
    assert_eq!(pair.backup.stop_reason(), Some(&StopReason::Divergence));
}
