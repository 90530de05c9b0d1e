//! Tests of one host of a pair: events in, effects out. What two of them do together the simulator
//! shows.

use super::*;
use crate::build_id::tests::example as build;
use crate::fingerprint::tests::example as fingerprint;
use crate::message::Message;
use crate::policy::{DivergencePolicy, Limits, SessionConfig};
use crate::record::Term;
use crate::wire::Decoder;
use ftvmm_devices::Input;

const MS: u64 = 1_000_000;
const HORIZON_NS: u64 = 200_000;

pub(super) fn core(role: Role) -> PeerCore {
    let limits = Limits { log_bytes_max: 100_000, ..Limits::default() };
    core_under(role, limits, DivergencePolicy::default())
}

fn core_under(role: Role, limits: Limits, on_divergence: DivergencePolicy) -> PeerCore {
    let config = SessionConfig::new(role, build(), fingerprint(), Term(0), 1_700_000_000);
    let config = SessionConfig { limits, on_divergence, ..config };
    PeerCore::new(config, HORIZON_NS, true).unwrap()
}

/// The messages in the effects, and the effects without their bytes.
fn messages(effects: &[Effect]) -> Vec<Message> {
    let mut decoder = Decoder::new();
    let connects = effects
        .iter()
        .any(|effect| matches!(effect, Effect::Send(bytes) if bytes.starts_with(&wire::PREAMBLE)));
    if !connects {
        decoder.push(&wire::PREAMBLE);
    }
    effects.iter().for_each(|effect| {
        if let Effect::Send(bytes) = effect {
            decoder.push(bytes);
        }
    });
    core::iter::from_fn(|| decoder.next_message().unwrap()).collect()
}

fn bytes(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| wire::encode(message, &mut bytes));
    bytes
}

/// What a host says first that is to be this, before any guest runs.
fn hello(role: Role) -> Message {
    let (build, fingerprint) = (build(), fingerprint());
    Message::Hello { role, build, fingerprint, highest_term: Term(0), runs: false }
}

/// A primary whose guest runs, followed by a backup.
fn protected() -> PeerCore {
    make_protected(core(Role::Primary))
}

fn protected_under(limits: Limits, on_divergence: DivergencePolicy) -> PeerCore {
    make_protected(core_under(Role::Primary, limits, on_divergence))
}

fn make_protected(mut core: PeerCore) -> PeerCore {
    core.connect(MS);
    core.receive(MS, &wire::PREAMBLE);
    core.receive(MS, &bytes(&[hello(Role::Backup)]));
    core.step(MS, SessionEvent::TermClaimed { term: Term(1), granted: true });
    core.receive(MS, &bytes(&[Message::Ready { term: Term(1) }]));
    assert_eq!(core.begin(), None, "the witness does not know yet");
    core.step(MS, SessionEvent::TermClaimed { term: Term(1), granted: true });
    assert!(core.session().is_protected() && core.begin().is_some());
    let _ = core.take_effects();
    core
}

/// A backup that follows.
fn following() -> PeerCore {
    let mut core = core(Role::Backup);
    core.connect(MS);
    core.receive(MS, &wire::PREAMBLE);
    let welcome = Message::Welcome {
        term: Term(1),
        rtc_epoch_s: 7,
        release: ReleasePolicy::Ack,
        on_divergence: DivergencePolicy::Failover,
    };
    core.receive(MS, &bytes(&[hello(Role::Primary), welcome]));
    assert_eq!(core.begin(), Some(Begin { rtc_epoch_s: 7, release: ReleasePolicy::Ack }));
    let _ = core.take_effects();
    core
}

pub(super) fn time(at: u64) -> Record {
    Record { at: Ordinal(at), event: Event::Input(Input::Time { now_ns: at }) }
}

#[test]
fn messages_that_leave_together_are_one_effect() {
    let mut core = core(Role::Primary);
    core.connect(0);
    let effects = core.take_effects();
    assert!(matches!(&effects[..], [Effect::Send(bytes)] if bytes.starts_with(&wire::PREAMBLE)));
    assert!(matches!(&messages(&effects)[..], [Message::Hello { .. }]));
}

#[test]
fn exits_of_a_followed_guest_go_out_by_their_pace() {
    let mut core = protected();
    core.append(2 * MS, &time(1));
    core.exit_complete(2 * MS, Ordinal(1));
    assert_eq!(core.take_effects(), [Effect::LookAtLogIn { ns: 2 * MS }]);
    core.exit_complete(2 * MS + HORIZON_NS, Ordinal(2));
    let effects = core.take_effects();
    assert!(matches!(&messages(&effects)[..], [Message::Log { .. }]));
    assert_eq!(effects.last(), Some(&Effect::LogSent));
    assert!(core.counters().log_bytes > 0);
}

#[test]
fn the_guest_of_a_congested_primary_waits_with_nothing_unsent() {
    let mut core = protected();
    // Far more than the window holds, of a backup that says nothing.
    for at in 1.. {
        core.append(
            2 * MS,
            &Record {
                at: Ordinal(at),
                event: Event::Input(Input::Entropy { bytes: vec![at as u8; 256] }),
            },
        );
        core.exit_complete(2 * MS, Ordinal(at));
        if core.is_congested() {
            break;
        }
        assert!(at < 10_000, "the guest is never held");
    }
    assert!(!core.log().has_records());
    core.disconnect(3 * MS, DisconnectReason::Closed);
    core.step(3 * MS, SessionEvent::TermClaimed { term: Term(2), granted: true });
    assert!(!core.is_congested() && core.is_unrecorded(), "alone it is free");
}

#[test]
fn a_congested_guest_stays_held_while_its_state_replaces_the_backups() {
    let limits = Limits { gated_frames_max: 2, ..Limits::default() };
    let mut core = protected_under(limits, DivergencePolicy::Resync);
    for at in 1..=3 {
        let digest = crate::OutputDigest::of(Ordinal(at), 0, &[1]);
        core.step(2 * MS, SessionEvent::Output { at: Ordinal(at), digest, frame: vec![1] });
    }
    assert!(core.is_congested());
    let fault = Message::Fault { term: Term(1), evidence: crate::Evidence::default() };
    core.receive(3 * MS, &bytes(&[fault]));
    assert!(core.session().is_attaching() && core.is_congested());
}

#[test]
fn what_a_damaged_group_leads_to_comes_after_what_was_decided_before() {
    let mut core = following();
    let mut encoder = crate::GroupEncoder::new();
    encoder.push(&time(9));
    let good = encoder.finish(Ordinal(9));
    let mut encoder = crate::GroupEncoder::new();
    encoder.push(&time(4));
    let late = encoder.finish(Ordinal(10));
    let log = |group: Vec<u8>| Message::Log {
        term: Term(1),
        released_through: crate::OutputOrdinal(0),
        group: group.into(),
    };
    core.receive(2 * MS, &bytes(&[log(good)]));
    let _ = core.take_effects();
    core.receive(2 * MS, &bytes(&[log(late)]));
    // The acknowledgement was decided together with the delivery, the fault follows from it.
    let sent = messages(&core.take_effects());
    let names: Vec<_> = sent.iter().map(Message::name).collect();
    assert_eq!(names, ["Ack", "Fault"]);
}

#[test]
fn a_host_that_cannot_put_a_whole_state_in_place_leaves_and_is_not_compared() {
    let mut core = core(Role::Backup);
    core.connect(MS);
    core.receive(MS, &wire::PREAMBLE);
    let (role, fingerprint, highest_term) = (Role::Primary, fingerprint(), Term(1));
    let hello = Message::Hello { role, build: build(), fingerprint, highest_term, runs: true };
    let (term, release) = (Term(1), ReleasePolicy::Ack);
    let (on_divergence, believe) = (DivergencePolicy::Resync, Role::Backup);
    let attach = Message::Attach { term, release, on_divergence, believe };
    let (outputs_through, at) = (crate::OutputOrdinal(0), Ordinal(5));
    let end = Message::StateEnd { term, outputs_through, at, machine: vec![] };
    core.receive(MS, &bytes(&[hello, attach, end]));
    assert!(core.session().is_protected() && core.is_joining());
    let _ = core.take_effects();
    core.fault(2 * MS, "the disk cannot be copied".into());
    assert!(matches!(core.stop(), Some(StopReason::StateUnusable { .. })));
    let effects = core.take_effects();
    assert!(effects.contains(&Effect::HangUp) && messages(&effects).is_empty());
}

#[test]
fn a_connection_that_is_over_says_nothing_more() {
    let mut core = following();
    core.disconnect(2 * MS, DisconnectReason::Closed);
    let effects = core.take_effects();
    assert_eq!(effects[0], Effect::HangUp);
    assert!(effects.contains(&Effect::ClaimTerm(Term(2))));
    core.receive(
        2 * MS,
        &bytes(&[Message::Heartbeat { term: Term(9), released_through: crate::OutputOrdinal(0) }]),
    );
    core.disconnect(2 * MS, DisconnectReason::Closed);
    assert!(!core.has_effects());
}

#[test]
fn a_backup_that_takes_over_counts_it_once_and_says_where_the_guest_is() {
    let mut core = following();
    core.disconnect(2 * MS, DisconnectReason::Closed);
    core.step(3 * MS, SessionEvent::TermClaimed { term: Term(2), granted: true });
    let effects = core.take_effects();
    let at = |wanted: &Effect| effects.iter().position(|effect| effect == wanted);
    assert!(at(&Effect::OpenInputs) < at(&Effect::Announce));
    assert!(at(&Effect::InterruptGuest).is_some());
    assert_eq!(core.counters().takeovers, 1);
    core.took_over(5 * MS, Ordinal(0));
    assert_eq!(core.counters().takeover_ns, Some(3 * MS));
    assert!(!core.follows() && !core.records_log());
}

#[test]
fn a_guest_that_left_the_logs_path_consumes_nothing_of_it_when_it_goes_live() {
    let mut core = following();
    let mut encoder = crate::GroupEncoder::new();
    encoder.push(&time(3));
    let group = crate::decode_group(&encoder.finish(Ordinal(3))).unwrap();
    core.follower().push_group(group).unwrap();
    core.follower().fault();
    core.follower().go_live();
    assert!(core.follower().cursor().is_used_up(Ordinal(1)));
}

#[test]
fn strays_go_in_messages_of_a_bounded_number() {
    let mut core = following();
    core.strays(2 * MS, vec![vec![0; 60]; STRAYS_MAX + 1]);
    // A follower that was never live hands nothing on.
    assert!(messages(&core.take_effects()).len() <= 2);
    assert!(!core.takes_strays(2 * MS));
}

#[test]
fn an_announcement_is_taken_back_when_the_lease_ends_before_it_is_made() {
    for (late_ns, is_made) in [(0, true), (200 * MS, false)] {
        let mut core = protected();
        core.tick(2 * MS);
        assert!(!core.has_effects(), "nobody has granted a lease");
        let grant = Message::LeaseGrant { term: Term(1), number: 1, lease_ns: u64::MAX };
        core.receive(2 * MS, &bytes(&[grant]));
        core.tick(3 * MS);
        assert!(core.has_release());
        core.release(3 * MS + late_ns);
        assert_eq!(core.take_effects().contains(&Effect::Announce), is_made);
        assert!(!core.has_effects());
    }
}

#[test]
fn a_guest_that_is_heard_elsewhere_is_announced_by_the_host_that_has_it() {
    let mut follower = following();
    follower.guest_is_elsewhere(2 * MS);
    follower.tick(3 * MS);
    assert!(!follower.take_effects().contains(&Effect::Announce));
    follower.disconnect(4 * MS, DisconnectReason::Closed);
    follower.step(5 * MS, SessionEvent::TermClaimed { term: Term(2), granted: true });
    // Until the rounds are over.
    (5..30_000).for_each(|ms| follower.tick(ms * MS));
    let _ = follower.take_effects();
    follower.guest_is_elsewhere(30_000 * MS);
    follower.tick(30_001 * MS);
    assert!(follower.take_effects().contains(&Effect::Announce));
}
