//! Two peers over a loopback connection, each with its event thread; what their vCPUs' threads ask
//! is asked by the test. Nothing here ends because time is over: every limit is an hour.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use ftvmm_devices::{Input, Output};
use ftvmm_host::channel::{Channel, Security};
use ftvmm_host::{Console, EventLoop};
use ftvmm_machine::page_tracker::testing::copy;
use ftvmm_machine::situation::{RunSituation, StopCause};
use ftvmm_replication::policy::Refusal;
use ftvmm_replication::{
    Check, DisconnectReason, End, EndReason, Event, MemoryCheck, Ordinal as Exit, OutputDigest,
    Record, StatePart, Term,
};

use super::tests::{Memory, access};
use super::*;
use crate::control::{ControlRole, Operator, Refused};
use crate::input::LogSink;
use crate::step::{OutputSink, Standpoint, Step};
use crate::testing::{Fake, NoDisplay, header};
use crate::transfer::TransferPort;

const HOUR_NS: u64 = 3_600_000_000_000;
/// The least a session allows.
const LAG_EXITS: u64 = 1024;
const PAGE_BYTES: u64 = ftvmm_replication::PAGE_BYTES as u64;

thread_local! {
    /// The witness of the pair that this test's thread has started last.
    static STORE: std::cell::RefCell<Memory> = std::cell::RefCell::default();
}

struct Host {
    peer: Arc<Peer>,
    incidents: tempfile::TempDir,
    /// What this host's tap sends.
    network: UnixDatagram,
    _events: EventLoop,
}

impl Host {
    fn start(
        role: Role,
        change: impl FnOnce(&mut SessionConfig),
        listener: Option<TcpListener>,
        connection: Option<Channel>,
    ) -> Self {
        let fingerprint = header().fingerprint;
        let mut session = SessionConfig::new(role, crate::build::own(), fingerprint, Term(0), 77);
        session.heartbeat_ns = HOUR_NS;
        session.failure_ns = 2 * HOUR_NS;
        (session.stall_ns, session.handshake_ns) = (HOUR_NS, HOUR_NS);
        session.evidence_ns = HOUR_NS;
        change(&mut session);
        // The primary of a pair is started first.
        let store = STORE.with_borrow_mut(|store| {
            if role == Role::Primary {
                *store = Memory::default();
            }
            store.clone()
        });
        let incidents = tempfile::tempdir().unwrap();
        let queue = InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1));
        let (network, tap) = UnixDatagram::pair().unwrap();
        let peer = Peer::new(PeerConfig {
            security: Security::default(),
            session,
            witness: WitnessAccess { asks_for_proof: true, ..access(store, &role.to_string()) },
            tap: Some(Tap::over("lo", File::from(OwnedFd::from(tap)))),
            net_mac: None,
            queue: Arc::new(queue),
            disk: None,
            disk_failover: false,
            horizon_ns: 0,
            incidents: Folder::open(incidents.path()).ok(),
            unrecorded_when_alone: true,
            progress: Box::new(NoDisplay),
        })
        .unwrap();
        let channel = ChannelEvents::new(peer.clone(), listener, connection).unwrap();
        let (ticker, log_ticker) = (peer.ticker().unwrap(), peer.log_ticker());
        let events =
            EventLoop::start(vec![Box::new(channel), Box::new(ticker), Box::new(log_ticker)]);
        Self { peer, incidents, network, _events: events.unwrap() }
    }

    fn primary(change: impl FnOnce(&mut SessionConfig)) -> (Self, SocketAddr) {
        let listener =
            Channel::listen("127.0.0.1:0".parse().unwrap(), &Security::default()).unwrap();
        let address = listener.local_addr().unwrap();
        (Self::start(Role::Primary, change, Some(listener), None), address)
    }

    fn backup_of(primary: SocketAddr) -> Self {
        let channel = Channel::connect(primary, &Security::default()).unwrap();
        Self::start(Role::Backup, |_| {}, None, Some(channel))
    }

    fn operator(&self) -> PeerOperator {
        let snapshots = Folder::open(self.incidents.path()).unwrap();
        PeerOperator::new(self.peer.clone(), Console::start().unwrap(), snapshots)
    }

    /// The vCPU's thread where this host speaks for the guest: leaves exit `at` after an input.
    fn lead(&self, at: u64, now_ns: u64) {
        let mut log = PeerLog::new(self.peer.clone());
        let event = Event::Input(Input::Time { now_ns });
        log.append(&Record { at: Exit(at), event }).unwrap();
        log.exit_complete(Exit(at)).unwrap();
    }

    fn emit(&self, at: u64, chain: u64) {
        let frame = vec![1; 60];
        let digest = Some(OutputDigest::of(Exit(at), chain, &frame));
        let mut outputs = PeerOutputs::new(self.peer.clone(), Console::start().unwrap());
        outputs.emit(Exit(at), digest, Output::Frame(frame)).unwrap();
    }

    fn until(&self, is_so: impl Fn(&PeerCore) -> bool) {
        self.peer.wait_for(|core, _| is_so(core).then_some(()));
    }
}

/// A guest that is protected and about to start.
fn pair_with(change: impl FnOnce(&mut SessionConfig)) -> (Host, Host) {
    let (primary, address) = Host::primary(change);
    let backup = Host::backup_of(address);
    for (host, role) in [(&primary, Role::Primary), (&backup, Role::Backup)] {
        let begin = host.peer.wait_for_begin(role).unwrap().unwrap();
        assert!(begin.rtc_epoch_s > 0);
    }
    primary.until(|core| core.session().is_protected());
    (primary, backup)
}

fn pair() -> (Host, Host) {
    pair_with(|_| {})
}

fn at(at: u64) -> RunSituation {
    RunSituation { at: Some(Exit(at)), last: Exit(at), ..RunSituation::default() }
}

fn halted_at(at: u64) -> RunSituation {
    RunSituation { halted: true, ..self::at(at) }
}

/// The follower is given the time that was logged for it, and leaves the exit.
fn follows(port: &mut PairPort, exit: u64, now_ns: u64) {
    let step = port.follow(&at(exit)).unwrap();
    let Some(Step::Apply(input)) = step else { panic!("{step:?}") };
    assert_eq!(input, Input::Time { now_ns });
    let step = port.follow(&at(exit)).unwrap();
    assert!(matches!(step, Some(Step::Proceed)), "{step:?}");
    port.run_mode(Exit(exit));
}

#[test]
fn the_log_of_the_primary_is_what_the_backup_is_given() {
    let (primary, backup) = pair();
    let mut port = PairPort::new(backup.peer.clone());
    for exit in 1..=3 {
        primary.lead(exit, 10 * exit);
        follows(&mut port, exit, 10 * exit);
    }
    assert!(primary.peer.counters().log_bytes > 0);
    assert!(!primary.peer.follows() && backup.peer.follows());
}

/// Whichever of the two is told that it broke.
#[test]
fn a_connection_that_breaks_is_made_again_and_both_go_on() {
    let (primary, backup) = pair();
    let mut port = PairPort::new(backup.peer.clone());
    for (told, exit) in [(&primary, 1), (&backup, 2), (&primary, 3)] {
        told.peer.disconnect(DisconnectReason::Transport { description: "reset".into() });
        primary.lead(exit, 10 * exit);
        primary.emit(exit, 5);
        follows(&mut port, exit, 10 * exit);
        backup.emit(exit, 5);
        assert_eq!(primary.network.recv(&mut [0; 100]).unwrap(), 60);
    }
    for host in [&primary, &backup] {
        host.until(|core| core.has_connection() && core.session().is_protected());
        assert_eq!(host.peer.counters().takeovers, 0);
    }
    assert_eq!(primary.peer.lock().session().term(), Some(Term(1)));
}

#[test]
fn frames_are_compared_and_a_difference_leaves_the_primary_alone_with_a_report() {
    let (primary, backup) = pair();
    let mut port = PairPort::new(backup.peer.clone());
    for (exit, backups_chain) in [(1, 5), (2, 6)] {
        primary.lead(exit, exit);
        primary.emit(exit, 5);
        follows(&mut port, exit, exit);
        backup.emit(exit, backups_chain);
        primary.until(|core| core.counters().digests == exit);
        // The second one leaves when this host is alone.
        let mut frame = [0; 100];
        assert_eq!(primary.network.recv(&mut frame).unwrap(), 60);
    }
    primary.until(|core| core.session().state_name() == "Alone");
    let counters = primary.peer.counters();
    assert_eq!((counters.outputs, counters.divergences), (2, 1));
    assert_eq!(backup.peer.wait_for_stop(), StopReason::Divergence);
    for host in [&primary, &backup] {
        host.network.set_nonblocking(true).unwrap();
        assert!(host.network.recv(&mut [0; 100]).is_err(), "each frame left once");
    }
    // Whoever holds it may not have performed everything yet.
    drop(lock(&primary.peer.outbox));
    primary.peer.finish_reports();
    let names: BTreeSet<_> = std::fs::read_dir(primary.incidents.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(names.first().unwrap().starts_with("ftvmm-incident-primary-term-"), "{names:?}");
}

#[test]
fn a_guest_that_ends_alike_on_both_hosts_ends_the_session() {
    let (primary, backup) = pair();
    primary.lead(3, 10);
    follows(&mut PairPort::new(backup.peer.clone()), 3, 10);
    let end = End { state_digest: [8; 32], chain: 1, outputs: 2, reason: EndReason::PowerOff };
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| backup.peer.guest_ended(Exit(4), end));
        assert_eq!(primary.peer.guest_ended(Exit(4), end), StopReason::Clean);
        assert_eq!(follower.join().unwrap(), StopReason::Clean);
    });
}

#[test]
fn a_switch_changes_the_roles_and_takes_waiting_frames_along() {
    let (primary, backup) = pair();
    let mut ports = [&primary, &backup].map(|host| PairPort::new(host.peer.clone()));
    let [from, to] = &mut ports;
    primary.lead(1, 10);
    follows(to, 1, 10);
    assert!(primary.peer.queue.push_frame(vec![7; 60]).is_none());
    std::thread::scope(|scope| {
        let switch = scope.spawn(|| primary.operator().switch());
        scope.spawn(|| {
            // The log is used up and sealed.
            assert!(matches!(to.follow(&at(2)), Ok(None)));
            to.take_over(&at(2));
        });
        primary.until(PeerCore::wants_yield);
        assert!(from.change_roles().is_none());
        switch.join().unwrap().unwrap();
    });
    assert!(from.follows() && !to.follows());
    assert!(primary.peer.follows() && !backup.peer.follows());
    assert_eq!(primary.operator().status().role, ControlRole::Backup);
    assert_eq!(backup.operator().status().role, ControlRole::Primary);
    let refused = primary.operator().switch().unwrap_err();
    assert!(refused.to_string().contains("ask the primary"), "{refused}");
    // It goes on the other way round.
    backup.lead(2, 20);
    follows(from, 2, 20);
    let mut frames = Vec::new();
    while frames.is_empty() {
        std::thread::yield_now();
        frames = backup.peer.queue.take_frames();
    }
    assert_eq!(frames, [vec![7; 60]]);
}

/// The vCPU's thread of a host that sends its state: halted at `exit`.
fn give_state(peer: &Arc<Peer>, transfer: Arc<Transfer>, exit: u64) {
    let mut port = TransferPort::new(transfer);
    loop {
        match peer.wait_for(|_, _| port.wanted(&halted_at(exit))) {
            Step::Measure { .. } => {
                let memory = MemoryCheck { digest: 0, changed: vec![], renews_copy: true };
                port.measured(Exit(exit), &Check { memory: Some(memory), ..Check::default() });
            }
            Step::SaveState => return drop(port.saved(Fake::state(Exit(exit))).unwrap()),
            step => panic!("{step:?}"),
        }
    }
}

/// The vCPU's thread of a host that is given a state: the kinds of the parts.
fn take_state(port: &mut PairPort, stands: Standpoint) -> Vec<&'static str> {
    let mut kinds = Vec::new();
    while kinds.last() != Some(&"machine") {
        let step = port.follow(&RunSituation::default()).unwrap();
        let Some(Step::RestoreState(part)) = step else { panic!("{step:?}") };
        kinds.push(match part {
            StatePart::Outline { .. } => "outline",
            StatePart::Pages(_) => "pages",
            StatePart::Blocks(_) => "blocks",
            StatePart::Machine(_) => "machine",
        });
        port.restored(&part, (kinds.last() == Some(&"machine")).then_some(stands));
    }
    kinds
}

#[test]
fn a_backup_that_attaches_is_given_the_state_and_follows_from_there() {
    let (primary, address) = Host::primary(|_| {});
    primary.peer.step(SessionEvent::StartAlone);
    primary.peer.wait_for_begin(Role::Primary).unwrap().unwrap();
    let operator = primary.operator();
    let too_early = operator.snapshot("/nowhere".as_ref()).unwrap_err();
    assert!(too_early.to_string().contains("has not started yet"), "{too_early}");
    let (queue, clock) = (primary.peer.queue.clone(), primary.peer.clock());
    let transfer = Arc::new(Transfer::new(Arc::new(copy()), None, queue, clock, header()));
    primary.peer.transfer_with(transfer.clone());

    let backup = Host::backup_of(address);
    let mut port = PairPort::new(backup.peer.clone());
    std::thread::scope(|scope| {
        scope.spawn(|| give_state(&primary.peer, transfer, 7));
        backup.peer.wait_for_begin(Role::Backup).unwrap().unwrap();
        let kinds = take_state(&mut port, Standpoint { at: Exit(7), guest_ns: 5000 });
        assert_eq!(kinds, ["outline", "pages", "machine"]);
    });
    primary.until(|core| core.session().is_protected());
    primary.lead(7, 6000);
    follows(&mut port, 7, 6000);
    while primary.peer.last_attach().is_none() {
        std::thread::yield_now();
    }
    let status = operator.status();
    assert!(status.protected && status.attach.is_none() && status.peer.is_some());
    assert_eq!(status.last_attach.map(|attach| attach.bytes), Some(2 * PAGE_BYTES));
    assert_eq!(status.listen, Some(address));
}

#[test]
fn a_backup_is_let_go_and_the_next_one_may_knock_where_the_operator_says() {
    let (primary, backup) = pair();
    let operator = primary.operator();
    operator.detach().unwrap();
    assert_eq!(primary.peer.stopped(), None);
    backup.peer.wait_for_stop();
    for refused in [operator.detach(), operator.switch()] {
        assert!(matches!(refused, Err(Refused::NotNow { .. })), "{refused:?}");
    }
    let before = operator.status().listen.unwrap();
    operator.attach(before).unwrap();
    assert_eq!(operator.status().listen, Some(before), "it listens there already");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = operator.attach(taken.local_addr().unwrap());
    assert!(matches!(refused, Err(Refused::BadArgument { .. })), "{refused:?}");
    operator.attach("127.0.0.1:0".parse().unwrap()).unwrap();
    let after = operator.status().listen.unwrap();
    assert_ne!(after.port(), before.port());
    let next = Host::backup_of(after);
    next.peer.wait_for_begin(Role::Backup).unwrap().unwrap();
    primary.until(|core| core.session().is_attaching());
}

#[test]
fn a_backup_that_cannot_follow_leaves_and_the_primary_goes_on() {
    let (primary, backup) = pair();
    assert_eq!(backup.peer.fault("exit 1: another world".into()), StopReason::Divergence);
    primary.until(|core| core.session().state_name() == "Alone");
    assert_eq!(primary.peer.stopped(), None);
}

#[test]
fn who_speaks_for_the_guest_ends_it_and_who_follows_leaves() {
    let (primary, backup) = pair();
    backup.peer.stop_requested();
    assert_eq!(backup.peer.stopped(), Some(StopReason::HostRequest));
    primary.until(|core| core.session().state_name() == "Alone");
    primary.peer.stop_requested();
    assert_eq!(primary.peer.stopped(), None, "the guest is asked first");
    assert!(primary.peer.queue.is_stopped());
    assert_eq!(primary.peer.stop_now(), StopReason::HostRequest);
    let mut port = PairPort::new(primary.peer.clone());
    assert!(matches!(port.change_roles(), Some(Step::Stop(StopCause::Protocol))));
}

/// The end of the old log may be far away, and its guest may not get there.
#[test]
fn who_takes_over_and_does_not_get_to_the_end_of_the_log_ends_when_asked_twice() {
    let (primary, backup) = pair();
    // Both claim the next term, and this one does not come to ask.
    let _asks_nobody = lock(&primary.peer.witness.access);
    backup.peer.disconnect(DisconnectReason::Closed);
    backup.until(|core| core.session().state_name() == "Live");
    backup.peer.stop_requested();
    assert_eq!(backup.peer.stopped(), None, "the guest is asked first");
    backup.peer.stop_requested();
    assert_eq!(backup.peer.stopped(), Some(StopReason::HostRequest));
}

#[test]
fn a_guest_that_is_too_far_ahead_waits_until_the_backup_comes_along() {
    let (primary, backup) = pair_with(|session| session.limits.lag_exits_max = LAG_EXITS);
    let mut port = PairPort::new(backup.peer.clone());
    std::thread::scope(|scope| {
        let led = scope.spawn(|| {
            for exit in 1..=2 * LAG_EXITS {
                primary.lead(exit, exit);
                // What is not sent yet does not count.
                primary.peer.tell(|core, now_ns| core.flush_log(now_ns));
            }
        });
        // One waiter: that thread. It cannot get to its end before the backup has begun.
        while primary.peer.lock().waiters == 0 {
            assert!(
                !led.is_finished(),
                "nothing has been executed yet: {} {:?} {:?}",
                primary.peer.lock().session().state_name(),
                primary.peer.lock().session().lag_exits(),
                primary.peer.lock().counters()
            );
            std::thread::yield_now();
        }
        assert!(primary.peer.lock().is_congested());
        (1..=2 * LAG_EXITS).for_each(|exit| follows(&mut port, exit, exit));
        led.join().unwrap();
    });
}

#[test]
fn a_backup_that_is_not_welcomed_is_told_why_or_that_nobody_is_there() {
    let listener = Channel::listen("127.0.0.1:0".parse().unwrap(), &Security::default()).unwrap();
    let backup = Host::backup_of(listener.local_addr().unwrap());
    drop(listener.accept().unwrap());
    assert_eq!(backup.peer.wait_for_begin(Role::Backup), Ok(None));

    let (primary, address) = Host::primary(|_| {});
    STORE.set(Memory::default());
    let backup = Host::backup_of(address);
    for (host, role) in [(&primary, Role::Primary), (&backup, Role::Backup)] {
        let reason = host.peer.wait_for_begin(role).unwrap_err();
        assert!(matches!(reason, StopReason::BadConfiguration(Refusal::OtherWitness { .. })));
    }

    let (primary, address) = Host::primary(|session| session.fingerprint.memory_mib += 1);
    let backup = Host::backup_of(address);
    for (host, role) in [(&primary, Role::Primary), (&backup, Role::Backup)] {
        let reason = host.peer.wait_for_begin(role).unwrap_err();
        let StopReason::BadConfiguration(Refusal::Fingerprint(difference)) = &reason else {
            panic!("{reason}")
        };
        assert!(difference.to_string().contains("memory"), "{difference}");
    }
}

/// Until the primary has sent this backup away.
fn sent_away(backup: &Host) -> Refusal {
    assert_eq!(backup.peer.wait_for_begin(Role::Backup), Ok(None));
    assert_eq!(backup.peer.stopped(), None, "it is wanted later");
    backup.peer.turned_away().unwrap()
}

#[test]
fn a_second_backup_is_told_of_the_first_and_takes_its_place_when_it_is_lost() {
    let (primary, backup) = pair();
    let address = primary.operator().status().listen.unwrap();
    let first = primary.operator().status().peer.unwrap();
    let second = Host::backup_of(address);
    // More often than there are connections that stay open.
    for _ in 0..6 {
        let told = sent_away(&second);
        assert!(
            matches!(told, Refusal::HasBackup { backup: Some(at), .. } if at == first),
            "{told}"
        );
        assert!(primary.peer.lock().session().is_protected());
        second.peer.dialed(Channel::connect(address, &Security::default()).unwrap());
    }
    sent_away(&second);
    primary.operator().detach().unwrap();
    backup.peer.wait_for_stop();
    primary.until(|core| core.session().accepts_backup());
    second.peer.dialed(Channel::connect(address, &Security::default()).unwrap());
    second.peer.wait_for_begin(Role::Backup).unwrap().unwrap();
    assert_eq!(second.peer.turned_away(), None);
    primary.until(|core| core.session().is_attaching());
}

#[test]
fn who_comes_to_a_backup_is_told_that_it_is_one() {
    let (primary, address) = Host::primary(|_| {});
    let listener = Channel::listen("127.0.0.1:0".parse().unwrap(), &Security::default()).unwrap();
    let at_backup = listener.local_addr().unwrap();
    let channel = Channel::connect(address, &Security::default()).unwrap();
    let backup = Host::start(Role::Backup, |_| {}, Some(listener), Some(channel));
    backup.peer.wait_for_begin(Role::Backup).unwrap().unwrap();
    primary.until(|core| core.session().is_protected());
    let told = sent_away(&Host::backup_of(at_backup));
    assert!(matches!(told, Refusal::IsBackup { primary: Some(at), .. } if at == address), "{told}");
}
