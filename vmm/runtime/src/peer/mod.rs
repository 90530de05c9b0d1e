//! The other host: performs what [`PeerCore`] decides.
//!
//! ```text
//! vCPU thread    PairPort, PeerLog, PeerOutputs ───┐               ┌─► channel, tap, witness
//!                                                  ├─► PeerCore ─► effects
//! host events    channel bytes, ticks, signals ────┘               └─► input queue, disk, threads
//! ```
//!
//! One lock holds the core, and nothing under it blocks or does I/O. The core returns effects. The
//! thread that holds the outbox performs them in the order of decision, after it has released the
//! core ([`Peer::tell`]). Lock order: outbox, then core, then the input queue.

mod announce;
mod disk;
mod events;
mod guest;
mod incident;
mod inputs;
mod log;
mod operator;
mod outbox;
mod outputs;
#[cfg(test)]
mod pair_tests;
mod reconnect;
mod transfer;
mod turned_away;
mod witness_desk;
mod witness_proof;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ftvmm_replication::peer::{Begin, PeerCounters, Roles};
use ftvmm_replication::policy::{Role, SessionConfigError, StopReason};
use ftvmm_replication::{PeerCore, SessionConfig, SessionEvent};
use nix::sys::timerfd::TimerFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use announce::restored as announce_restored;
pub use events::ChannelEvents;
pub use inputs::PairPort;
pub use log::PeerLog;
pub use operator::PeerOperator;
use outbox::{Outbox, Unsent};
pub use outputs::PeerOutputs;
pub use witness_desk::WitnessAccess;
use witness_desk::WitnessDesk;

use ftvmm_host::channel::{Channel, Security};
use ftvmm_host::clock::{HostClock, host_unix_seconds};
use ftvmm_host::disk::Disk;
use ftvmm_host::folder::Folder;
use ftvmm_host::profile::{self, Phase};
use ftvmm_host::sync::{Condvar, Mutex, MutexGuard, lock, wait};
use ftvmm_host::{HostEventsError, Seldom, Tap, resting_timer};

use crate::input::InputQueue;
use crate::transfer::{ProgressCell, ProgressDisplay, Transfer, TransferSummary};

/// How long the end of a run waits for incident reports.
const REPORTS_LONGEST: Duration = Duration::from_secs(5);

/// What a peer is made with.
pub struct PeerConfig {
    /// For the session.
    pub session: SessionConfig,
    /// What the other host has to prove.
    pub security: Security,
    /// Decides which host is active.
    pub witness: WitnessAccess,
    /// The guest's tap, if it has a network card.
    pub tap: Option<Tap>,
    /// The card's address, to be announced after a take-over.
    pub net_mac: Option<[u8; 6]>,
    /// Where live inputs wait.
    pub queue: Arc<InputQueue>,
    /// The guest's disk, if it has one.
    pub disk: Option<Arc<Disk>>,
    /// When its disk fails, this host leaves the pair instead of reporting the failure to the
    /// guest.
    pub disk_failover: bool,
    /// Longest time a horizon is held back while the guest makes exits, in nanoseconds.
    pub horizon_ns: u64,
    /// Folder for incident reports; without one they are only logged.
    pub incidents: Option<Folder>,
    /// Without a recording a host that is alone takes inputs between exits too.
    pub unrecorded_when_alone: bool,
    /// Shows the progress of a transfer.
    pub progress: Box<dyn ProgressDisplay>,
}

/// The core, and how many threads wait for it to change.
pub struct Core {
    core: PeerCore,
    waiters: u32,
    /// The roles as last published to the vCPU thread.
    roles: Roles,
}

impl std::ops::Deref for Core {
    type Target = PeerCore;

    fn deref(&self) -> &PeerCore {
        &self.core
    }
}

impl std::ops::DerefMut for Core {
    fn deref_mut(&mut self) -> &mut PeerCore {
        &mut self.core
    }
}

/// The core, its channel, and what waits for them.
pub struct Peer {
    core: Mutex<Core>,
    changed: Condvar,
    outbox: Mutex<Outbox>,
    unsent: Unsent,
    /// Roles have changed or are to change: the vCPU thread reads the core before it asks for
    /// inputs.
    roles_changed: AtomicBool,
    clocks: Clocks,
    queue: Arc<InputQueue>,
    disk: Option<Arc<Disk>>,
    limits: Limits,
    network: Network,
    witness: WitnessDesk,
    /// Fires when unsent log records may have to be sent.
    log_timer: Arc<TimerFd>,
    port: Port,
    sending: Sending,
    incidents: Incidents,
}

/// Both begin with the peer.
struct Clocks {
    /// The session's, which counts while this host is suspended, as the other host does.
    session: HostClock,
    /// The guest's and its transfers'.
    guest: HostClock,
}

/// Settings of the command line.
struct Limits {
    heartbeat_ns: u64,
    failure_ns: u64,
    disk_failover: bool,
}

/// The guest's network card on this host.
struct Network {
    tap: Option<Tap>,
    mac: Option<[u8; 6]>,
}

/// Where backups connect.
struct Port {
    /// Tells the host's event thread that a joining backup could be served, or that the address
    /// changed.
    joining: EventFd,
    address: Mutex<Address>,
    /// Somebody who connects is served: a backup, or the other host after its connection broke.
    accepts: AtomicBool,
    /// A thread makes the connection again that broke.
    is_connecting: AtomicBool,
    security: Security,
    /// A joining backup that cannot be served yet.
    pending: Mutex<Option<Channel>>,
    /// A connection that this host has made after its first was not taken, and whether it is still
    /// to be served.
    dialed: Mutex<Option<Channel>>,
    is_dialing: AtomicBool,
    /// Lines of connections that began, of those that ended, and of such that left everything as it
    /// was.
    seldom: [Mutex<Seldom>; 3],
}

#[derive(Default)]
struct Address {
    listens_at: Option<SocketAddr>,
    /// The other host, of the last connection.
    peer: Option<SocketAddr>,
    /// From now on.
    new_listener: Option<TcpListener>,
}

/// What the guest's state is sent with.
struct Sending {
    transfer: OnceLock<Arc<Transfer>>,
    /// Held by the thread that sends a state.
    one_at_a_time: Mutex<()>,
    progress: ProgressCell,
    last: Mutex<Option<TransferSummary>>,
}

/// Reports of divergences that are being written.
struct Incidents {
    folder: Option<Folder>,
    under_way: Mutex<u32>,
    written: Condvar,
}

/// Why there is no peer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The session's configuration cannot work.
    #[error(transparent)]
    Session(#[from] SessionConfigError),
    /// The host is out of descriptors.
    #[error("the host gives no event descriptor: {0}")]
    EventFd(#[from] std::io::Error),
    /// The host is out of timers.
    #[error(transparent)]
    Timer(#[from] HostEventsError),
}

impl Peer {
    /// A peer that is not connected yet.
    ///
    /// # Errors
    /// When the session's configuration cannot work.
    pub fn new(config: PeerConfig) -> Result<Arc<Self>, PeerError> {
        let PeerConfig { session, queue, horizon_ns, unrecorded_when_alone, .. } = config;
        let role = session.role;
        let limits = Limits {
            heartbeat_ns: session.heartbeat_ns,
            failure_ns: session.failure_ns,
            disk_failover: config.disk_failover,
        };
        let mut core = PeerCore::new(session, horizon_ns, unrecorded_when_alone)?;
        if config.witness.asks_for_proof {
            core.require_proof(config.witness.store.place().into());
        }
        queue.set_closed(role == Role::Backup);
        let session_clock = HostClock::host_start_with_suspension();
        let clocks = Clocks { session: session_clock, guest: HostClock::host_start() };
        let progress = ProgressCell::new(clocks.guest, config.progress);
        Ok(Arc::new(Self {
            core: Mutex::new(Core { core, waiters: 0, roles: Roles::default() }),
            changed: Condvar::new(),
            outbox: Mutex::default(),
            unsent: Unsent::default(),
            roles_changed: AtomicBool::new(false),
            clocks,
            queue,
            disk: config.disk,
            limits,
            network: Network { tap: config.tap, mac: config.net_mac },
            witness: WitnessDesk::new(config.witness),
            log_timer: resting_timer()?,
            port: Port {
                joining: EventFd::new(EFD_NONBLOCK)?,
                address: Mutex::default(),
                accepts: AtomicBool::new(false),
                is_connecting: AtomicBool::new(false),
                security: config.security,
                pending: Mutex::default(),
                dialed: Mutex::default(),
                is_dialing: AtomicBool::new(false),
                seldom: [(); 3].map(|()| Mutex::new(Seldom::new(1, 1))),
            },
            sending: Sending {
                transfer: OnceLock::new(),
                one_at_a_time: Mutex::default(),
                progress,
                last: Mutex::default(),
            },
            incidents: Incidents {
                folder: config.incidents,
                under_way: Mutex::default(),
                written: Condvar::new(),
            },
        }))
    }

    /// The guest's disk on this host.
    pub fn disk(&self) -> Option<Arc<Disk>> {
        self.disk.clone()
    }

    /// The clock of the guest and of its transfers.
    pub fn clock(&self) -> HostClock {
        self.clocks.guest
    }

    /// Reports an event to the core, releases the core, and performs the effects.
    pub(crate) fn tell<R>(self: &Arc<Self>, what: impl FnOnce(&mut PeerCore, u64) -> R) -> R {
        let (answer, has_effects) = self.tell_only(what);
        if has_effects {
            self.perform_effects();
        }
        answer
    }

    /// As [`Self::tell`], without performing the effects; whether there are any.
    fn tell_only<R>(&self, what: impl FnOnce(&mut PeerCore, u64) -> R) -> (R, bool) {
        let _session = profile::enter(Phase::Session);
        let mut core = self.lock();
        let now_ns = self.clocks.session.host_now_ns();
        let answer = what(&mut core, now_ns);
        (answer, self.publish(core))
    }

    /// As [`Self::tell`], of the session.
    pub fn step(self: &Arc<Self>, event: SessionEvent) {
        self.tell(|core, now_ns| core.step(now_ns, event));
    }

    /// Waits until `answer` has one.
    fn wait_for<R>(self: &Arc<Self>, mut answer: impl FnMut(&mut PeerCore, u64) -> Option<R>) -> R {
        let mut core = self.lock();
        loop {
            if let Some(answer) = answer(&mut core, self.clocks.session.host_now_ns()) {
                let is_over = core.stop().is_some();
                self.let_go(core);
                if is_over {
                    self.finish_effects();
                }
                return answer;
            }
            core.waiters += 1;
            core = wait(&self.changed, core);
            core.waiters -= 1;
        }
    }

    /// As [`Self::wait_for`], on the vCPU thread. A thread that waits for the other host does not
    /// count as blocked by this one.
    fn wait_as_guest<R>(
        self: &Arc<Self>,
        answer: impl FnMut(&mut PeerCore, u64) -> Option<R>,
    ) -> R {
        let _resting = self.queue.pulse().idle();
        self.wait_for(answer)
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        let mut core = lock(&self.core);
        if core.begin().is_none() {
            core.tell_time_of_day(host_unix_seconds());
        }
        core
    }

    /// Publishes what has changed and performs the effects.
    fn let_go(self: &Arc<Self>, core: MutexGuard<'_, Core>) {
        if self.publish(core) {
            self.perform_effects();
        }
    }

    /// Publishes what the vCPU thread must know before it releases the lock, then wakes waiting
    /// threads. Returns whether there are effects.
    fn publish(&self, mut core: MutexGuard<'_, Core>) -> bool {
        let roles = core.roles();
        if std::mem::replace(&mut core.roles, roles) != roles {
            self.roles_changed.store(true, Ordering::Release);
        }
        self.queue.set_unrecorded(core.is_unrecorded());
        let accepts = core.session().accepts_backup() || core.wants_connection();
        let (has_effects, is_waited_for) = (core.has_effects(), core.waiters > 0);
        drop(core);
        if is_waited_for {
            self.changed.notify_all();
        }
        let port = &self.port;
        if port.accepts.swap(accepts, Ordering::AcqRel) != accepts && accepts {
            let _ = port.joining.write(1);
        }
        has_effects
    }

    /// Wakes the waiting threads, because something outside the core changed.
    fn wake(self: &Arc<Self>) {
        self.let_go(self.lock());
    }

    /// Waits until the guest may start; an error says why it may not. `None` when the primary is
    /// gone before it welcomed this backup.
    ///
    /// # Errors
    /// The session's reason to stop.
    pub fn wait_for_begin(self: &Arc<Self>, role: Role) -> Result<Option<Begin>, StopReason> {
        self.wait_for(|core, _| match (core.stop(), core.begin()) {
            (Some(reason), _) => Some(Err(reason.clone())),
            (None, Some(begin)) => Some(Ok(Some(begin))),
            // A backup connects once; a primary waits for the next backup.
            (None, None) if role == Role::Backup && !core.is_connected() => Some(Ok(None)),
            (None, None) => None,
        })
    }

    /// Ends the session at the host's request, whatever it waits for.
    pub fn stop_now(self: &Arc<Self>) -> StopReason {
        self.step(SessionEvent::HostStop);
        self.wait_for_stop()
    }

    fn wait_for_stop(self: &Arc<Self>) -> StopReason {
        self.wait_for(|core, _| core.stop().cloned())
    }

    /// Why the session stopped, if it did.
    pub fn stopped(self: &Arc<Self>) -> Option<StopReason> {
        let reason = self.lock().stop().cloned();
        if reason.is_some() {
            self.finish_effects();
        }
        reason
    }

    /// True while inputs come from the other host's log.
    pub fn follows(&self) -> bool {
        self.lock().follows()
    }

    /// The user asked this host to stop: an active host ends it, one that follows
    /// leaves.
    pub fn stop_requested(self: &Arc<Self>) {
        // An active guest that has not come to the end of the other host's log sees neither its
        // power button nor an end. Asked again, the host does not wait for that.
        let was_asked = self.queue.is_ending();
        let speaks = self.tell(|core, now_ns| {
            let hangs = was_asked && core.follower().is_active();
            let speaks = core.begin().is_some() && !core.follows() && !hangs;
            if !speaks {
                core.step(now_ns, SessionEvent::HostStop);
            }
            speaks
        });
        if speaks {
            self.queue.shut_down();
        }
    }

    /// Clients reach this host, or do not any more.
    pub fn client_link(self: &Arc<Self>, up: bool) {
        self.tell(|core, now_ns| {
            if up {
                core.announce_guest();
            }
            core.step(now_ns, SessionEvent::ClientLink { up });
        });
    }

    /// Numbers for the report.
    pub fn counters(&self) -> PeerCounters {
        *self.lock().counters()
    }
}

#[cfg(test)]
pub(crate) mod tests;
