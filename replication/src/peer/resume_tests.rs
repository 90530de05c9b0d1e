//! Connections that break and are made again.

use super::proof_tests::Two;
use super::tests::time;
use super::*;
use crate::digest::OutputDigest;
use crate::group::GroupEncoder;
use crate::message::Message;
use crate::record::{OutputOrdinal, Term};
use crate::wire::{Decoder, WireError};
use crate::witness::Nonce;

fn reset() -> DisconnectReason {
    DisconnectReason::Transport { description: "connection reset".into() }
}

/// A pair whose guest runs. What is sent from now on is lost.
fn cut() -> Two {
    let mut two = Two::new([0, 0]);
    two.connect();
    assert!(two.sides.iter().all(|side| side.core.session().is_protected()));
    two.is_cut = true;
    two
}

impl Two {
    fn breaks(&mut self) {
        let now_ns = self.now_ns;
        self.sides.iter_mut().for_each(|side| side.core.disconnect(now_ns, reset()));
        self.settle();
        self.is_cut = false;
    }

    /// The primary's guest leaves exit `at` after an input, and sends a frame.
    fn output(&mut self, at: u64) {
        let (now_ns, core) = (self.now_ns, &mut self.sides[0].core);
        core.append(now_ns, &time(at));
        core.exit_complete(now_ns, Ordinal(at));
        core.flush_log(now_ns);
        let frame = vec![at as u8; 60];
        let (at, digest) = (Ordinal(at), OutputDigest::of(Ordinal(at), 0, &frame));
        core.step(now_ns, SessionEvent::Output { at, digest, frame });
    }

    /// The backup's guest does the same.
    fn follow(&mut self, at: u64) {
        let frame = vec![at as u8; 60];
        let (at, digest) = (Ordinal(at), OutputDigest::of(Ordinal(at), 0, &frame));
        let event = SessionEvent::Output { at, digest, frame };
        self.sides[1].core.step(self.now_ns, event);
        self.sides[1].core.step(self.now_ns, SessionEvent::Executed(at));
    }

    fn claims(&self) -> [u32; 2] {
        [0, 1].map(|host| self.sides[host].claims)
    }

    fn horizon(&mut self) -> Option<Ordinal> {
        self.sides[1].core.follower().cursor().horizon()
    }

    fn resumed(&self) -> [Vec<usize>; 2] {
        [0, 1].map(|host| {
            let notices = self.sides[host].notices.iter();
            let of = |notice: &Notice| match notice {
                Notice::Resumed { messages } => Some(*messages),
                _ => None,
            };
            notices.filter_map(of).collect()
        })
    }
}

#[test]
fn what_was_lost_with_a_connection_is_sent_again_and_nobody_claims() {
    let mut two = cut();
    let before = two.claims();
    two.output(3);
    two.settle();
    assert_eq!(two.horizon(), None);
    two.breaks();
    assert!(two.sides.iter().all(|side| side.core.wants_connection()));
    // Sent while there is no connection.
    two.output(5);
    two.settle();
    two.connect();
    assert_eq!(two.horizon(), Some(Ordinal(5)));
    let resumed = two.resumed();
    assert!(resumed[0].len() == 1 && resumed[0][0] >= 2 && resumed[1].len() == 1, "{resumed:?}");
    assert!(two.sides.iter().all(|side| side.core.session().is_protected()));
    assert_eq!(two.claims(), before, "nobody has claimed since");
    two.follow(3);
    two.follow(5);
    two.settle();
    assert_eq!(two.sides[0].frames, 2);
}

#[test]
fn a_digest_of_before_the_break_releases_nothing_without_a_lease_of_after_it() {
    let mut two = cut();
    two.is_cut = false;
    two.output(3);
    two.settle();
    two.follow(3);
    // The digest is read, and before the frame leaves, the end of the connection.
    let Some(Effect::Send(digest)) = two.sides[1].core.take_effects().into_iter().next() else {
        panic!("the backup says nothing");
    };
    two.sides[0].core.receive(two.now_ns, &digest);
    assert!(two.sides[0].core.session().may_speak(two.now_ns));
    two.is_cut = true;
    two.breaks();
    assert_eq!(two.sides[0].frames, 0);
    two.connect();
    two.output(5);
    two.settle();
    assert_eq!(two.sides[0].frames, 1);
}

#[test]
fn a_host_that_does_not_come_back_is_lost() {
    let mut two = cut();
    two.breaks();
    let deadlines = [0, 1].map(|host| {
        let core = &mut two.sides[host].core;
        let lease_ns = core.session().lease_ns();
        let longest_ns = [lease_ns / 8 * 5, lease_ns + lease_ns / 8][host];
        let until_ns = two.now_ns + longest_ns;
        core.tick(until_ns - 1);
        assert!(core.wants_connection());
        core.tick(until_ns);
        assert!(!core.wants_connection() && !core.is_connected());
        until_ns
    });
    assert!(deadlines[0] < deadlines[1], "the host that has the guest keeps it");
    for host in [0, 1] {
        let effects = two.sides[host].core.take_effects();
        assert!(effects.iter().any(|effect| matches!(effect, Effect::ClaimTerm(_))), "{host}");
    }
}

#[test]
fn the_end_of_a_process_and_what_no_network_does_are_not_resumed() {
    for reason in [
        DisconnectReason::Closed,
        DisconnectReason::Wire(WireError::TooLong { length_bytes: u32::MAX }),
        DisconnectReason::Wire(WireError::Malformed { tag: 200 }),
    ] {
        let mut two = cut();
        let core = &mut two.sides[0].core;
        core.disconnect(two.now_ns, reason.clone());
        assert!(!core.wants_connection() && !core.is_connected(), "{reason}");
        let effects = core.take_effects();
        assert!(effects.contains(&Effect::HangUp) && !effects.contains(&Effect::BreakOff));
    }
    let mut two = cut();
    let changed = DisconnectReason::Wire(WireError::Checksum { expected: 1, got: 2 });
    two.sides[0].core.disconnect(two.now_ns, changed);
    assert!(two.sides[0].core.wants_connection());
}

#[test]
fn a_connection_that_breaks_at_the_same_message_again_is_given_no_more_time() {
    let mut two = cut();
    two.breaks();
    two.connect();
    assert_eq!(two.resumed().map(|times| times.len()), [1, 1]);
    two.output(3);
    two.follow(3);
    two.settle();
    two.is_cut = true;
    two.breaks();
    two.connect();
    assert_eq!(two.resumed().map(|times| times.len()), [2, 2]);

    let mut two = cut();
    let core = &mut two.sides[1].core;
    core.disconnect(two.now_ns, reset());
    core.connect(two.now_ns);
    let greeting = two.greeting(0);
    let core = &mut two.sides[1].core;
    core.receive(two.now_ns, &greeting);
    core.disconnect(two.now_ns + 1000, reset());
    let lease_ns = core.session().lease_ns();
    assert_eq!(core.resume_deadline_ns(), Some(two.now_ns + lease_ns + lease_ns / 8));
    core.tick(two.now_ns + lease_ns + lease_ns / 8);
    assert!(!core.is_connected(), "no message came between");
}

impl Two {
    /// What this host would begin a connection with that resumes the last one.
    fn greeting(&mut self, host: usize) -> Vec<u8> {
        let core = &mut self.sides[host].core;
        core.disconnect(self.now_ns, reset());
        let _ = core.take_effects();
        core.connect(self.now_ns);
        match core.take_effects().into_iter().next() {
            Some(Effect::Send(bytes)) => bytes,
            other => panic!("{other:?} instead of a greeting"),
        }
    }
}

#[test]
fn only_the_host_that_was_connected_is_taken() {
    let term = Term(1);
    let nonce = Nonce([77; 16]);
    let strange = [
        Message::Resume { own: nonce, theirs: nonce, received: 0 },
        Message::Heartbeat { term, released_through: OutputOrdinal(0) },
        Message::Received { messages: 0 },
    ];
    for message in strange {
        let mut two = cut();
        two.breaks();
        let core = &mut two.sides[0].core;
        core.connect(two.now_ns);
        let mut bytes = wire::PREAMBLE.to_vec();
        wire::encode(&message, &mut bytes);
        core.receive(two.now_ns, &bytes);
        assert!(core.wants_connection(), "{}", message.name());
        assert!(core.take_effects().contains(&Effect::BreakOff));
        two.connect();
        assert_eq!(two.resumed().map(|times| times.len()), [1, 1], "{}", message.name());
    }
}

#[test]
fn a_host_that_counts_wrongly_is_not_resumed() {
    for (received, is_taken) in [(0, true), (u64::MAX, false)] {
        let mut two = cut();
        let mut decoder = Decoder::new();
        decoder.push(&two.greeting(1));
        let Ok(Some(Message::Resume { own, theirs, .. })) = decoder.next_message() else {
            panic!("no greeting");
        };
        let core = &mut two.sides[0].core;
        core.disconnect(two.now_ns, reset());
        core.connect(two.now_ns);
        let mut bytes = wire::PREAMBLE.to_vec();
        wire::encode(&Message::Resume { own, theirs, received }, &mut bytes);
        core.receive(two.now_ns, &bytes);
        assert_eq!(core.wants_connection(), !is_taken, "{received}");
    }
}

#[test]
fn a_confirmation_of_more_than_was_sent_loses_the_peer() {
    let mut two = cut();
    let mut bytes = Vec::new();
    wire::encode(&Message::Received { messages: u64::MAX }, &mut bytes);
    let core = &mut two.sides[0].core;
    core.receive(two.now_ns, &bytes);
    assert!(!core.is_connected() && !core.wants_connection());
}

#[test]
fn what_is_confirmed_or_too_much_is_not_kept() {
    let mut two = cut();
    two.is_cut = false;
    let kept = |two: &Two| two.sides[0].core.connection.resume.kept_bytes();
    for at in 1..3000 {
        two.output(at);
        two.settle();
        assert!(kept(&two) < 2 * (64 << 10) + 4096, "{} at {at}", kept(&two));
        two.follow(at);
        two.settle();
    }
    two.is_cut = true;
    let mut encoder = GroupEncoder::new();
    let mut sent_bytes = 0;
    for at in 3000.. {
        encoder.push(&time(at));
        let bytes = [encoder.finish(Ordinal(at)), vec![0; 1 << 20]].concat();
        sent_bytes += bytes.len();
        let term = Term(1);
        let message = Message::State { term, part: StatePart::Pages(bytes) };
        two.sides[0].core.send_message(&message);
        if sent_bytes > 20 << 20 {
            break;
        }
    }
    assert!(kept(&two) <= 16 << 20);
    two.breaks();
    two.connect();
    assert_eq!(two.resumed().map(|times| times.len()), [0, 1], "a part is missing");
    let lost = [0, 1].map(|host| {
        two.sides[host].core.tick(two.now_ns + 3_600_000_000_000);
        !two.sides[host].core.is_connected()
    });
    assert_eq!(lost, [true, true]);
}
