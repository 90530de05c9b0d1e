//! What lies under the peer's lock: the session and everything its actions touch.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use ftvmm_replication::session::incident::IncidentReport;
use ftvmm_replication::session::policy::{Role, StopReason};
use ftvmm_replication::wire::{self, Decoder};
use ftvmm_replication::{
    Action, DisconnectReason, Event, GroupEncoder, Message, Ordinal, ReplayCursor, Session,
    SessionEvent, StatePart, Term, decode_group,
};

use super::announce::{self, Announcer};
use super::channel::Channel;
use super::{Begin, PeerCounters};
use crate::disk::Disk;
use crate::host::clock::host_unix_seconds;
use crate::host::{Tap, VNET_HEADER_BYTES};
use crate::input::{LiveQueue, PulseWatch};
use crate::run_loop::StopCause;

/// Bytes of the channel that are handed on before timers, signals and the guest have their turn.
const TURN_BYTES: usize = 256 << 10;

/// How long after a switch of roles the network may send the guest's frames to its old place.
const STRAYS_NS: u64 = 1_000_000_000;

/// Where inputs come from and whether they are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// From this host; nobody follows.
    Alone,
    /// From this host, and to the backup.
    Recording,
    /// From the other host.
    Following,
}

/// A state under way, as the sender counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shipping {
    /// Which one: a newer one ends those before it.
    pub number: u64,
    /// Bytes of parts handed to the channel.
    pub sent_bytes: u64,
    /// Bytes the backup has put in place.
    pub taken_bytes: u64,
}

pub struct State {
    mode: Mode,
    pub session: Session,
    pub channel: Option<Channel>,
    pub decoder: Decoder,
    /// Primary: records since the last group, how far they are complete, and whether anything is unsent.
    pub log: GroupEncoder,
    pub horizon: Ordinal,
    pub unsent: bool,
    /// When the guest left the first exit of which the backup does not know.
    pub unsent_since_ns: Option<u64>,
    /// Something from outside is unsent.
    pub client_waits: bool,
    pub log_sent_ns: u64,
    pub sent_horizon: Ordinal,
    pub horizon_ns: u64,
    /// What sending a group costs this host, smoothed, in nanoseconds.
    pub send_cost_ns: u64,
    /// The timer that sends the tail of a burst is running.
    pub tail_armed: bool,
    /// Backup: the log as received.
    pub cursor: ReplayCursor,
    /// Backup: a whole state is to be put in place first; the parts of it that have come.
    pub joining: bool,
    pub incoming: VecDeque<StatePart>,
    pub taken_bytes: u64,
    /// The state on its way to the backup, and one that is to be sent.
    pub shipping: Shipping,
    pub ship_wanted: bool,
    /// Where backups are to knock from now on.
    pub new_listener: Option<TcpListener>,
    /// Where backups knock.
    pub listens_at: Option<SocketAddr>,
    /// A newcomer could be served.
    pub takes_newcomers: bool,
    /// The other host is to speak for the guest: the session wants it, or the guest is waited for already.
    pub switch_wanted: bool,
    pub yield_wanted: bool,
    pub begin: Option<Begin>,
    pub stop: Option<StopReason>,
    /// The guest must wait at its exit.
    pub congested: bool,
    /// Terms to be asked for.
    pub claims: Vec<Term>,
    pub counters: PeerCounters,
    /// Reports to be written once the lock is free, and how many are being written.
    pub incidents: Vec<IncidentReport>,
    pub incidents_under_way: u32,
    pub unrecorded_when_alone: bool,
    /// Frames are handed on that come here until then, and those that waited.
    pub strays_until_ns: u64,
    pub strays_wait: Vec<Vec<u8>>,
    /// Backup: the guest has left the path of the log.
    pub faulted: bool,
    /// Threads in [`super::Peer::wait`].
    pub waiters: u32,
    /// Looks whether the guest's thread comes round.
    pub watch: PulseWatch,
    /// When the peer was lost, on the peer's clock.
    pub lost_ns: Option<u64>,
    pub tap: Option<Tap>,
    net_mac: Option<[u8; 6]>,
    pub queue: Arc<LiveQueue>,
    pub disk: Option<Arc<Disk>>,
    announcer: Announcer,
    now_ns: u64,
}

impl State {
    pub fn new(
        role: Role,
        session: Session,
        tap: Option<Tap>,
        net_mac: Option<[u8; 6]>,
        queue: Arc<LiveQueue>,
        horizon_ns: u64,
    ) -> Self {
        let mode = match role {
            Role::Primary => Mode::Recording,
            Role::Backup => Mode::Following,
        };
        Self {
            mode,
            session,
            channel: None,
            decoder: Decoder::new(),
            log: GroupEncoder::new(),
            horizon: Ordinal(0),
            unsent: false,
            unsent_since_ns: None,
            client_waits: false,
            log_sent_ns: 0,
            sent_horizon: Ordinal(0),
            horizon_ns,
            send_cost_ns: 0,
            tail_armed: false,
            cursor: ReplayCursor::new(),
            joining: false,
            incoming: VecDeque::new(),
            taken_bytes: 0,
            shipping: Shipping::default(),
            ship_wanted: false,
            new_listener: None,
            listens_at: None,
            takes_newcomers: false,
            switch_wanted: false,
            yield_wanted: false,
            begin: None,
            stop: None,
            congested: false,
            claims: Vec::new(),
            counters: PeerCounters::default(),
            incidents: Vec::new(),
            incidents_under_way: 0,
            unrecorded_when_alone: false,
            strays_until_ns: 0,
            strays_wait: Vec::new(),
            faulted: false,
            waiters: 0,
            watch: PulseWatch::new(u64::MAX),
            lost_ns: None,
            tap,
            net_mac,
            queue,
            disk: None,
            announcer: Announcer::default(),
            now_ns: 0,
        }
    }

    /// True while the log goes somewhere.
    pub fn records_log(&self) -> bool {
        self.mode == Mode::Recording
    }

    /// True while inputs come from the other host's log.
    pub fn follows(&self) -> bool {
        self.mode == Mode::Following
    }

    /// True while a whole state comes or goes.
    pub fn is_transferring(&self) -> bool {
        self.joining || self.session.is_attaching()
    }

    /// A connection stands.
    pub fn connect(&mut self, now_ns: u64, mut channel: Channel) {
        channel.outgoing().extend_from_slice(&wire::PREAMBLE);
        self.channel = Some(channel);
        self.decoder = Decoder::new();
        self.step(now_ns, SessionEvent::Connected);
    }

    /// Hands what arrived to the session, but about [`TURN_BYTES`] at most; whether there may be more. A peer that
    /// sends faster than this host takes would keep everybody else waiting, and be told nothing.
    pub fn receive(&mut self, now_ns: u64) -> bool {
        let mut taken_bytes = 0;
        while taken_bytes < TURN_BYTES {
            let Some(channel) = &mut self.channel else { return false };
            match channel.receive() {
                Ok(None) => return false,
                Ok(Some([])) => self.disconnect(now_ns, DisconnectReason::Closed),
                Ok(Some(bytes)) => {
                    taken_bytes += bytes.len();
                    self.decoder.push(bytes);
                    self.take_messages(now_ns);
                }
                Err(e) => {
                    let description = e.to_string();
                    self.disconnect(now_ns, DisconnectReason::Transport { description });
                }
            }
        }
        true
    }

    fn take_messages(&mut self, now_ns: u64) {
        loop {
            match self.decoder.next_message() {
                Ok(Some(message)) => {
                    self.count(&message);
                    self.step(now_ns, SessionEvent::Received(message));
                }
                Ok(None) => return,
                Err(error) => return self.disconnect(now_ns, DisconnectReason::Wire(error)),
            }
        }
    }

    pub fn disconnect(&mut self, now_ns: u64, reason: DisconnectReason) {
        // Closed when that is logged.
        if let Some(_closed) = self.channel.take() {
            tracing::warn!(%reason, "the channel to the other host is gone");
            self.step(now_ns, SessionEvent::Disconnected { reason });
        }
    }

    /// Sends what the socket takes; the rest goes when it can be written again.
    pub fn flush_channel(&mut self) {
        let Some(channel) = &mut self.channel else { return };
        if let Err(e) = channel.flush() {
            let description = e.to_string();
            self.disconnect(self.now_ns, DisconnectReason::Transport { description });
        }
    }

    /// Tells the session and performs what it decides, in order.
    pub fn step(&mut self, now_ns: u64, event: SessionEvent) {
        self.now_ns = now_ns;
        if let SessionEvent::Output { .. } = event {
            self.counters.outputs += 1;
        }
        if self.begin.is_none() {
            self.session.tell_time_of_day(host_unix_seconds());
        }
        let mut actions = Vec::new();
        self.session.step(now_ns, event, &mut actions);
        for action in actions {
            self.perform(action);
        }
    }

    fn count(&mut self, message: &Message) {
        self.counters.digests += u64::from(matches!(message, Message::Digest { .. }));
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Send(message) => {
                self.count(&message);
                if let Some(channel) = &mut self.channel {
                    wire::encode(&message, channel.outgoing());
                }
            }
            Action::Transmit(frame) => self.transmit(&frame),
            Action::ClaimTerm(term) => {
                self.lost_ns.get_or_insert(self.now_ns);
                self.claims.push(term);
            }
            Action::Begin { term, rtc_epoch_s, release } => {
                tracing::info!(%term, ?release, "the guest starts in lockstep");
                self.begin = Some(Begin { rtc_epoch_s, release });
                if self.session.role() == Role::Primary {
                    // The switches may know its addresses behind another host.
                    self.announcer.start(self.now_ns);
                }
                self.lost_ns = None;
            }
            Action::DeliverGroup(bytes) => self.deliver(&bytes),
            Action::GoLive { term } => {
                tracing::warn!(%term, "this host takes over");
                self.cursor.seal();
                self.queue.kick_vcpu();
                self.counters.takeovers += 1;
                self.be_alone();
                // What a guest that left the log's path may not consume any more.
                if std::mem::take(&mut self.faulted) {
                    self.cursor = ReplayCursor::new();
                    self.cursor.seal();
                }
                self.announcer.start(self.now_ns);
                self.announce(self.now_ns);
            }
            Action::GoAlone { term } => {
                tracing::warn!(%term, "this host goes on alone");
                self.be_alone();
            }
            Action::ShipState => {
                self.be_alone();
                let number = self.shipping.number + 1;
                self.shipping = Shipping { number, ..Shipping::default() };
                self.counters.last_attach = None;
                self.ship_wanted = true;
            }
            Action::StateTaken { taken_bytes } => self.shipping.taken_bytes = taken_bytes,
            Action::Protect { at } => {
                tracing::info!(%at, "the guest is protected");
                self.mode = Mode::Recording;
                self.start_log(Ordinal(at.0.saturating_sub(1)));
                self.queue.set_unrecorded(false);
                self.lost_ns = None;
            }
            Action::Join { release } => {
                self.mode = Mode::Following;
                self.joining = true;
                self.faulted = false;
                self.incoming.clear();
                self.taken_bytes = 0;
                self.cursor = ReplayCursor::new();
                self.queue.set_closed(true);
                self.begin.get_or_insert(Begin { rtc_epoch_s: 0, release });
                self.queue.kick_vcpu();
                self.queue.attend();
            }
            Action::TakeState(part) => self.incoming.push_back(part),
            Action::Follow { term, through } => {
                tracing::warn!(%term, "the other host speaks for the guest now");
                self.counters.switches += 1;
                self.mode = Mode::Following;
                self.cursor = ReplayCursor::starting_at(through);
                let was_ending = self.queue.set_closed(true);
                self.strays_until_ns = self.now_ns + STRAYS_NS;
                let frames = self.queue.take_frames();
                self.strays_wait.extend(frames);
                if was_ending {
                    self.step(self.now_ns, SessionEvent::HostStop);
                }
            }
            // The run loop reports when the guest stands still.
            Action::SwitchRoles => self.switch_wanted = true,
            Action::Receive(frames) => {
                for frame in frames {
                    if self.queue.push_frame(frame).is_some() {
                        self.queue.network().follower_dropped();
                    }
                }
            }
            Action::Incident(report) => {
                self.counters.divergences += 1;
                self.incidents.push(*report);
            }
            Action::Congested(congested) => self.congested = congested,
            Action::TellFlushes { through } => self.tell_flushes(through),
            Action::TellDisk { id } => self.tell_disk(id),
            Action::HangUp => {
                self.flush_channel();
                self.channel = None;
            }
            Action::Decided { row, detail } => {
                tracing::warn!(row = %row.letter, decision = ?row.decision, detail, reason = row.reason);
            }
            Action::Stop(reason) => {
                tracing::info!(%reason, "the session is over");
                self.stop = Some(reason);
                // Twice: wherever the guest is, it must not run on.
                self.queue.stop(StopCause::Protocol);
                self.queue.stop(StopCause::Protocol);
            }
        }
    }

    /// A log that begins after exit `through`.
    fn start_log(&mut self, through: Ordinal) {
        self.log = GroupEncoder::new();
        (self.horizon, self.sent_horizon) = (through, through);
        self.unsent = false;
        self.unsent_since_ns = None;
        self.client_waits = false;
    }

    fn be_alone(&mut self) {
        self.mode = Mode::Alone;
        self.congested = false;
        self.queue.set_closed(false);
        self.queue.set_unrecorded(self.unrecorded_when_alone);
    }

    fn deliver(&mut self, bytes: &[u8]) {
        self.counters.log_bytes += bytes.len() as u64;
        let delivered = decode_group(bytes).map_err(|e| e.to_string()).and_then(|group| {
            let has_slice = group.records.iter().any(|r| matches!(r.event, Event::Slice(_)));
            self.cursor.push_group(group).map_err(|e| e.to_string())?;
            // The guest may be computing past that point.
            if has_slice {
                self.queue.kick_vcpu();
            }
            Ok(())
        });
        if let Err(description) = delivered {
            self.step(self.now_ns, SessionEvent::ReplayFault { description });
        }
    }

    fn transmit(&self, frame: &[u8]) {
        let Some(tap) = &self.tap else { return };
        let taken = tap.write_frame(frame).unwrap_or_else(|error| {
            tracing::error!(%error, "the tap does not take a frame");
            false
        });
        if !taken {
            self.queue.network().tap_dropped();
        }
    }

    /// The guest makes its first live exit.
    pub fn took_over(&mut self, now_ns: u64) {
        if self.session.is_protected() {
            // Planned: the old primary follows.
            self.counters.takeovers -= 1;
            self.counters.switches += 1;
            return;
        }
        self.counters.takeover_ns = self.lost_ns.map(|lost_ns| now_ns - lost_ns);
    }

    /// Clients reach the guest on this host from now on, or again: the switches may know it elsewhere.
    pub fn guest_is_here(&mut self) {
        if !self.follows() {
            self.announcer.start(self.now_ns);
        }
    }

    /// Whether the network sent this frame to the guest's old place. What is for everybody has reached the new one too.
    pub fn is_stray(&self, now_ns: u64, frame: &[u8]) -> bool {
        if now_ns >= self.strays_until_ns {
            return false;
        }
        frame.get(VNET_HEADER_BYTES..VNET_HEADER_BYTES + 6).is_some_and(|destination| {
            self.net_mac.is_some_and(|mac| mac == *destination)
                || self.queue.network().sources().has_mac(destination)
        })
    }

    /// Makes the next announcement of the guest, if one is due.
    pub fn announce(&mut self, now_ns: u64) {
        let Some(mac) = self.net_mac else { return };
        if self.announcer.is_due(now_ns) {
            announce::announce(mac, &self.queue, |frame| self.transmit(frame));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpStream;
    use std::time::Duration;

    use ftvmm_devices::{NetCounters, NetSource, NetSources};
    use ftvmm_replication::SessionConfig;

    use super::*;
    use crate::host::resting_timer;

    fn backup() -> State {
        let fingerprint = crate::snapshot::tests::header().fingerprint;
        let config = SessionConfig::new(Role::Backup, crate::build::own(), fingerprint, Term(0), 0);
        let queue = Arc::new(LiveQueue::new(resting_timer().unwrap(), Duration::from_millis(1)));
        State::new(Role::Backup, Session::new(config).unwrap(), None, None, queue, 0)
    }

    #[test]
    fn a_frame_for_any_address_of_the_guest_is_a_stray() {
        let (other, own) = ([6, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9]);
        let mut state = backup();
        state.net_mac = Some(own);
        state.strays_until_ns = 10;
        let sources = NetSources::try_from(vec![NetSource::untagged(other)]).unwrap();
        state.queue.network().publish(&NetCounters::default(), &sources);
        let to = |mac: [u8; 6]| [&[0; VNET_HEADER_BYTES][..], &mac, &[0; 60]].concat();
        assert!(state.is_stray(9, &to(own)) && state.is_stray(9, &to(other)));
        assert!(!state.is_stray(9, &to([0xff; 6])) && !state.is_stray(9, &[]));
        assert!(!state.is_stray(10, &to(other)));
    }

    #[test]
    fn a_peer_that_sends_without_end_does_not_keep_the_lock() {
        let listener = Channel::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut state = backup();
        state.connect(0, Channel::accept(&listener).unwrap());
        peer.write_all(&wire::PREAMBLE).unwrap();
        // The beginning of a message that is longer than all that is sent of it.
        peer.write_all(&wire::BODY_BYTES_MAX.to_le_bytes()).unwrap();
        peer.set_nonblocking(true).unwrap();
        let body = vec![0; 8 * TURN_BYTES];
        let mut sent_bytes = 0;
        while sent_bytes < body.len()
            && let Ok(count) = peer.write(&body[sent_bytes..])
        {
            sent_bytes += count;
        }
        let whole_turns = sent_bytes / (2 * TURN_BYTES);
        assert!(whole_turns > 1, "the host takes only {sent_bytes} bytes");
        for turn in 0..whole_turns {
            assert!(state.receive(0), "turn {turn} of at least {whole_turns}");
        }
        while state.receive(0) {}
        assert!(state.channel.is_some());
    }
}
