//! What the host's event thread waits for on behalf of the peer: the channel, the port where a backup knocks,
//! and the clock.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use ftvmm_replication::{DisconnectReason, SessionEvent};

use super::{Channel, Peer};
use crate::host::{HostEventsError, Ticker, resting_timer, set_timer, watch};

/// The peer looks at the clock no more often than this.
const SHORTEST_TICK: Duration = Duration::from_millis(1);

/// The channel, and on a primary the port where a backup knocks.
pub struct ChannelEvents {
    peer: Arc<Peer>,
    listener: Option<TcpListener>,
    /// A second handle on the connection, so that its descriptor stays ours until epoll has let go of it.
    watched: Option<TcpStream>,
}

impl ChannelEvents {
    /// Waits for a backup to connect.
    pub fn listening(peer: Arc<Peer>, listener: TcpListener) -> Self {
        Self { peer, listener: Some(listener), watched: None }
    }

    /// Serves a connection that stands.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn connected(peer: Arc<Peer>, channel: Channel) -> std::io::Result<Self> {
        let watched = Some(channel.try_clone_stream()?);
        peer.connect(channel);
        Ok(Self { peer, listener: None, watched })
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Some(listener) = &self.listener else { return };
        match Channel::accept(listener) {
            Ok(_) if self.watched.is_some() => {
                tracing::warn!("one peer is connected; no second one")
            }
            Ok(channel) => match channel.try_clone_stream() {
                Ok(stream) => {
                    self.watch_stream(&stream, ops);
                    self.watched = Some(stream);
                    self.peer.connect(channel);
                }
                Err(error) => tracing::error!(%error, "a connection cannot be served"),
            },
            Err(error) => tracing::warn!(%error, "a connection was not accepted"),
        }
    }

    /// Edge-triggered: told once when bytes arrive, once when the socket takes bytes again.
    fn watch_stream(&self, stream: &TcpStream, ops: &mut EventOps<'_>) {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new(stream, events)) {
            tracing::error!(%error, "the channel cannot be waited for");
        }
    }
}

impl MutEventSubscriber for ChannelEvents {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let from = |fd: &dyn Fn() -> Option<i32>| fd() == Some(events.fd());
        use std::os::fd::AsRawFd;
        if from(&|| self.listener.as_ref().map(AsRawFd::as_raw_fd)) {
            self.accept(ops);
        }
        if from(&|| self.watched.as_ref().map(AsRawFd::as_raw_fd)) {
            self.peer.serve_channel();
        }
        if !self.peer.is_connected()
            && let Some(stream) = self.watched.take()
        {
            let _ = ops.remove(Events::empty(&stream));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Some(listener) = &self.listener {
            watch(ops, listener);
        }
        if let Some(stream) = &self.watched {
            self.watch_stream(stream, ops);
        }
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

    /// Reads what arrived and writes what waits.
    fn serve_channel(self: &Arc<Self>) {
        let mut state = self.lock();
        state.receive(self.clock.host_now_ns());
        self.settle(&mut state);
    }

    /// Lets time pass; how long until it should again.
    fn tick(self: &Arc<Self>) -> Duration {
        let mut state = self.lock();
        let now_ns = self.clock.host_now_ns();
        if state.session.next_deadline_ns().is_some_and(|deadline_ns| deadline_ns <= now_ns) {
            state.step(now_ns, SessionEvent::Tick);
        }
        state.announce(now_ns);
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
        let timer = resting_timer()?;
        set_timer(&timer, Some(SHORTEST_TICK));
        Ok(Ticker::on(timer.clone(), move || set_timer(&timer, Some(peer.tick()))))
    }

    /// A timer for [`super::PeerLog`]: sends what the guest left behind before it went computing.
    ///
    /// # Errors
    /// When the host refuses a timer.
    pub fn tail_ticker(self: &Arc<Self>) -> Result<Ticker<impl FnMut() + use<>>, HostEventsError> {
        let peer = Arc::clone(self);
        Ticker::new(move || {
            let mut state = peer.lock();
            state.tail_armed = false;
            peer.send_log(&mut state);
        })
    }

    /// The connection is of no use any more.
    pub fn disconnect(self: &Arc<Self>, reason: DisconnectReason) {
        let mut state = self.lock();
        state.disconnect(self.clock.host_now_ns(), reason);
        self.settle(&mut state);
    }
}
