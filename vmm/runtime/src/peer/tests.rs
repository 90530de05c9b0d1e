//! A peer without a connection: effects and the threads that meet at them.

use ftvmm_replication::witness::{Claim, WitnessEntry, WitnessError};
use ftvmm_replication::{Effect, Term};

use super::*;
use crate::testing::NoDisplay;

/// Grants everything.
pub(super) struct Kind;

impl Witness for Kind {
    fn claim(&mut self, _: Term, _: &str) -> Result<Claim, WitnessError> {
        Ok(Claim::Granted)
    }

    fn highest(&mut self) -> Result<Term, WitnessError> {
        Ok(Term(0))
    }
}

/// Grants the first term; the others are another host's.
struct FirstOnly;

impl Witness for FirstOnly {
    fn claim(&mut self, term: Term, _: &str) -> Result<Claim, WitnessError> {
        let current = WitnessEntry { term, holder: "another".into() };
        Ok(if term == Term(1) { Claim::Granted } else { Claim::Denied { current } })
    }

    fn highest(&mut self) -> Result<Term, WitnessError> {
        Ok(Term(0))
    }
}

/// A backup that is not connected, whose card has this address.
pub fn backup(net_mac: Option<[u8; 6]>) -> Arc<Peer> {
    let queue = InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1));
    backup_at(Arc::new(queue), net_mac)
}

/// As [`backup`], with this queue.
pub fn backup_at(queue: Arc<InputQueue>, net_mac: Option<[u8; 6]>) -> Arc<Peer> {
    made(Role::Backup, Box::new(Kind), queue, net_mac, None)
}

/// A primary that is not connected, with this tap, and wins no term but the first.
pub fn primary_with(tap: Tap) -> Arc<Peer> {
    let queue = InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1));
    made(Role::Primary, Box::new(FirstOnly), Arc::new(queue), None, Some(tap))
}

fn made(
    role: Role,
    witness: Box<dyn Witness + Send>,
    queue: Arc<InputQueue>,
    net_mac: Option<[u8; 6]>,
    tap: Option<Tap>,
) -> Arc<Peer> {
    let fingerprint = crate::testing::header().fingerprint;
    Peer::new(PeerConfig {
        session: SessionConfig::new(role, crate::build::own(), fingerprint, Term(0), 0),
        witness,
        holder: "test".into(),
        tap,
        net_mac,
        queue,
        disk: None,
        disk_failover: false,
        horizon_ns: 0,
        incident_dir: PathBuf::new(),
        unrecorded_when_alone: false,
        progress: Box::new(NoDisplay),
    })
    .unwrap()
}

/// Effects are performed in the order of decision whoever has the outbox, and by the time the
/// last thread is done, all of them.
#[test]
fn no_effect_is_left_behind_by_threads_that_meet_at_the_outbox() {
    let peer = backup(None);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    peer.tell(|core, _| core.want_switch());
                }
            });
        }
    });
    assert!(!peer.lock().has_effects());
}

#[test]
fn who_holds_the_outbox_does_what_others_decide_meanwhile() {
    let peer = backup(None);
    let outbox = peer.outbox.lock().unwrap();
    peer.tell(|core, _| core.want_switch());
    assert_eq!(peer.lock().take_effects(), [Effect::RequestAttention], "left to the holder");
    peer.tell(|core, _| core.want_switch());
    drop(outbox);
    peer.perform_effects();
    assert!(!peer.lock().has_effects());
}

#[test]
fn who_learns_that_the_session_is_over_finds_everything_done() {
    let peer = backup(None);
    let outbox = peer.outbox.lock().unwrap();
    std::thread::scope(|scope| {
        // As the event thread, with another thread at the outbox.
        peer.step(SessionEvent::HostStop);
        let waits = scope.spawn(|| {
            peer.wait_for_stop();
            assert!(!peer.lock().has_effects(), "the process may end now");
        });
        assert!(peer.lock().has_effects() && !waits.is_finished());
        drop(outbox);
    });
}
