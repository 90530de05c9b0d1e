//! The other host: performs what the replication [`Session`] decides.
//!
//! ```text
//! vCPU thread    PeerLog, PeerOutputs, FollowInputs ─┐                      ┌─► channel, tap, witness
//!                                                    ├─► Session ─► actions ┤
//! host events    channel bytes, ticks, signals ──────┘                      └─► replay cursor, live queue
//! ```
//!
//! One lock holds the session and everything its actions touch, so actions are performed in the order in
//! which they were decided. Nothing under the lock blocks: the channel and the tap never do, what is logged
//! goes through a buffer, and the witness is asked and incident reports are written on threads of their own.

mod announce;
mod channel;
mod disk;
mod events;
mod incident;
mod inputs;
mod log;
mod operator;
mod outputs;
mod shipping;
mod state;
mod tail;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ftvmm_replication::session::incident::IncidentReport;
use ftvmm_replication::session::policy::{ReleasePolicy, Role, SessionConfigError, StopReason};
use ftvmm_replication::witness::{Claim, Witness};
use ftvmm_replication::{
    End, Event, Ordinal as ExitOrdinal, Record, Session, SessionConfig, SessionEvent, Term,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use announce::restored as announce_restored;
pub use channel::{Channel, ChannelError};
pub use events::ChannelEvents;
pub use inputs::PairInputs;
pub use log::PeerLog;
pub use operator::PeerOperator;
pub use outputs::PeerOutputs;
use state::State;

use crate::disk::Disk;
use crate::host::Tap;
use crate::host::clock::HostClock;
use crate::input::{LiveQueue, PulseWatch};
use crate::shipment::{Gauge, ProgressDisplay, Shipment, Shipped};

/// How long the end of a run waits for incident reports.
const REPORTS_LONGEST: Duration = Duration::from_secs(5);
/// Pause between two questions to a witness that does not answer.
const WITNESS_RETRY: Duration = Duration::from_millis(100);

/// Frames handed on in a message: of the greatest length they take 4 MiB.
const STRAYS_AT_ONCE: usize = 64;

/// What the session said at the guest's start.
#[derive(Clone, Copy, Debug)]
pub struct Begin {
    /// Unix time of power-on in seconds.
    pub rtc_epoch_s: u64,
    /// When frames leave.
    pub release: ReleasePolicy,
}

/// Numbers for the report.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerCounters {
    /// Frames the guest sent.
    pub outputs: u64,
    /// Bytes of finished log groups sent or received.
    pub log_bytes: u64,
    /// Digests of outputs sent or received.
    pub digests: u64,
    /// Divergences found.
    pub divergences: u64,
    /// Take-overs by this host.
    pub takeovers: u64,
    /// From the loss of the peer to the first live exit, in nanoseconds.
    pub takeover_ns: Option<u64>,
    /// Backups that got this host's state.
    pub attaches: u64,
    /// Longest time the guest stood still for one of them, in nanoseconds.
    pub attach_stopped_ns: Option<u64>,
    /// How the last of them went.
    pub last_attach: Option<Shipped>,
    /// Switches of roles, to and fro.
    pub switches: u64,
}

/// What a peer is made with.
pub struct PeerConfig {
    /// For the session.
    pub session: SessionConfig,
    /// Who decides which host is live.
    pub witness: Box<dyn Witness + Send>,
    /// How this host calls itself at the witness.
    pub holder: String,
    /// The guest's tap, if it has a network card.
    pub tap: Option<Tap>,
    /// The card's address, to be announced after a take-over.
    pub net_mac: Option<[u8; 6]>,
    /// Where live inputs wait.
    pub queue: Arc<LiveQueue>,
    /// The guest's disk, if it has one.
    pub disk: Option<Arc<Disk>>,
    /// This host leaves when its disk fails, rather than to tell the guest.
    pub disk_failover: bool,
    /// Longest time a horizon is held back while the guest makes exits, in nanoseconds.
    pub horizon_ns: u64,
    /// Folder for incident reports.
    pub incident_dir: PathBuf,
    /// Without a recording a host that is alone takes inputs between exits too.
    pub unrecorded_when_alone: bool,
    /// Where somebody sees how far a state on its way is.
    pub progress: Box<dyn ProgressDisplay>,
}

/// The session, its channel, and what waits for them.
pub struct Peer {
    state: Mutex<State>,
    changed: Condvar,
    witness: Mutex<Box<dyn Witness + Send>>,
    holder: String,
    queue: Arc<LiveQueue>,
    disk: Option<Arc<Disk>>,
    disk_failover: bool,
    incident_dir: PathBuf,
    clock: HostClock,
    heartbeat_ns: u64,
    /// Roles changed, or are to: the vCPU's thread looks at the state before it asks for inputs.
    turn: AtomicBool,
    /// Tells the host's event thread that a newcomer could be served.
    newcomers: EventFd,
    shipment: OnceLock<Arc<Shipment>>,
    /// Held by the thread that ships a state.
    ships: Mutex<()>,
    gauge: Gauge,
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
}

impl Peer {
    /// A peer that is not connected yet.
    ///
    /// # Errors
    /// When the session's configuration cannot work.
    pub fn new(config: PeerConfig) -> Result<Arc<Self>, PeerError> {
        let PeerConfig { session, witness, holder, tap, net_mac, queue, horizon_ns, .. } = config;
        let (role, heartbeat_ns) = (session.role, session.heartbeat_ns);
        let watch = PulseWatch::new(session.failure_ns);
        let session = Session::new(session)?;
        queue.set_closed(role == Role::Backup);
        let mut state = State::new(role, session, tap, net_mac, queue.clone(), horizon_ns);
        state.unrecorded_when_alone = config.unrecorded_when_alone;
        state.disk = config.disk.clone();
        state.watch = watch;
        let clock = HostClock::host_start();
        Ok(Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            witness: Mutex::new(witness),
            holder,
            queue,
            disk: config.disk,
            disk_failover: config.disk_failover,
            incident_dir: config.incident_dir,
            clock,
            heartbeat_ns,
            gauge: Gauge::new(clock, config.progress),
            turn: AtomicBool::new(false),
            newcomers: EventFd::new(EFD_NONBLOCK)?,
            shipment: OnceLock::new(),
            ships: Mutex::default(),
        }))
    }

    /// The guest's disk on this host.
    pub fn disk(&self) -> Option<Arc<Disk>> {
        self.disk.clone()
    }

    /// The clock all of the session's times are on.
    pub fn clock(&self) -> HostClock {
        self.clock
    }

    /// Tells the session what happened and performs what it decides.
    pub fn step(self: &Arc<Self>, event: SessionEvent) {
        let mut state = self.lock();
        self.step_locked(&mut state, event);
    }

    fn step_locked(self: &Arc<Self>, state: &mut State, event: SessionEvent) {
        state.step(self.clock.host_now_ns(), event);
        self.settle(state);
    }

    /// After the session's steps: sends what is to be sent, asks what is to be asked, wakes who waits.
    fn settle(self: &Arc<Self>, state: &mut State) {
        state.flush_channel();
        let takes_newcomers = state.session.takes_newcomers();
        if takes_newcomers && !std::mem::replace(&mut state.takes_newcomers, takes_newcomers) {
            let _ = self.newcomers.write(1);
        }
        state.takes_newcomers = takes_newcomers;
        if state.joining || state.follows() || state.yield_wanted {
            self.turn.store(true, Ordering::Release);
        }
        // Few enough for one message, whatever their length.
        let mut strays = std::mem::take(&mut state.strays_wait).into_iter().peekable();
        while strays.peek().is_some() {
            let some = strays.by_ref().take(STRAYS_AT_ONCE).collect();
            self.step_locked(state, SessionEvent::Strays(some));
        }
        if std::mem::take(&mut state.switch_wanted) {
            self.want_switch(state);
        }
        if std::mem::take(&mut state.ship_wanted) {
            self.ship(state.shipping.number);
        }
        for report in std::mem::take(&mut state.incidents) {
            self.keep(state, report);
        }
        for term in std::mem::take(&mut state.claims) {
            self.claim(term);
        }
        self.wake(state);
    }

    /// Wakes who is in [`Self::wait`]. To wake nobody would cost a system call too, at every message.
    fn wake(&self, state: &State) {
        if state.waiters > 0 {
            self.changed.notify_all();
        }
    }

    /// Writes an incident report on a thread of its own: its folder may be one that hangs.
    fn keep(self: &Arc<Self>, state: &mut State, report: IncidentReport) {
        let peer = Arc::clone(self);
        let write = move || {
            incident::keep(&peer.incident_dir, &report);
            peer.lock().incidents_under_way -= 1;
            peer.changed.notify_all();
        };
        state.incidents_under_way += 1;
        if let Err(error) = std::thread::Builder::new().name("incident".into()).spawn(write) {
            state.incidents_under_way -= 1;
            tracing::error!(%error, "no thread to keep an incident report");
        }
    }

    /// Waits until the incident reports are written, but not for a folder that hangs.
    pub fn finish_reports(&self) {
        let state = self.lock();
        let pending = |state: &mut State| state.incidents_under_way > 0;
        let waited = self.changed.wait_timeout_while(state, REPORTS_LONGEST, pending);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            tracing::error!("an incident report is not written yet; it is lost");
        }
    }

    /// Has the guest's thread let the roles change at its next exit.
    fn want_switch(&self, state: &mut State) {
        state.yield_wanted = true;
        self.turn.store(true, Ordering::Release);
        self.wake(state);
        self.queue.attend();
    }

    /// Asks the witness on a thread of its own, until it answers.
    fn claim(self: &Arc<Self>, term: Term) {
        let peer = Arc::clone(self);
        let ask = move || {
            loop {
                let mut witness = peer.witness.lock().unwrap_or_else(PoisonError::into_inner);
                match witness.claim(term, &peer.holder) {
                    Ok(claim) => {
                        if let Claim::Denied { current } = &claim {
                            tracing::warn!(%term, holder = current.holder, "the witness says no");
                        }
                        drop(witness);
                        let granted = claim == Claim::Granted;
                        return peer.step(SessionEvent::TermClaimed { term, granted });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the witness does not answer; asking again")
                    }
                }
                drop(witness);
                std::thread::sleep(WITNESS_RETRY);
            }
        };
        let started = std::thread::Builder::new().name("witness".into()).spawn(ask);
        if let Err(error) = started {
            tracing::error!(%error, "no thread to ask the witness; this host cannot become live");
        }
    }

    /// Waits until the guest may start; an error says why it may not. `None` when the primary is gone before
    /// it welcomed this backup.
    ///
    /// # Errors
    /// The session's reason to stop.
    pub fn wait_for_begin(&self, role: Role) -> Result<Option<Begin>, StopReason> {
        let mut state = self.lock();
        loop {
            match (&state.stop, state.begin) {
                (Some(reason), _) => return Err(reason.clone()),
                (None, Some(begin)) => return Ok(Some(begin)),
                // A backup connects once; a primary waits for the next backup.
                (None, None) if role == Role::Backup && state.channel.is_none() => return Ok(None),
                (None, None) => state = self.wait(state),
            }
        }
    }

    /// Tells the other host how the guest ended here and waits until both know. `at` is the first exit the
    /// guest did not get past.
    pub fn guest_ended(self: &Arc<Self>, at: ExitOrdinal, end: End) -> StopReason {
        let mut state = self.lock();
        if state.records_log() {
            state.log.push(&Record { at, event: Event::End(end) });
            state.unsent = true;
            self.send_log(&mut state);
        }
        let state_digest = end.state_digest;
        self.step_locked(&mut state, SessionEvent::GuestEnded { state_digest });
        self.wait_for_stop(state)
    }

    /// Tells the other host that this one cannot follow, and waits for what is decided; `None` when this host is to
    /// go on, with a state that is on its way or with its own.
    fn report_fault(self: &Arc<Self>, description: String) -> Option<StopReason> {
        let mut state = self.lock();
        tracing::error!(description, "this host cannot follow the log");
        state.faulted = true;
        self.step_locked(&mut state, SessionEvent::ReplayFault { description });
        loop {
            match &state.stop {
                Some(reason) => return Some(reason.clone()),
                None if state.joining || !state.follows() => return None,
                None => state = self.wait_as_guest(state),
            }
        }
    }

    /// As [`Self::report_fault`], for a run that cannot be gone on with.
    pub fn fault(self: &Arc<Self>, description: String) -> StopReason {
        match self.report_fault(description) {
            Some(reason) => reason,
            None => self.stop_now(),
        }
    }

    /// Ends the session at the host's request, whatever it waits for.
    pub fn stop_now(self: &Arc<Self>) -> StopReason {
        let mut state = self.lock();
        self.step_locked(&mut state, SessionEvent::HostStop);
        self.wait_for_stop(state)
    }

    /// True while inputs come from the other host's log.
    pub fn follows(&self) -> bool {
        self.lock().follows()
    }

    fn wait_for_stop(&self, mut state: MutexGuard<'_, State>) -> StopReason {
        loop {
            match &state.stop {
                Some(reason) => return reason.clone(),
                None => state = self.wait(state),
            }
        }
    }

    /// Why the session stopped, if it did.
    pub fn stopped(&self) -> Option<StopReason> {
        self.lock().stop.clone()
    }

    /// The user asked this host to stop: a host that speaks for the guest ends it, one that follows leaves.
    pub fn host_stop(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.begin.is_some() && !state.follows() {
            drop(state);
            self.queue.shut_down();
        } else {
            self.step_locked(&mut state, SessionEvent::HostStop);
        }
    }

    /// A frame for the guest came here although the other host speaks for it.
    pub fn stray(self: &Arc<Self>, frame: Vec<u8>) {
        let mut state = self.lock();
        if state.is_stray(self.clock.host_now_ns(), &frame) {
            self.step_locked(&mut state, SessionEvent::Strays(vec![frame]));
        } else {
            self.queue.network().follower_dropped();
        }
    }

    /// Clients reach this host, or do not any more.
    pub fn client_link(self: &Arc<Self>, up: bool) {
        let mut state = self.lock();
        if up {
            state.guest_is_here();
        }
        self.step_locked(&mut state, SessionEvent::ClientLink { up });
    }

    /// Numbers for the report.
    pub fn counters(&self) -> PeerCounters {
        self.lock().counters
    }

    /// Sends what the backup may not know yet: the records since the last time, and how far they are complete.
    fn send_log(self: &Arc<Self>, state: &mut State) {
        if !std::mem::take(&mut state.unsent) || !state.records_log() {
            return;
        }
        let bytes = state.log.finish(state.horizon);
        state.counters.log_bytes += bytes.len() as u64;
        state.unsent_since_ns = None;
        state.client_waits = false;
        state.log_sent_ns = self.clock.host_now_ns();
        state.sent_horizon = state.horizon;
        self.step_locked(state, SessionEvent::Group { bytes });
        let cost_ns = self.clock.host_now_ns() - state.log_sent_ns;
        state.send_cost_ns = (state.send_cost_ns * 7 + cost_ns) / 8;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::wait`], on the vCPU's thread: whoever waits for the other host is not held by this one.
    fn wait_as_guest<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let _resting = self.queue.pulse().rest();
        self.wait(state)
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiters += 1;
        let mut state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiters -= 1;
        state
    }
}
