//! What lies under the peer's lock: the session and everything its actions touch.

use std::path::PathBuf;
use std::sync::Arc;

use ftvmm_replication::session::policy::{Role, StopReason};
use ftvmm_replication::wire::{self, Decoder};
use ftvmm_replication::{
    Action, DisconnectReason, Event, GroupEncoder, Message, Ordinal, ReplayCursor, Session,
    SessionEvent, Term, decode_group,
};

use super::announce::{self, ANNOUNCEMENT_PAUSE_NS, ANNOUNCEMENTS};
use super::channel::Channel;
use super::{Begin, PeerCounters, incident};
use crate::host::Tap;
use crate::input::LiveQueue;
use crate::run_loop::StopCause;

pub struct State {
    role: Role,
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
    pub begin: Option<Begin>,
    pub stop: Option<StopReason>,
    /// The guest must wait at its exit.
    pub congested: bool,
    /// Terms to be asked for.
    pub claims: Vec<Term>,
    pub counters: PeerCounters,
    pub incident_dir: PathBuf,
    pub unrecorded_when_alone: bool,
    /// When the peer was lost, on the peer's clock.
    pub lost_ns: Option<u64>,
    tap: Option<Tap>,
    net_mac: Option<[u8; 6]>,
    queue: Arc<LiveQueue>,
    /// This host speaks for the guest and nobody follows.
    alone: bool,
    announcements_left: u32,
    announced_ns: u64,
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
        Self {
            role,
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
            begin: None,
            stop: None,
            congested: false,
            claims: Vec::new(),
            counters: PeerCounters::default(),
            incident_dir: PathBuf::new(),
            unrecorded_when_alone: false,
            lost_ns: None,
            tap,
            net_mac,
            queue,
            alone: false,
            announcements_left: 0,
            announced_ns: 0,
            now_ns: 0,
        }
    }

    /// True while the log goes somewhere.
    pub fn records_log(&self) -> bool {
        self.role == Role::Primary && !self.alone
    }

    /// True while inputs come from the other host's log.
    pub fn follows(&self) -> bool {
        self.role == Role::Backup && !self.alone
    }

    /// A connection stands.
    pub fn connect(&mut self, now_ns: u64, mut channel: Channel) {
        channel.outgoing().extend_from_slice(&wire::PREAMBLE);
        self.channel = Some(channel);
        self.decoder = Decoder::new();
        self.step(now_ns, SessionEvent::Connected);
    }

    /// Hands every message that arrived to the session.
    pub fn receive(&mut self, now_ns: u64) {
        loop {
            let Some(channel) = &mut self.channel else { return };
            match channel.receive() {
                Ok(None) => return,
                Ok(Some([])) => return self.disconnect(now_ns, DisconnectReason::Closed),
                Ok(Some(bytes)) => self.decoder.push(bytes),
                Err(e) => {
                    let description = e.to_string();
                    return self.disconnect(now_ns, DisconnectReason::Transport { description });
                }
            }
            loop {
                match self.decoder.next_message() {
                    Ok(Some(message)) => {
                        self.count(&message);
                        self.step(now_ns, SessionEvent::Received(message));
                    }
                    Ok(None) => break,
                    Err(error) => return self.disconnect(now_ns, DisconnectReason::Wire(error)),
                }
            }
        }
    }

    pub fn disconnect(&mut self, now_ns: u64, reason: DisconnectReason) {
        if self.channel.take().is_some() {
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
                if self.role == Role::Primary {
                    // The switches may know this address behind another host.
                    self.announcements_left = ANNOUNCEMENTS;
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
                self.announcements_left = ANNOUNCEMENTS;
                self.announce(self.now_ns);
            }
            Action::GoAlone { term } => {
                tracing::warn!(%term, "this host goes on alone");
                self.be_alone();
            }
            Action::Incident(report) => {
                self.counters.divergences += 1;
                incident::keep(&self.incident_dir, &report);
            }
            Action::Congested(congested) => self.congested = congested,
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

    fn be_alone(&mut self) {
        self.alone = true;
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
        if let Some(tap) = &self.tap
            && let Err(error) = tap.write_frame(frame)
        {
            tracing::error!(%error, "the tap does not take a frame");
        }
    }

    /// The guest makes its first live exit.
    pub fn took_over(&mut self, now_ns: u64) {
        self.counters.takeover_ns = self.lost_ns.map(|lost_ns| now_ns - lost_ns);
    }

    /// Sends the next announcement of the guest's MAC address, if one is due.
    pub fn announce(&mut self, now_ns: u64) {
        let Some(mac) = self.net_mac.filter(|_| self.announcements_left > 0) else { return };
        let first = self.announcements_left == ANNOUNCEMENTS;
        if first || now_ns >= self.announced_ns + ANNOUNCEMENT_PAUSE_NS {
            self.transmit(&announce::frame(mac));
            self.announcements_left -= 1;
            self.announced_ns = now_ns;
        }
    }
}
