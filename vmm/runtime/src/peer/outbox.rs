//! Performs the core's effects: in order, one thread at a time, without the core's lock.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, TryLockError};
use std::time::Duration;

use ftvmm_host::channel::ChannelWriter;
use ftvmm_host::profile::{self, Phase};
use ftvmm_host::set_timer;
use ftvmm_host::sync::lock;
use ftvmm_machine::situation::StopCause;
use ftvmm_replication::peer::Notice;
use ftvmm_replication::session::decision::Decision;
use ftvmm_replication::{DisconnectReason, Effect, SessionEvent, Term};

use super::{Peer, announce};
use crate::input::Urgency;

/// Shared by the event thread and the thread that holds the outbox: whether bytes are left that the
/// socket did not take. Neither waits for the other.
#[derive(Default)]
pub struct Unsent {
    /// Bytes may be left: a flush is under way, or the socket took less.
    left: AtomicBool,
    /// The socket may take bytes again.
    flush_wanted: AtomicBool,
}

impl Unsent {
    /// The socket may take more bytes. Returns whether the caller has to flush.
    fn want_flush(&self) -> bool {
        let is_left = self.left.load(Ordering::SeqCst);
        if is_left {
            self.flush_wanted.store(true, Ordering::SeqCst);
        }
        is_left
    }

    fn is_wanted(&self) -> bool {
        self.flush_wanted.load(Ordering::SeqCst)
    }

    fn take_wanted(&self) -> bool {
        self.flush_wanted.swap(false, Ordering::SeqCst)
    }

    /// Called before the first byte is written, because the event that the socket takes more may
    /// come during the write.
    fn begin_flush(&self) {
        self.left.store(true, Ordering::SeqCst);
    }

    fn end_flush(&self, is_empty: bool) {
        self.left.store(!is_empty, Ordering::SeqCst);
    }
}

/// The sending half of the channel. The thread that holds its lock performs effects.
#[derive(Default)]
pub struct Outbox {
    pub writer: Option<ChannelWriter>,
}

impl Peer {
    /// Performs the pending effects, unless another thread holds the outbox; that thread then
    /// performs them too. A call from within an effect returns at once.
    pub(super) fn perform_effects(self: &Arc<Self>) {
        let _session = profile::enter(Phase::Session);
        loop {
            let mut outbox = match self.outbox.try_lock() {
                Ok(outbox) => outbox,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            self.empty(&mut outbox);
            drop(outbox);
            // Effects may have come after the last check, while this thread still held the outbox.
            if !self.unsent.is_wanted() && !self.lock().has_effects() {
                return;
            }
        }
    }

    /// Returns when all effects so far are performed, by any thread. A caller that learns that the
    /// session is over may end the process, so the last frames and Bye must be sent before.
    pub(super) fn finish_effects(self: &Arc<Self>) {
        let mut outbox = lock(&self.outbox);
        self.empty(&mut outbox);
        drop(outbox);
        self.perform_effects();
    }

    /// Takes a new connection. Effects for the one before are performed first.
    pub(super) fn connect(self: &Arc<Self>, writer: ChannelWriter) {
        let mut outbox = lock(&self.outbox);
        self.empty(&mut outbox);
        outbox.writer = Some(writer);
        self.tell(|core, now_ns| core.connect(now_ns));
        drop(outbox);
        self.perform_effects();
    }

    fn empty(self: &Arc<Self>, outbox: &mut Outbox) {
        loop {
            let effects = self.take_effects();
            if effects.is_empty() && !self.unsent.take_wanted() {
                return;
            }
            let holds_log = effects.contains(&Effect::LogSent);
            for effect in effects {
                self.perform(outbox, effect);
            }
            self.flush(outbox, holds_log);
        }
    }

    /// What is to be done. Where something may leave only while this host is the active one, the
    /// clock is read here: after the last read of the channel, before the first write.
    fn take_effects(&self) -> Vec<Effect> {
        let mut core = self.lock();
        if core.has_release() {
            core.release(self.clocks.session.host_now_ns());
        }
        core.take_effects()
    }

    /// The socket may take bytes again.
    pub(super) fn flush_channel(self: &Arc<Self>) {
        if self.unsent.want_flush() {
            self.perform_effects();
        }
    }

    /// Sends as much as the socket takes; the rest is sent when the socket is writable again.
    fn flush(self: &Arc<Self>, outbox: &mut Outbox, holds_log: bool) {
        let Some(writer) = outbox.writer.as_mut().filter(|writer| writer.has_unsent()) else {
            return;
        };
        let _channel = profile::enter(Phase::Channel);
        self.unsent.begin_flush();
        match writer.flush() {
            Ok(is_empty) => self.unsent.end_flush(is_empty),
            // Only after the other host's kernel has said that there will be no more.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                return self.disconnect(DisconnectReason::Closed);
            }
            Err(error) => {
                let description = error.to_string();
                return self.disconnect(DisconnectReason::Transport { description });
            }
        }
        if holds_log {
            self.lock().log_sent(self.clocks.session.host_now_ns());
        }
    }

    fn perform(self: &Arc<Self>, outbox: &mut Outbox, effect: Effect) {
        match effect {
            Effect::Send(bytes) => {
                if let Some(writer) = &mut outbox.writer {
                    writer.push(bytes);
                }
            }
            Effect::LogSent => {}
            Effect::HangUp => {
                self.flush(outbox, false);
                outbox.writer = None;
            }
            Effect::BreakOff => {
                if let Some(writer) = outbox.writer.take() {
                    writer.reset();
                }
            }
            Effect::Transmit(frame) => self.transmit(&frame),
            Effect::Announce => self.announce(),
            Effect::ClaimTerm(term) => self.claim(term, term),
            Effect::HoldTerm(term) => self.claim(term, Term(0)),
            Effect::Prove { number } => self.write_proof(number),
            Effect::LookFor { number, nonce } => self.look_for_proof(number, nonce),
            Effect::SendState { number } => self.send_state(number),
            Effect::LookAtLogIn { ns } => {
                set_timer(&self.log_timer, Some(Duration::from_nanos(ns)));
            }
            Effect::OpenInputs => {
                self.queue.set_closed(false);
            }
            Effect::CloseInputs => self.close_inputs(),
            Effect::GiveFrames(frames) => {
                for frame in frames {
                    if self.queue.push_frame(frame).is_some() {
                        self.queue.network().follower_dropped();
                    }
                }
            }
            Effect::InterruptGuest => self.queue.kick_vcpu(),
            Effect::RequestAttention => self.queue.request_attention(),
            Effect::StopGuest => self.queue.stop(StopCause::Protocol, Urgency::Now),
            Effect::CompleteFlushes { through } => self.complete_flushes(through),
            Effect::CompleteDisk { id } => self.complete_disk(id),
            Effect::MarkDisk(mark) => self.mark_disk(mark),
            Effect::KeepIncident(report) => self.keep_incident(*report),
            Effect::Tell(notice) => self.tell_of(notice),
        }
    }

    fn transmit(&self, frame: &[u8]) {
        let Some(tap) = &self.network.tap else { return };
        let _tap = profile::enter(Phase::Tap);
        let taken = tap.write_frame(frame).unwrap_or_else(|error| {
            tracing::error!(%error, "the tap does not take a frame");
            false
        });
        if !taken {
            self.queue.network().tap_dropped();
        }
    }

    /// A connection is served now. As [`Self::tell_of`] for the rest of its lines.
    pub(super) fn tell_of_connection(&self, peer: Option<SocketAddr>) {
        let now_ns = self.clocks.session.host_now_ns();
        let [connected, ..] = &self.port.seldom;
        if self.port.security.is_proved() || lock(connected).may_say(now_ns).is_some() {
            tracing::info!(?peer, "a backup connected");
        }
    }

    /// Where anybody can connect, anybody can cause the lines that say that a connection was none
    /// of the backup's: one a second of each kind is written.
    fn tell_of(&self, notice: Notice) {
        let [_, hung_up, kept_waiting] = &self.port.seldom;
        let seldom = match &notice {
            _ if self.port.security.is_proved() => None,
            Notice::Disconnected { .. } => Some(hung_up),
            Notice::Decided { row, .. }
                if matches!(row.decision, Decision::KeepWaiting | Decision::AbandonTerm) =>
            {
                Some(kept_waiting)
            }
            _ => None,
        };
        let now_ns = self.clocks.session.host_now_ns();
        if seldom.is_none_or(|seldom| lock(seldom).may_say(now_ns).is_some()) {
            tell_operator(notice);
        }
    }

    fn announce(&self) {
        if let Some(mac) = self.network.mac {
            announce::announce(mac, &self.queue, |frame| self.transmit(frame));
        }
    }

    fn close_inputs(self: &Arc<Self>) {
        let was_ending = self.queue.set_closed(true);
        let frames = self.queue.take_frames();
        self.tell(|core, now_ns| {
            core.strays(now_ns, frames);
            if was_ending {
                core.step(now_ns, SessionEvent::HostStop);
            }
        });
    }
}

fn tell_operator(notice: Notice) {
    match notice {
        Notice::Disconnected { reason } => {
            tracing::warn!(%reason, "the channel to the other host is gone");
        }
        Notice::Resumed { messages } => {
            tracing::info!(messages, "the channel stands again; what was lost is sent again");
        }
        Notice::Begins { term, release } => {
            tracing::info!(%term, ?release, "the guest starts in lockstep");
        }
        Notice::TakesOver { term } => tracing::warn!(%term, "this host takes over"),
        Notice::GoesAlone { term } => tracing::warn!(%term, "this host goes on alone"),
        Notice::Protected { at } => tracing::info!(%at, "the guest is protected"),
        Notice::Follows { term } => {
            tracing::warn!(%term, "the other host is active now");
        }
        Notice::Decided { row, detail } => {
            let (row, decision, reason) = (row.letter, row.decision, row.reason);
            tracing::warn!(%row, ?decision, detail, reason);
        }
        Notice::Witness { is_common: true, .. } => {
            tracing::info!("both hosts see the same witness again");
        }
        Notice::Witness { is_common: false, ours, theirs } => tracing::warn!(
            %ours, %theirs,
            "the two hosts do not see the same witness; is a shared folder not mounted on one of \
             them? A backup takes nothing over until they do"
        ),
        Notice::Over { reason } => tracing::info!(%reason, "the session is over"),
    }
}
