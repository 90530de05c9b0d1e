//! The role state machine: who may be active, and which frames may leave.
//!
//! Sans I/O: events and the time go in, actions come out. `ftvmm-runtime` performs them over TCP;
//! the tests perform them in memory under a seeded schedule of delays, crashes and partitions.
//!
//! ```text
//! primary  AwaitingBackup → ClaimingFirstTerm → AwaitingReady → Beginning
//!               ↑______________________|_______________|__________|  ↓
//!                                                               Protected ────────→ Stopped
//!                                                           ↑   │ ↘ AwaitingEvidence ↗ │
//!                                                   Attaching   ↓        ↓             ↑
//!                                                           ↑  ClaimingTerm ──→ Alone ─┘
//!                                                           └────────────────────┘
//! backup   AwaitingWelcome → Following ──→ ClaimingTerm ──→ Live ──→ primary, Alone
//!                      ↘ Joining ↗  ↘ AwaitingVerdict ──→ Stopped
//! ```
//! A backup that took over becomes a primary that is alone; a primary that yields becomes the
//! backup of its backup (Yielding → Following).
//!
//! Invariants, asserted after every step: frames leave in order and each once; none leaves before
//! its release rule holds, unless this side won a term of its own; a side that releases on its own
//! is not connected to a peer that follows or leads it.
//!
//! What the gate holds leaves in [`Session::release`] alone, and only within the backup's lease:
//! this host may have stood still since the last step, and another may be active.

mod backup;
mod broken;
mod client_links;
pub mod decision;
mod event;
mod flush_gate;
mod lease;
mod log_window;
mod primary;
mod visitor;

pub use event::{Action, DisconnectReason, SessionEvent};

use crate::policy::{Refusal, Role, SessionConfig, SessionConfigError, StopReason};
use backup::Backup;
use client_links::ClientLinks;
use decision::{Decision, Situation, Trouble, decide};
use primary::Primary;

use crate::message::{ByeReason, Message};
use crate::record::Term;

/// The connection to the peer, as far as timers need it.
#[derive(Clone, Debug, Default)]
struct Link {
    connected: bool,
    last_sent_ns: u64,
    last_heard_ns: u64,
    /// Until then a primary may release what this side, its backup, has let go.
    promised_until_ns: u64,
}

/// What a state waits for in time.
struct Waits {
    /// Silence after which the peer is lost.
    silence_limit_ns: u64,
    /// Whether the peer expects heartbeats.
    heartbeats: bool,
    /// Deadline of the state itself.
    deadline_ns: Option<u64>,
    /// When a lease is to be asked for.
    renews_ns: Option<u64>,
}

/// What a handler may read and do.
struct Context<'a> {
    config: &'a SessionConfig,
    now_ns: u64,
    link: &'a mut Link,
    actions: &'a mut Vec<Action>,
    stopped: bool,
}

impl<'a> Context<'a> {
    fn new(
        config: &'a SessionConfig,
        now_ns: u64,
        link: &'a mut Link,
        actions: &'a mut Vec<Action>,
    ) -> Self {
        Self { config, now_ns, link, actions, stopped: false }
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn send(&mut self, message: Message) {
        assert!(self.link.connected, "{} has nowhere to go", message.name());
        // Heartbeat and Ack say more than that the sender is alive: a lease does not replace them.
        if !matches!(message, Message::LeaseRequest { .. } | Message::LeaseGrant { .. }) {
            self.link.last_sent_ns = self.now_ns;
        }
        self.act(Action::Send(message));
    }

    fn hang_up(&mut self) {
        if core::mem::take(&mut self.link.connected) {
            self.act(Action::HangUp);
        }
    }

    fn stop(&mut self, reason: StopReason) {
        self.stopped = true;
        self.act(Action::Stop(reason));
    }

    fn decide(&mut self, situation: Situation, trouble: Trouble, detail: &str) -> Decision {
        let row = decide(situation, trouble);
        self.act(Action::Decided { row, detail: detail.to_owned() });
        row.decision
    }

    fn send_hello(&mut self, runs: bool) {
        let SessionConfig { role, build, fingerprint, highest_term, .. } = self.config.clone();
        self.send(Message::Hello { role, build, fingerprint, highest_term, runs });
    }

    /// Tells the peer that the two cannot run together, and stops.
    fn refuse(&mut self, refusal: Refusal) {
        self.send(Message::Refuse { refusal: refusal.clone() });
        self.stop(StopReason::BadConfiguration(refusal));
    }

    /// A joining backup finds a guest that runs. It is refused; the guest goes on.
    fn refuse_joining(&mut self, message: &Message, term: Term) {
        if matches!(message, Message::Hello { .. }) {
            self.send(Message::Refuse { refusal: Refusal::AlreadyRunning { term } });
        }
        self.hang_up();
    }

    /// What the peer's hello forbids, if anything. The disk of a guest that `runs` here need not be
    /// the peer's: it will be copied, one way or the other.
    fn check_hello(&self, hello: &Message, runs_here: bool) -> Option<Refusal> {
        let Message::Hello { role, build, fingerprint, runs, .. } = hello else {
            return None;
        };
        if *role == self.config.role {
            return Some(Refusal::SameRole { role: *role });
        }
        if *build != self.config.build {
            let (ours, theirs) = (self.config.build.clone(), build.clone());
            return Some(Refusal::Build { ours, theirs });
        }
        let mut own = self.config.fingerprint.clone();
        if runs_here || *runs {
            own.disk_sha256 = fingerprint.disk_sha256;
        }
        own.first_difference(fingerprint).map(Refusal::Fingerprint)
    }

    /// How long the peer has been silent, when that is too long.
    fn silence_ns(&self, waits: &Waits) -> Option<u64> {
        let silent_ns = self.now_ns - self.link.last_heard_ns;
        (self.link.connected && silent_ns >= waits.silence_limit_ns).then_some(silent_ns)
    }

    fn heartbeat_is_due(&self, waits: &Waits) -> bool {
        let quiet_ns = self.now_ns - self.link.last_sent_ns;
        self.link.connected && waits.heartbeats && quiet_ns >= self.config.heartbeat_ns
    }
}

#[derive(Clone, Debug)]
enum RoleState {
    Primary(Box<Primary>),
    Backup(Box<Backup>),
    Stopped,
}

impl RoleState {
    /// Tells the peer of this host's way to the clients while one follows the other, and changes
    /// the roles for it.
    fn serve_client_links(&self, links: &mut ClientLinks, cx: &mut Context<'_>) {
        let converses = match self {
            Self::Primary(primary) => primary.is_followed(),
            Self::Backup(backup) => backup.is_protected(),
            Self::Stopped => false,
        };
        if !converses || !cx.link.connected {
            return;
        }
        links.tell(cx);
        if matches!(self, Self::Primary(primary) if primary.is_protected()) {
            links.ask_for_switch(cx);
        }
    }
}

/// The role state machine of one host. See the module documentation.
#[derive(Clone, Debug)]
pub struct Session {
    config: SessionConfig,
    now_ns: u64,
    link: Link,
    client_links: ClientLinks,
    state: RoleState,
    /// [`Self::release`] has something to do, if the lease allows it.
    release_due: bool,
}

impl Session {
    /// A session that waits for its peer.
    ///
    /// # Errors
    /// [`SessionConfigError`] when the configuration cannot work.
    pub fn new(config: SessionConfig) -> Result<Self, SessionConfigError> {
        config.check()?;
        let state = match config.role {
            Role::Primary => RoleState::Primary(Box::new(Primary::new(&config))),
            Role::Backup => RoleState::Backup(Box::new(Backup::new(&config))),
        };
        let (link, client_links) = (Link::default(), ClientLinks::default());
        Ok(Self { config, now_ns: 0, link, client_links, state, release_due: false })
    }

    /// Takes an event and appends what to do. `now_ns` is the host's clock, which never goes back
    /// and counts while the host is suspended.
    ///
    /// # Panics
    /// When an invariant does not hold: the process must die rather than release a frame.
    pub fn step(&mut self, now_ns: u64, event: SessionEvent, actions: &mut Vec<Action>) {
        self.pass_time(now_ns);
        let mut cx = Context::new(&self.config, self.now_ns, &mut self.link, actions);
        match &event {
            SessionEvent::Connected => {
                assert!(!cx.link.connected, "a second connection");
                self.client_links.forget_peer();
                *cx.link = Link {
                    connected: true,
                    last_sent_ns: cx.now_ns,
                    last_heard_ns: cx.now_ns,
                    ..Link::default()
                };
            }
            SessionEvent::Received(_) | SessionEvent::Disconnected { .. } if !cx.link.connected => {
                return;
            }
            SessionEvent::Received(message) => {
                cx.link.last_heard_ns = cx.now_ns;
                if let Message::ClientLink { up } = message {
                    self.client_links.on_peer(*up);
                }
            }
            SessionEvent::Disconnected { .. } => cx.link.connected = false,
            SessionEvent::ClientLink { up } => self.client_links.on_own(*up, cx.now_ns),
            _ => {}
        }
        match &mut self.state {
            // The link states are handled in every phase.
            _ if matches!(event, SessionEvent::Received(Message::ClientLink { .. })) => {}
            RoleState::Primary(primary) => primary.step(&mut cx, event),
            RoleState::Backup(backup) => backup.step(&mut cx, event),
            RoleState::Stopped => {}
        }
        if !cx.stopped {
            self.state.serve_client_links(&mut self.client_links, &mut cx);
        }
        let stopped = cx.stopped;
        match &mut self.state {
            _ if stopped => self.state = RoleState::Stopped,
            RoleState::Backup(backup) => {
                backup.adopt(&mut self.config);
                if let Some(primary) = backup.take_successor() {
                    self.config.role = Role::Primary;
                    self.state = RoleState::Primary(primary);
                }
            }
            RoleState::Primary(primary) => {
                if let Some(backup) = primary.take_successor() {
                    self.config.role = Role::Backup;
                    self.state = RoleState::Backup(backup);
                }
            }
            RoleState::Stopped => {}
        }
        self.release_due =
            matches!(&self.state, RoleState::Primary(primary) if primary.has_release());
        self.invariants();
    }

    /// All that decides what this session does, apart from its configuration, to be printed: two
    /// sessions of one configuration that print the same do the same.
    pub fn state(&self) -> impl core::fmt::Debug + '_ {
        let Self { config: _, now_ns, link, client_links, state, release_due } = self;
        (now_ns, link, client_links, state, release_due)
    }

    /// Whether frames or completed flushes wait that may be released, if the lease allows it: then
    /// [`Self::release`] is to be called.
    #[must_use]
    pub fn has_release(&self) -> bool {
        self.release_due
    }

    /// Appends what a primary that is followed may release now: frames, completed flushes, and what
    /// waited until all frames have left. `now_ns` is read right before the actions are carried out
    /// and after everything that has come was passed to [`Self::step`]; the host's clock counts
    /// while the host is suspended.
    ///
    /// # Panics
    /// As [`Self::step`].
    pub fn release(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        if !core::mem::take(&mut self.release_due) {
            return;
        }
        self.pass_time(now_ns);
        let RoleState::Primary(primary) = &mut self.state else { return };
        let mut cx = Context::new(&self.config, self.now_ns, &mut self.link, actions);
        primary.release_gated(&mut cx);
        if cx.stopped {
            self.state = RoleState::Stopped;
        }
        self.invariants();
    }

    /// Whether the network may hear of this host at `now_ns`: no other host is active then.
    #[must_use]
    pub fn may_speak(&self, now_ns: u64) -> bool {
        match &self.state {
            RoleState::Primary(primary) => primary.may_speak(now_ns),
            RoleState::Backup(backup) => backup.is_live(),
            RoleState::Stopped => false,
        }
    }

    /// Whether the guest's clients reach this host, and the other as far as it has said while it
    /// is connected.
    #[must_use]
    pub fn client_links(&self) -> (bool, Option<bool>) {
        let peer_up = self.link.connected.then_some(self.client_links.peer_up());
        (self.client_links.own_up(), peer_up)
    }

    /// What time it is. It becomes the guest's time of day at power-on: a primary offers it to its
    /// first backup, or goes alone with it.
    pub fn tell_time_of_day(&mut self, unix_s: u64) {
        if matches!(&self.state, RoleState::Primary(primary) if primary.has_not_begun()) {
            self.config.rtc_epoch_s = unix_s;
        }
    }

    /// The part this host plays now.
    #[must_use]
    pub fn role(&self) -> Role {
        self.config.role
    }

    /// The highest term known; ours when this host is active.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        match &self.state {
            RoleState::Primary(primary) => Some(primary.term()),
            RoleState::Backup(backup) => Some(backup.term()),
            RoleState::Stopped => None,
        }
    }

    /// Whether a joining backup may connect now: no peer is connected, and the state allows it.
    #[must_use]
    pub fn accepts_backup(&self) -> bool {
        let has_time = match &self.state {
            RoleState::Primary(primary) => primary.accepts_backup(),
            RoleState::Backup(_) | RoleState::Stopped => false,
        };
        has_time && !self.link.connected
    }

    /// Whether a backup is being sent the state.
    #[must_use]
    pub fn is_attaching(&self) -> bool {
        matches!(&self.state, RoleState::Primary(primary) if primary.is_attaching())
    }

    /// Whether this host may ask its backup to take over now.
    #[must_use]
    pub fn may_yield(&self) -> bool {
        matches!(&self.state, RoleState::Primary(primary) if primary.is_protected())
    }

    /// If [`Self::step`] is called late, the lateness is a pause of this host and must not count as
    /// the peer's silence: what the peer sent meanwhile waits behind this event.
    fn pass_time(&mut self, now_ns: u64) {
        let now_ns = now_ns.max(self.now_ns);
        if let Some(deadline_ns) = self.next_deadline_ns() {
            self.link.last_heard_ns += now_ns.saturating_sub(deadline_ns.max(self.now_ns));
        }
        self.now_ns = now_ns;
    }

    /// When the next [`SessionEvent::Tick`] is due, on the clock of [`Self::step`]; `None` while
    /// nothing waits for time to pass.
    #[must_use]
    pub fn next_deadline_ns(&self) -> Option<u64> {
        let waits = match &self.state {
            RoleState::Primary(primary) => primary.waits(&self.config),
            RoleState::Backup(backup) => backup.waits(&self.config),
            RoleState::Stopped => return None,
        };
        let switch = self.client_links.deadline_ns(&self.config).filter(|_| self.may_yield());
        let Link { connected, last_sent_ns, last_heard_ns, .. } = self.link;
        let silence = connected.then_some(last_heard_ns + waits.silence_limit_ns);
        let heartbeat =
            (connected && waits.heartbeats).then_some(last_sent_ns + self.config.heartbeat_ns);
        let renewal = waits.renews_ns.filter(|_| connected);
        [silence, heartbeat, waits.deadline_ns, renewal, switch].into_iter().flatten().min()
    }

    /// Exits the backup was sent and has not executed, as far as the primary knows; 0 elsewhere.
    #[must_use]
    pub fn lag_exits(&self) -> u64 {
        match &self.state {
            RoleState::Primary(primary) => primary.lag_exits(),
            RoleState::Backup(_) | RoleState::Stopped => 0,
        }
    }

    /// Whether the session is over.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, RoleState::Stopped)
    }

    /// The state in a word, for logs and metrics.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match &self.state {
            RoleState::Primary(primary) => primary.state_name(),
            RoleState::Backup(backup) => backup.state_name(),
            RoleState::Stopped => "Stopped",
        }
    }

    /// True while the loss of the active host would cost nothing.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        match &self.state {
            RoleState::Primary(primary) => primary.is_protected(),
            RoleState::Backup(backup) => backup.is_protected(),
            RoleState::Stopped => false,
        }
    }

    /// Whether this host takes over because the other asked for it, and the other will follow.
    #[must_use]
    pub fn takes_over_by_switch(&self) -> bool {
        matches!(&self.state, RoleState::Backup(backup) if backup.is_followed())
    }

    /// Whether the guest stands still because the backup was asked to take over.
    #[must_use]
    pub fn is_yielding(&self) -> bool {
        matches!(&self.state, RoleState::Primary(primary) if primary.is_yielding())
    }

    fn invariants(&self) {
        match &self.state {
            RoleState::Primary(primary) => primary.invariants(self.link.connected),
            RoleState::Backup(backup) => backup.invariants(self.link.connected),
            RoleState::Stopped => {}
        }
    }
}

/// A host without a disk or a guest hangs up without Bye, so that its peer takes it for dead.
fn leave(cx: &mut Context<'_>, reason: StopReason) {
    cx.hang_up();
    cx.stop(reason);
}

/// The goodbye of a host that was asked to stop, if there is anyone to tell.
fn stop_on_request(cx: &mut Context<'_>, term: Term) {
    if cx.link.connected {
        cx.send(Message::Bye { term, reason: ByeReason::HostRequest });
    }
    cx.stop(StopReason::HostRequest);
}

#[cfg(test)]
mod tests;
