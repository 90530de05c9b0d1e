//! What the host's event thread waits for on behalf of the peer: the channel, the port where a backup knocks,
//! and the clock.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use ftvmm_replication::{DisconnectReason, SessionEvent};

use super::{Channel, Peer, tail};
use crate::host::{HostEventsError, Ticker, repeating, resting_timer, set_timer, watch};
use crate::input::Look;

/// The peer looks at the clock no more often than this.
const SHORTEST_TICK: Duration = Duration::from_millis(1);
/// Edge-triggered: told once when bytes arrive, once when the socket takes bytes again.
const CHANNEL_EVENTS: EventSet = EventSet::IN.union(EventSet::OUT).union(EventSet::EDGE_TRIGGERED);

/// The channel, and the port where a backup knocks.
pub struct ChannelEvents {
    peer: Arc<Peer>,
    listener: Option<TcpListener>,
    /// A second handle on the connection, so that its descriptor stays ours until epoll has let go of it.
    watched: Option<TcpStream>,
    /// A newcomer this host has no time for yet.
    pending: Option<Channel>,
}

impl ChannelEvents {
    /// Serves `connection`, if one stands, and whoever knocks at `listener` when there is none.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new(
        peer: Arc<Peer>,
        listener: Option<TcpListener>,
        connection: Option<Channel>,
    ) -> std::io::Result<Self> {
        let watched = connection.as_ref().map(Channel::try_clone_stream).transpose()?;
        peer.lock().listens_at = listener.as_ref().and_then(|l| l.local_addr().ok());
        if let Some(channel) = connection {
            peer.connect(channel);
        }
        Ok(Self { peer, listener, watched, pending: None })
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match Channel::accept(listener) {
            Ok(_) if self.pending.is_some() => tracing::warn!("one newcomer waits; no second one"),
            Ok(channel) => self.pending = Some(channel),
            Err(error) => tracing::warn!(%error, "a connection was not accepted"),
        }
    }

    /// Lets go of a connection that is over; serves the newcomer, if there is time for it.
    fn serve_newcomer(&mut self, ops: &mut EventOps<'_>) {
        if !self.peer.is_connected()
            && let Some(stream) = self.watched.take()
        {
            let _ = ops.remove(Events::empty(&stream));
        }
        if self.watched.is_some() || !self.peer.takes_newcomers() {
            return;
        }
        let Some(channel) = self.pending.take() else { return };
        match channel.try_clone_stream() {
            Ok(stream) => {
                self.watch_stream(&stream, ops);
                self.watched = Some(stream);
                self.peer.connect(channel);
            }
            Err(error) => tracing::error!(%error, "a connection cannot be served"),
        }
    }

    /// Reads some of what arrived and writes what waits. The rest has its turn after timers and signals: to say once
    /// more what is waited for has epoll look again (epoll_ctl(2), `EPOLL_CTL_MOD`).
    fn serve_channel(&self, ops: &mut EventOps<'_>) {
        if self.peer.serve_channel()
            && let Some(stream) = &self.watched
            && let Err(error) = ops.modify(Events::new(stream, CHANNEL_EVENTS))
        {
            tracing::error!(%error, "the rest of the channel cannot be waited for");
        }
    }

    /// Waits for a backup at the address the operator named.
    fn listen(&mut self, ops: &mut EventOps<'_>) {
        let Some(listener) = self.peer.take_new_listener() else { return };
        if let Some(old) = self.listener.take() {
            let _ = ops.remove(Events::empty(&old));
        }
        watch(ops, &listener);
        self.listener = Some(listener);
    }

    fn watch_stream(&self, stream: &TcpStream, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(stream, CHANNEL_EVENTS)) {
            tracing::error!(%error, "the channel cannot be waited for");
        }
    }
}

impl MutEventSubscriber for ChannelEvents {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let from = |fd: Option<i32>| fd == Some(events.fd());
        if from(self.listener.as_ref().map(AsRawFd::as_raw_fd)) {
            self.accept();
        }
        if from(self.watched.as_ref().map(AsRawFd::as_raw_fd)) {
            self.serve_channel(ops);
        }
        if from(Some(self.peer.newcomers.as_raw_fd())) {
            let _ = self.peer.newcomers.read();
            self.listen(ops);
        }
        self.serve_newcomer(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Some(listener) = &self.listener {
            watch(ops, listener);
        }
        if let Some(stream) = &self.watched {
            self.watch_stream(stream, ops);
        }
        watch(ops, &self.peer.newcomers);
    }
}

impl Peer {
    /// A connection stands.
    pub fn connect(self: &Arc<Self>, channel: Channel) {
        let mut state = self.lock();
        state.connect(self.clock.host_now_ns(), channel);
        self.settle(&mut state);
    }

    fn is_connected(&self) -> bool {
        self.lock().channel.is_some()
    }

    fn takes_newcomers(&self) -> bool {
        self.lock().session.takes_newcomers()
    }

    fn take_new_listener(&self) -> Option<TcpListener> {
        self.lock().new_listener.take()
    }

    /// Waits for a backup at `listener` from now on.
    pub fn listen(&self, listener: TcpListener) {
        let mut state = self.lock();
        state.listens_at = listener.local_addr().ok();
        state.new_listener = Some(listener);
        drop(state);
        let _ = self.newcomers.write(1);
    }

    /// Reads some of what arrived and writes what waits; whether there may be more to read.
    fn serve_channel(self: &Arc<Self>) -> bool {
        let mut state = self.lock();
        let more = state.receive(self.clock.host_now_ns());
        self.settle(&mut state);
        more
    }

    /// Lets time pass; how long until it should again.
    fn tick(self: &Arc<Self>) -> Duration {
        let mut state = self.lock();
        let now_ns = self.clock.host_now_ns();
        if state.session.next_deadline_ns().is_some_and(|deadline_ns| deadline_ns <= now_ns) {
            state.step(now_ns, SessionEvent::Tick);
        }
        state.announce(now_ns);
        match state.watch.look(now_ns, self.queue.pulse()) {
            Look::Well => {}
            Look::Interrupt => self.queue.kick_vcpu(),
            Look::Stuck { unseen_ns } => state.step(now_ns, SessionEvent::VcpuStuck { unseen_ns }),
        }
        self.settle(&mut state);
        // What happens until then may set an earlier deadline.
        let latest_ns = now_ns + self.heartbeat_ns;
        let next_ns = state.session.next_deadline_ns().unwrap_or(latest_ns).min(latest_ns);
        Duration::from_nanos(next_ns.saturating_sub(now_ns)).max(SHORTEST_TICK)
    }

    /// A timer that keeps the session's time.
    ///
    /// # Errors
    /// When the host refuses a timer.
    pub fn ticker(self: &Arc<Self>) -> Result<Ticker<impl FnMut() + use<>>, HostEventsError> {
        let peer = Arc::clone(self);
        repeating(SHORTEST_TICK, move || peer.tick())
    }

    /// A timer for [`super::PeerLog`]: sends what the guest left behind before it went computing.
    ///
    /// # Errors
    /// When the host refuses a timer.
    pub fn tail_ticker(self: &Arc<Self>) -> Result<Ticker<impl FnMut() + use<>>, HostEventsError> {
        let peer = Arc::clone(self);
        let timer = resting_timer()?;
        Ok(Ticker::on(timer.clone(), move || {
            let mut state = peer.lock();
            match tail::left(state.unsent_since_ns, state.send_cost_ns, peer.clock.host_now_ns()) {
                Some(left) => set_timer(&timer, Some(left)),
                None => {
                    state.tail_armed = false;
                    peer.send_log(&mut state);
                }
            }
        }))
    }

    /// The connection is of no use any more.
    pub fn disconnect(self: &Arc<Self>, reason: DisconnectReason) {
        let mut state = self.lock();
        state.disconnect(self.clock.host_now_ns(), reason);
        self.settle(&mut state);
    }
}
