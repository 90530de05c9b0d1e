//! A peer without a connection: effects and the threads that meet at them.

use ftvmm_replication::witness::{
    Doing, Entry, GuestId, Holder, Nonce, Purpose, Replaced, WitnessError, WitnessStore, moment,
};
use ftvmm_replication::{Effect, Term};

use super::*;
use crate::testing::NoDisplay;

/// A store in memory, which its clones share.
#[derive(Clone, Default)]
pub(super) struct Memory {
    held: Arc<Mutex<Option<Entry>>>,
    nonces: Arc<Mutex<Vec<Nonce>>>,
    /// A term in which the guest runs is followed by one of another host's.
    rival: bool,
}

impl Memory {
    pub fn with(entry: Entry) -> Self {
        Self { held: Arc::new(Mutex::new(Some(entry))), ..Self::default() }
    }
}

/// What a host whose name this is asks for at a store.
pub(super) fn access(store: Memory, host: &str) -> WitnessAccess {
    WitnessAccess {
        store: Box::new(store),
        holder: Holder::new(host, GuestId::from_random([2; 16])),
        guest: GuestId::from_random([1; 16]),
        purpose: Purpose::Start,
        asks_for_proof: false,
    }
}

pub(super) fn of_another(term: u64) -> Entry {
    let guest = GuestId::from_random([1; 16]);
    let holder = Holder::new("another", GuestId::from_random([9; 16]));
    let (term, ran) = (Term(term), Some(Term(term)));
    Entry { term, guest, holder, doing: Doing::Live, ran, seen: moment(0) }
}

impl WitnessStore for Memory {
    fn place(&self) -> String {
        "memory".into()
    }

    fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
        Ok(lock(&self.held).clone())
    }

    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError> {
        let mut held = lock(&self.held);
        if held.as_ref() != expected {
            return Ok(Replaced::Conflict(held.clone()));
        }
        let is_lost = self.rival && new.may_run();
        *held = Some(if is_lost { of_another(new.term.0 + 1) } else { new.clone() });
        Ok(Replaced::Stored)
    }

    fn prove(&mut self, nonce: Nonce) -> Result<(), WitnessError> {
        lock(&self.nonces).push(nonce);
        Ok(())
    }

    fn sees(&mut self, nonce: Nonce) -> Result<bool, WitnessError> {
        Ok(lock(&self.nonces).contains(&nonce))
    }
}

/// A backup that is not connected, whose card has this address.
pub fn backup(net_mac: Option<[u8; 6]>) -> Arc<Peer> {
    let queue = InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1));
    backup_at(Arc::new(queue), net_mac)
}

/// As [`backup`], with this queue.
pub fn backup_at(queue: Arc<InputQueue>, net_mac: Option<[u8; 6]>) -> Arc<Peer> {
    made(Role::Backup, Memory::with(of_another(1)), queue, net_mac, None)
}

/// A primary that is not connected, with this tap, and wins no term but the first.
pub fn primary_with(tap: Tap) -> Arc<Peer> {
    let queue = InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1));
    made(
        Role::Primary,
        Memory { rival: true, ..Memory::default() },
        Arc::new(queue),
        None,
        Some(tap),
    )
}

fn made(
    role: Role,
    store: Memory,
    queue: Arc<InputQueue>,
    net_mac: Option<[u8; 6]>,
    tap: Option<Tap>,
) -> Arc<Peer> {
    let fingerprint = crate::testing::header().fingerprint;
    let mut session = SessionConfig::new(role, crate::build::own(), fingerprint, Term(0), 0);
    // No lease ends while a test's thread waits for its turn.
    session.failure_ns = 3_600_000_000_000;
    Peer::new(PeerConfig {
        security: ftvmm_host::channel::Security::default(),
        session,
        witness: access(store, "test"),
        tap,
        net_mac,
        queue,
        disk: None,
        disk_failover: false,
        horizon_ns: 0,
        incidents: None,
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
