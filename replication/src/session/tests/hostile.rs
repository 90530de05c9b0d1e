//! A peer that says anything at any time: no panic, nothing leaves that must not, and the guest
//! goes on or stops by name.

use proptest::prelude::*;

use super::attach::{asked_to_take_over, attached, attaching, resyncing, state_end};
use super::numbers::{arrives, bare_group};
use super::*;
use crate::incident::{DivergenceCause, Evidence};
use crate::message::Frames;
use crate::record::COUNTER_MAX;
use crate::state::StatePart;

/// The exit through which the log was sent, and the outputs so far.
const EXIT: u64 = 30;
const OUTPUTS: u64 = 3;

/// A number that a hostile peer tries where `right` would be one that it could have.
fn number(pick: u8, right: u64) -> u64 {
    match pick % 10 {
        0 => 0,
        1 => 1,
        2 => right.saturating_sub(1),
        3 | 4 => right,
        5 => right + 1,
        6 => right + 1000,
        7 => COUNTER_MAX,
        8 => u64::MAX - 1,
        _ => u64::MAX,
    }
}

fn evidence(a: u8, b: u8) -> Evidence {
    let (output, at) = (OutputOrdinal(number(b, OUTPUTS)), Ordinal(number(a, EXIT)));
    let digest = OutputDigest([a; 16]);
    Evidence {
        output: (a.is_multiple_of(2)).then(|| crate::OutputEvidence {
            output,
            at,
            digest,
            frame: vec![b],
        }),
        produced_through: OutputOrdinal(number(b, OUTPUTS)),
        executed_through: at,
        state_digest: (b.is_multiple_of(2)).then_some([b; 32]),
        fault: (b.is_multiple_of(3)).then(|| "fault".into()),
        last_records: vec!["line".into(); usize::from(a % 3)],
    }
}

/// The digest of what [`Host::output`] transmits.
fn right_digest(output: u64) -> OutputDigest {
    OutputDigest::of(Ordinal(output.wrapping_mul(10)), 0, &[output as u8])
}

/// A message of kind `kind`, in the term `term` or another.
fn message(kind: u8, own_term: u64, [t, a, b, c]: [u8; 4]) -> Message {
    let term = Term(if t < 200 { own_term } else { number(t, own_term) });
    let (at, output) = (Ordinal(number(a, EXIT)), OutputOrdinal(number(b, OUTPUTS)));
    let (release, on_divergence) = (ReleasePolicy::Compare, DivergencePolicy::Resync);
    match kind % 24 {
        0 => Message::Hello {
            role: if a.is_multiple_of(4) { Role::Primary } else { Role::Backup },
            build: build_id::tests::example(),
            fingerprint: example(),
            highest_term: Term(number(b, own_term)),
            runs: c.is_multiple_of(2),
        },
        1 => Message::Welcome { term, rtc_epoch_s: number(c, 5), release, on_divergence },
        2 => Message::Refuse { refusal: Refusal::SameRole { role: Role::Backup } },
        3 => Message::Ready { term },
        4 => {
            let group = bare_group(number(a, EXIT)).into();
            Message::Log { term, released_through: output, group }
        }
        5 => Message::Heartbeat { term, released_through: output },
        6 => {
            Message::Ack { term, received_through: at, executed_through: Ordinal(number(c, EXIT)) }
        }
        7 => {
            let is_right = c % 4 > 0;
            let digest =
                if is_right { right_digest(output.0 % 100) } else { OutputDigest([c; 16]) };
            let at = if is_right { Ordinal(output.0.wrapping_mul(10)) } else { at };
            Message::Digest { term, output, at, digest }
        }
        8 => Message::Fault { term, evidence: evidence(a, b) },
        9 => {
            let cause = DivergenceCause::Output { output };
            Message::Challenge { term, cause, evidence: evidence(a, b) }
        }
        10 => Message::Evidence { term, evidence: evidence(a, b) },
        11 => Message::StandDown { term },
        12 => Message::Finished { term, state_digest: [c; 32] },
        13 => {
            let reason =
                if c.is_multiple_of(2) { ByeReason::Ended } else { ByeReason::HostRequest };
            Message::Bye { term, reason }
        }
        14 => Message::Attach { term, release, on_divergence, believe: Role::Backup },
        15 => {
            let part = match c % 3 {
                0 => StatePart::Outline { total_bytes: number(a, 9) },
                1 => StatePart::Pages(vec![c; usize::from(c)]),
                _ => StatePart::Machine(vec![c]),
            };
            Message::State { term, part }
        }
        16 => Message::StateEnd { term, outputs_through: output, at, machine: vec![c] },
        17 => Message::StateRestored { term, restored_bytes: number(c, 3) },
        18 => Message::Yield {
            term,
            through: at,
            released_through: output,
            follows: c.is_multiple_of(2),
        },
        19 => Message::Promoted { term: Term(number(t, own_term + 1)) },
        20 => Message::DiskFlushed { term, id: number(c, 7) },
        21 => Message::Strays { term, frames: Frames(vec![vec![c]; usize::from(a)]) },
        22 => Message::Held { term, at, digest: OutputDigest([c; 16]), frame: vec![b] },
        _ => Message::ClientLink { up: c.is_multiple_of(2) },
    }
}

fn claiming_first() -> Pair {
    let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
    pair.connect();
    pair.pump();
    pair
}

/// A pair that has sent the log through exit 30; frame 3 is held.
fn protected(ack: bool) -> Pair {
    let mut pair = attached(|config| {
        config.release = if ack { ReleasePolicy::Ack } else { ReleasePolicy::Compare };
    });
    pair.primary.output(3);
    pair.primary.horizon(29);
    pair.pump();
    pair.primary.horizon(EXIT);
    pair
}

/// Every phase of a primary, by number, and whether its guest runs in it.
fn primary_in(phase: u8, ack: bool) -> (Host, bool) {
    let mut pair = match phase {
        0 => {
            let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
            pair.primary.step(SessionEvent::Connected);
            pair
        }
        1 => claiming_first(),
        2 => {
            let mut pair = claiming_first();
            pair.primary.answer(1, true);
            pair
        }
        3 => protected(ack),
        4 => {
            let mut pair = protected(ack);
            pair.backup.output_with(3, 7);
            let differs = pair.backup.take_outbox();
            pair.primary.receive(differs);
            pair
        }
        5 => {
            let mut pair = protected(ack);
            pair.backup.output_with(3, 7);
            pair.pump();
            pair
        }
        6 => {
            let mut pair = protected(ack);
            pair.primary.disconnect();
            pair.primary.answer(2, true);
            pair.primary.step(SessionEvent::Connected);
            pair
        }
        7 => attaching(|_| {}),
        8 => resyncing(Role::Primary),
        9 => {
            let mut pair = protected(ack);
            pair.primary.step(SessionEvent::Yield { through: Ordinal(EXIT) });
            pair
        }
        10 => {
            let mut pair = attached(|_| {});
            pair.primary.step(SessionEvent::Yield { through: Ordinal(24) });
            pair
        }
        11 => {
            let mut pair = resyncing(Role::Primary);
            pair.primary.step(state_end(45));
            pair
        }
        _ => {
            let mut pair = claiming_first();
            pair.primary.answer(1, true);
            pair.pump();
            pair
        }
    };
    pair.primary.take_done();
    pair.primary.take_outbox();
    (pair.primary, (3..12).contains(&phase))
}
const PRIMARY_PHASES: u8 = 13;

/// Every phase of a backup, by number.
fn backup_in(phase: u8) -> Host {
    let mut pair = match phase {
        0 => {
            let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
            pair.backup.step(SessionEvent::Connected);
            pair
        }
        1 => claiming_first(),
        2 => attaching(|_| {}),
        3 => protected(false),
        4 => {
            let mut pair = protected(false);
            pair.backup.step(SessionEvent::ReplayFault { description: "RIP".into() });
            pair
        }
        5 => asked_to_take_over(),
        6 => {
            let mut pair = asked_to_take_over();
            pair.backup.answer(2, true);
            pair
        }
        _ => {
            let mut pair = protected(false);
            pair.backup.disconnect();
            pair.backup.answer(2, true);
            pair.backup.step(SessionEvent::Connected);
            pair
        }
    };
    pair.backup.take_done();
    pair.backup.take_outbox();
    pair.backup
}
const BACKUP_PHASES: u8 = 8;

/// What the host itself does between two messages.
fn own_event(host: &mut Host, pick: u8, number: &mut u8) {
    match pick % 8 {
        0 => {
            *number += 1;
            host.output(*number);
        }
        1 => host.wait(u64::from(pick) * MS),
        2 => host.step(SessionEvent::Executed(Ordinal(EXIT))),
        _ => {}
    }
}

/// The claim that a host waits for is granted.
fn grant(host: &mut Host) {
    if let ("ClaimingTerm", Some(Term(term))) = (host.session.state_name(), host.session.term()) {
        host.answer(term + 1, true);
    }
}

fn says() -> impl Strategy<Value = Vec<(u8, [u8; 4], u8)>> {
    prop::collection::vec((any::<u8>(), any::<[u8; 4]>(), any::<u8>()), 1..16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Under `compare` a frame leaves when its digest came, under `ack` when the log through its
    /// exit was acknowledged as far as it was sent; whatever else comes, the guest goes on.
    #[test]
    fn a_hostile_backup_releases_nothing_and_does_not_end_the_guest(
        phase in 0..PRIMARY_PHASES,
        ack in any::<bool>(),
        says in says(),
    ) {
        let (mut host, runs) = primary_in(phase, ack);
        let holds = matches!(phase, 3..=5 | 8..=11);
        let (mut output, mut earned) = (4, 0);
        for (kind, picks, own) in says {
            let own_term = host.session.term().unwrap_or_default().0;
            let said = message(kind, own_term, picks);
            earned += match &said {
                Message::Digest { output, digest, .. } if *digest == right_digest(output.0) => 1,
                Message::Ack { received_through, .. } if received_through.0 <= EXIT && ack => 100,
                // The state is there, and the frame that was held with it leaves.
                Message::Ready { .. } if phase == 11 => 100,
                _ => 0,
            };
            host.step(arrives(&said));
            if host.session.role() == Role::Backup {
                // It was asked to take over and said that it did.
                prop_assert!(matches!(phase, 9 | 10), "phase {phase}");
                return Ok(());
            }
            own_event(&mut host, own, &mut output);
            if holds {
                let left = host.transmitted();
                prop_assert!(left.len() <= earned, "{left:?} left in phase {phase}");
            }
            if host.session.is_stopped() {
                prop_assert!(!runs, "{:?} ends the guest in phase {phase}", host.stop_reason());
                return Ok(());
            }
        }
        if !runs {
            return Ok(());
        }
        host.disconnect();
        grant(&mut host);
        prop_assert_eq!(host.session.state_name(), "Alone");
        host.output(99);
        prop_assert_eq!(host.transmitted().last().copied(), Some(99), "the guest goes on");
    }

    /// A backup sends nothing before it has won a term; it follows, takes over or says why it
    /// stops.
    #[test]
    fn a_hostile_primary_makes_a_backup_say_nothing(
        phase in 0..BACKUP_PHASES,
        says in says(),
    ) {
        let mut host = backup_in(phase);
        let (is_live, mut output) = (phase >= 6, 4);
        for (kind, picks, own) in says {
            let own_term = host.session.term().unwrap_or_default().0;
            host.step(arrives(&message(kind, own_term, picks)));
            own_event(&mut host, own, &mut output);
            prop_assert!(is_live || host.transmitted().is_empty(), "{:?}", host.transmitted());
            if host.session.is_stopped() {
                prop_assert!(host.stop_reason().is_some());
                return Ok(());
            }
        }
        host.disconnect();
        grant(&mut host);
        host.step(SessionEvent::TookOver { through: Ordinal(EXIT) });
        let state = host.session.state_name();
        let is_alone = host.session.role() == Role::Primary && state == "Alone";
        let waits = state == "AwaitingWelcome";
        prop_assert!(is_alone || waits || host.stop_reason().is_some(), "{state}");
    }
}
