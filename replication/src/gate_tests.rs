//! The gate's release rules, in both orders of arrival.

use proptest::prelude::*;

use super::*;

fn digest(number: u64) -> OutputDigest {
    OutputDigest::of(Ordinal(number), 0, b"")
}

/// Output `number` is produced at exit `number * 10` and its frame is its number.
fn push(gate: &mut OutputGate, number: u64) -> Compared {
    gate.push(Ordinal(number * 10), digest(number), vec![number as u8])
}

fn report(gate: &mut OutputGate, number: u64) -> Compared {
    gate.on_digest(OutputOrdinal(number), Ordinal(number * 10), digest(number))
}

fn released(gate: &mut OutputGate) -> Vec<u8> {
    let mut frames = Vec::new();
    gate.release(|frame| frames.extend(frame));
    gate.invariants();
    frames
}

#[test]
fn compare_releases_at_the_equal_digest_and_not_before() {
    let mut gate = OutputGate::new(ReleasePolicy::Compare);
    push(&mut gate, 1);
    push(&mut gate, 2);
    gate.on_ack(Ordinal(1000));
    assert_eq!(released(&mut gate), []);
    assert_eq!(report(&mut gate, 1), Compared::Agreed);
    assert_eq!(released(&mut gate), [1]);
    assert_eq!(report(&mut gate, 2), Compared::Agreed);
    assert_eq!(released(&mut gate), [2]);
    assert_eq!((gate.held_frames(), gate.held_bytes()), (0, 0));
}

#[test]
fn a_digest_may_come_before_the_own_output() {
    let mut gate = OutputGate::new(ReleasePolicy::Compare);
    assert_eq!(report(&mut gate, 1), Compared::Agreed);
    assert_eq!(report(&mut gate, 2), Compared::Agreed);
    assert_eq!(released(&mut gate), []);
    assert_eq!(gate.first_unmatched(), Some(OutputOrdinal(1)));
    assert_eq!(push(&mut gate, 1), Compared::Agreed);
    assert_eq!(push(&mut gate, 2), Compared::Agreed);
    assert_eq!(released(&mut gate), [1, 2]);
    assert_eq!(gate.first_unmatched(), None);
}

#[test]
fn a_difference_is_told_in_both_orders_and_nothing_leaves() {
    for early in [false, true] {
        let mut gate = OutputGate::new(ReleasePolicy::Compare);
        let other = (OutputOrdinal(1), Ordinal(10), digest(99));
        let compared = if early {
            assert_eq!(gate.on_digest(other.0, other.1, other.2), Compared::Agreed);
            push(&mut gate, 1)
        } else {
            push(&mut gate, 1);
            gate.on_digest(other.0, other.1, other.2)
        };
        assert_eq!(compared, Compared::Differ(OutputOrdinal(1)));
        assert_eq!(released(&mut gate), []);
        assert_eq!(gate.evidence(OutputOrdinal(1)).unwrap().frame, [1]);
    }
}

#[test]
fn digests_after_a_difference_are_forgotten() {
    let mut gate = OutputGate::new(ReleasePolicy::Compare);
    assert_eq!(gate.on_digest(OutputOrdinal(1), Ordinal(10), digest(99)), Compared::Agreed);
    assert_eq!(report(&mut gate, 2), Compared::Agreed);
    assert_eq!(push(&mut gate, 1), Compared::Differ(OutputOrdinal(1)));
    gate.invariants();
    assert_eq!(push(&mut gate, 2), Compared::Agreed);
    assert_eq!(released(&mut gate), []);
}

#[test]
fn an_equal_frame_at_another_exit_is_a_difference() {
    let mut gate = OutputGate::new(ReleasePolicy::Compare);
    push(&mut gate, 1);
    let compared = gate.on_digest(OutputOrdinal(1), Ordinal(11), digest(1));
    assert_eq!(compared, Compared::Differ(OutputOrdinal(1)));
}

#[test]
fn ack_releases_when_the_log_covers_the_exit() {
    let mut gate = OutputGate::new(ReleasePolicy::Ack);
    push(&mut gate, 1);
    push(&mut gate, 2);
    gate.on_ack(Ordinal(9));
    assert_eq!(released(&mut gate), []);
    gate.on_ack(Ordinal(10));
    assert_eq!(released(&mut gate), [1]);
    gate.on_ack(Ordinal(5));
    assert_eq!(released(&mut gate), []);
    // The frame stays for the comparison that comes later.
    assert_eq!(gate.evidence(OutputOrdinal(1)).unwrap().frame, [1]);
    assert_eq!(report(&mut gate, 1), Compared::Agreed);
    assert_eq!(released(&mut gate), []);
    assert_eq!(gate.evidence(OutputOrdinal(1)), None);
    assert_eq!(gate.held_bytes(), 1);
}

#[test]
fn digests_that_skip_or_repeat_are_out_of_order() {
    let mut gate = OutputGate::new(ReleasePolicy::Compare);
    assert_eq!(report(&mut gate, 2), Compared::OutOfOrder);
    assert_eq!(report(&mut gate, 1), Compared::Agreed);
    assert_eq!(report(&mut gate, 1), Compared::OutOfOrder);
    for number in 2..=EARLY_DIGESTS_MAX as u64 {
        assert_eq!(report(&mut gate, number), Compared::Agreed);
    }
    assert_eq!(report(&mut gate, EARLY_DIGESTS_MAX as u64 + 1), Compared::OutOfOrder);
}

#[test]
fn an_open_gate_holds_nothing() {
    let mut gate = OutputGate::new(ReleasePolicy::Compare);
    push(&mut gate, 1);
    push(&mut gate, 2);
    report(&mut gate, 1);
    gate.open();
    assert_eq!(released(&mut gate), [1, 2]);
    push(&mut gate, 3);
    assert_eq!(released(&mut gate), [3]);
    assert_eq!((gate.held_frames(), gate.held_bytes()), (0, 0));
}

fn keep(outputs: &mut RetainedOutputs, number: u64) {
    assert_eq!(
        outputs.push(Ordinal(number), digest(number), vec![number as u8]),
        OutputOrdinal(number)
    );
}

fn drained(outputs: &mut RetainedOutputs) -> Vec<u8> {
    let mut frames = Vec::new();
    outputs.drain(|frame| frames.extend(frame));
    outputs.invariants();
    frames
}

#[test]
fn the_backup_sends_what_may_not_have_left_and_only_once_live() {
    let mut outputs = RetainedOutputs::default();
    (1..=20).for_each(|number| keep(&mut outputs, number));
    outputs.on_released(OutputOrdinal(17));
    assert_eq!(drained(&mut outputs), []);
    outputs.go_live();
    assert_eq!(drained(&mut outputs), [18, 19, 20]);
    keep(&mut outputs, 21);
    assert_eq!(drained(&mut outputs), [21]);
}

#[test]
fn a_backup_behind_the_releases_drops_what_has_left() {
    let mut outputs = RetainedOutputs::default();
    keep(&mut outputs, 1);
    outputs.on_released(OutputOrdinal(3));
    outputs.go_live();
    assert_eq!(drained(&mut outputs), []);
    (2..=4).for_each(|number| keep(&mut outputs, number));
    assert_eq!(drained(&mut outputs), [4]);
}

#[test]
fn what_a_backup_hands_over_ends_where_its_outputs_end() {
    let mut outputs = RetainedOutputs::default();
    (1..=3).for_each(|number| keep(&mut outputs, number));
    outputs.on_released(OutputOrdinal(2));
    let (through, unreleased) = outputs.into_unreleased();
    assert_eq!((through, unreleased.len()), (OutputOrdinal(2), 1));
    let mut outputs = RetainedOutputs::default();
    (1..=3).for_each(|number| keep(&mut outputs, number));
    outputs.on_released(OutputOrdinal(9));
    let (through, unreleased) = outputs.into_unreleased();
    assert_eq!((through, unreleased.len()), (OutputOrdinal(3), 0), "the numbers go on from there");
}

#[test]
fn released_outputs_stay_a_while_for_an_incident() {
    let mut outputs = RetainedOutputs::default();
    (1..=20).for_each(|number| keep(&mut outputs, number));
    outputs.on_released(OutputOrdinal(20));
    assert_eq!(outputs.evidence(OutputOrdinal(12)), None);
    assert_eq!(outputs.evidence(OutputOrdinal(13)).unwrap().frame, [13]);
    outputs.on_released(OutputOrdinal(19));
    assert_eq!(outputs.released_through(), OutputOrdinal(20), "a release cannot be taken back");
}

proptest! {
    /// Whatever the order of outputs, digests and acknowledgements: frames leave in order, each
    /// once, and none before its rule holds.
    #[test]
    fn frames_leave_in_order_and_never_early(
        ack in any::<bool>(),
        moves in prop::collection::vec(0..3u8, 0..200),
    ) {
        let policy = if ack { ReleasePolicy::Ack } else { ReleasePolicy::Compare };
        let mut gate = OutputGate::new(policy);
        let (mut produced, mut reported, mut acked, mut left) = (0u64, 0u64, 0u64, 0u64);
        for step in moves {
            match step {
                0 => {
                    produced += 1;
                    prop_assert_eq!(push(&mut gate, produced), Compared::Agreed);
                }
                1 => {
                    reported += 1;
                    prop_assert_eq!(report(&mut gate, reported), Compared::Agreed);
                }
                _ => {
                    acked += 7;
                    gate.on_ack(Ordinal(acked));
                }
            }
            for frame in released(&mut gate) {
                left += 1;
                prop_assert_eq!(frame, left as u8);
            }
            let may = if ack { acked / 10 } else { reported };
            prop_assert_eq!(left, may.min(produced));
        }
    }
}
