//! What the host's event thread waits for on behalf of the peer: the channel, the port where a
//! backup connects, and the clock.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use ftvmm_host::channel::{Channel, ChannelReader, Door, Received, Security};
use ftvmm_host::profile::{self, Phase};
use ftvmm_host::sync::{MutexGuard, lock};
use ftvmm_host::{HostEventsError, Ticker, VNET_HEADER_BYTES, repeating, watch};
use ftvmm_replication::{DisconnectReason, SessionEvent};

use super::turned_away::TurnedAway;
use super::{Address, Peer};
use crate::input::{PulseWatch, VcpuHealth};

/// Shortest interval between two ticks.
const SHORTEST_TICK: Duration = Duration::from_millis(1);
/// Bytes of the channel that are handled before timers and other events.
const TURN_BYTES: usize = 256 << 10;
/// Edge-triggered: one event when bytes arrive, one when the socket takes bytes again.
const CHANNEL_EVENTS: EventSet = EventSet::IN.union(EventSet::OUT).union(EventSet::EDGE_TRIGGERED);

/// The channel, and the port where a backup connects.
pub struct ChannelEvents {
    peer: Arc<Peer>,
    /// Where backups connect and show that they are one.
    door: Option<Door>,
    /// Where this host has connected to, if it made the connection that is served or was last.
    dialed: Option<SocketAddr>,
    /// Of the connection that is served. Its descriptor stays ours until epoll has let go of it.
    reader: Option<ChannelReader>,
    turned_away: TurnedAway,
}

impl ChannelEvents {
    /// Serves `connection` if there is one, and otherwise the next backup that connects to
    /// `listener`.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn new(
        peer: Arc<Peer>,
        listener: Option<TcpListener>,
        connection: Option<Channel>,
    ) -> std::io::Result<Self> {
        peer.address().listens_at = listener.as_ref().and_then(|l| l.local_addr().ok());
        let door = listener.map(|listener| open_door(&peer, listener)).transpose()?;
        let turned_away = TurnedAway::default();
        let mut events = Self { peer, door, dialed: None, reader: None, turned_away };
        if let Some(channel) = connection {
            events.serve(channel)?;
            events.dialed = events.peer.address().peer;
        }
        Ok(events)
    }

    fn serve(&mut self, channel: Channel) -> std::io::Result<()> {
        let (reader, writer) = channel.split()?;
        self.peer.address().peer = reader.stream().peer_addr().ok();
        self.reader = Some(reader);
        self.peer.connect(writer);
        Ok(())
    }

    /// As [`Self::serve`], while epoll runs; whether it is served.
    fn serve_and_watch(&mut self, channel: Channel, ops: &mut EventOps<'_>) -> bool {
        let served = self.serve(channel);
        match &served {
            Ok(()) => self.watch_channel(ops),
            Err(error) => tracing::error!(%error, "a connection cannot be served"),
        }
        served.is_ok()
    }

    /// Drops a connection that has ended, then serves the joining backup if the session accepts
    /// one.
    fn serve_joining(&mut self, ops: &mut EventOps<'_>) {
        let (stands, wants_peer) = {
            let core = self.peer.lock();
            (core.has_connection(), core.wants_connection())
        };
        if !stands && let Some(reader) = self.reader.take() {
            let _ = ops.remove(Events::empty(reader.stream()));
        }
        if self.reader.is_none()
            && wants_peer
            && lock(&self.peer.port.dialed).is_none()
            && let Some(address) = self.dialed
        {
            self.peer.connect_again(address);
        }
        if self.reader.is_some() || !self.peer.accepts() {
            return self.turned_away.turn_away(&self.peer);
        }
        let Some(channel) = lock(&self.peer.port.pending).take() else { return };
        let peer = channel.peer_address().ok();
        if self.serve_and_watch(channel, ops) && !wants_peer {
            self.dialed = None;
            self.peer.tell_of_connection(peer);
        }
    }

    /// Serves the connection that this host has made again.
    fn serve_dialed(&mut self, ops: &mut EventOps<'_>) {
        if self.reader.is_some() {
            return;
        }
        let Some(channel) = lock(&self.peer.port.dialed).take() else { return };
        self.dialed = channel.peer_address().ok();
        self.serve_and_watch(channel, ops);
        self.peer.port.is_dialing.store(false, Ordering::Release);
        self.peer.wake();
    }

    /// Reads some of what arrived and writes what waits. The rest is read after timers and signals:
    /// `EPOLL_CTL_MOD` makes epoll report the descriptor again (epoll_ctl(2)).
    fn serve_channel(&mut self, ops: &mut EventOps<'_>) {
        let Some(reader) = &mut self.reader else { return };
        self.peer.flush_channel();
        if self.peer.receive(reader)
            && let Err(error) = ops.modify(Events::new(reader.stream(), CHANNEL_EVENTS))
        {
            tracing::error!(%error, "the rest of the channel cannot be waited for");
        }
    }

    /// Waits for a backup at the address the operator named.
    fn listen(&mut self) {
        let Some(listener) = self.peer.address().new_listener.take() else { return };
        self.door = None;
        match open_door(&self.peer, listener) {
            Ok(door) => self.door = Some(door),
            Err(error) => tracing::error!(%error, "no backup can connect"),
        }
    }

    fn watch_channel(&self, ops: &mut EventOps<'_>) {
        if let Some(reader) = &self.reader
            && let Err(error) = ops.add(Events::new(reader.stream(), CHANNEL_EVENTS))
        {
            tracing::error!(%error, "the channel cannot be waited for");
        }
    }
}

/// Whoever shows that it is the other host waits to be served.
fn open_door(peer: &Arc<Peer>, listener: TcpListener) -> std::io::Result<Door> {
    let weak = Arc::downgrade(peer);
    let on_peer = Box::new(move |channel| {
        let Some(peer) = weak.upgrade() else { return };
        let mut pending = lock(&peer.port.pending);
        // Without proof, one that only began well must not keep the real one out.
        if pending.is_some() && peer.port.security.is_proved() {
            tracing::warn!("a second backup connected while one is waiting; refused");
            return;
        }
        *pending = Some(channel);
        drop(pending);
        let _ = peer.port.joining.write(1);
    });
    Door::open(listener, peer.port.security.clone(), on_peer)
}

impl MutEventSubscriber for ChannelEvents {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let from = |fd: Option<i32>| fd == Some(events.fd());
        if from(self.reader.as_ref().map(|reader| reader.stream().as_raw_fd())) {
            self.serve_channel(ops);
        }
        if from(Some(self.peer.port.joining.as_raw_fd())) {
            let _ = self.peer.port.joining.read();
            self.listen();
        }
        self.serve_joining(ops);
        self.serve_dialed(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.watch_channel(ops);
        watch(ops, &self.peer.port.joining);
    }
}

impl Peer {
    /// What the other host has to prove.
    pub fn security(&self) -> &Security {
        &self.port.security
    }

    fn accepts(&self) -> bool {
        self.port.accepts.load(Ordering::Acquire)
    }

    pub(super) fn address(&self) -> MutexGuard<'_, Address> {
        lock(&self.port.address)
    }

    /// Waits for a backup at `listener` from now on.
    pub fn listen(&self, listener: TcpListener) {
        let mut address = self.address();
        address.listens_at = listener.local_addr().ok();
        address.new_listener = Some(listener);
        drop(address);
        let _ = self.port.joining.write(1);
    }

    /// Hands arrived bytes to the core, about [`TURN_BYTES`] at most. Returns whether there may be
    /// more. Without the limit, a peer that sends faster than this host reads would keep timers and
    /// answers waiting.
    ///
    /// What follows from them is done when all are read: behind the last digests of a backup that
    /// has taken over is the end of its connection.
    fn receive(self: &Arc<Self>, reader: &mut ChannelReader) -> bool {
        let _channel = profile::enter(Phase::Channel);
        let (mut has_effects, mut may_be_more, mut received_bytes) = (false, true, 0);
        while may_be_more && received_bytes < TURN_BYTES {
            let mut ended = None;
            match reader.receive() {
                Ok(Received::Bytes(bytes)) => {
                    received_bytes += bytes.len();
                    has_effects |= self.tell_only(|core, now_ns| core.receive(now_ns, bytes)).1;
                    continue;
                }
                Ok(Received::Nothing) => {}
                Ok(Received::Closed) => ended = Some(DisconnectReason::Closed),
                Err(e) => ended = Some(DisconnectReason::Transport { description: e.to_string() }),
            }
            may_be_more = false;
            if let Some(reason) = ended {
                has_effects |= self.tell_only(|core, now_ns| core.disconnect(now_ns, reason)).1;
            }
        }
        if has_effects {
            self.perform_effects();
        }
        may_be_more
    }

    /// Lets time pass; how long until it should again.
    fn tick(self: &Arc<Self>, watch: &mut PulseWatch) -> Duration {
        let now_ns = self.clocks.session.host_now_ns();
        let look = watch.look(now_ns, self.queue.pulse());
        if look == VcpuHealth::Interrupt {
            self.queue.kick_vcpu();
        }
        self.give_sign_of_life(now_ns);
        // What happens until then may set an earlier deadline.
        let latest_ns = now_ns + self.limits.heartbeat_ns;
        let next_ns = self.tell(|core, now_ns| {
            core.tick(now_ns);
            if let VcpuHealth::Stuck { unseen_ns } = look {
                core.step(now_ns, SessionEvent::VcpuStuck { unseen_ns });
            }
            core.next_deadline_ns().map_or(latest_ns, |ns| ns.min(latest_ns))
        });
        Duration::from_nanos(next_ns.saturating_sub(now_ns)).max(SHORTEST_TICK)
    }

    /// A timer that keeps the session's time.
    ///
    /// # Errors
    /// When the host refuses a timer.
    pub fn ticker(self: &Arc<Self>) -> Result<Ticker<impl FnMut() + use<>>, HostEventsError> {
        let peer = Arc::clone(self);
        let mut watch = PulseWatch::new(self.limits.failure_ns);
        repeating(SHORTEST_TICK, move || peer.tick(&mut watch))
    }

    /// A timer that sends log records which a computing guest has left unsent.
    pub fn log_ticker(self: &Arc<Self>) -> Ticker<impl FnMut() + use<>> {
        let peer = Arc::clone(self);
        let look = move || peer.tell(|core, now_ns| core.look_at_log(now_ns));
        Ticker::on(self.log_timer.clone(), look)
    }

    /// The connection is of no use any more.
    pub fn disconnect(self: &Arc<Self>, reason: DisconnectReason) {
        self.tell(|core, now_ns| core.disconnect(now_ns, reason));
    }

    /// A frame for the guest came here although the other host is active.
    pub fn stray(self: &Arc<Self>, frame: Vec<u8>) {
        let is_late = self.lock().takes_strays(self.clocks.session.host_now_ns());
        if is_late && self.is_for_the_guest(&frame) {
            self.tell(|core, now_ns| core.strays(now_ns, vec![frame]));
        } else {
            self.queue.network().follower_dropped();
        }
    }

    /// Whether another host sent this frame as the guest's card, whose own frames do not come back.
    pub fn is_from_the_guest(&self, frame: &[u8]) -> bool {
        let source = frame.get(VNET_HEADER_BYTES + 6..VNET_HEADER_BYTES + 12);
        source.is_some_and(|source| self.network.mac.is_some_and(|mac| mac == *source))
    }

    /// Another host sends as the guest, while this one is active.
    pub fn guest_is_elsewhere(self: &Arc<Self>) {
        self.tell(|core, now_ns| core.guest_is_elsewhere(now_ns));
    }

    /// Broadcast frames have reached the guest's new host too, so they are no strays.
    fn is_for_the_guest(&self, frame: &[u8]) -> bool {
        frame.get(VNET_HEADER_BYTES..VNET_HEADER_BYTES + 6).is_some_and(|destination| {
            self.network.mac.is_some_and(|mac| mac == *destination)
                || self.queue.network().sources().has_mac(destination)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpStream};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixDatagram;

    use ftvmm_devices::{NetCounters, NetSource, NetSources};
    use ftvmm_host::Tap;
    use ftvmm_replication::policy::Role;
    use ftvmm_replication::{Message, Ordinal as Exit, OutputDigest, OutputOrdinal, Term, wire};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::peer::tests::{backup, primary_with};

    #[test]
    fn a_frame_for_any_address_of_the_guest_is_a_stray() {
        let (other, own) = ([6, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9]);
        let peer = backup(Some(own));
        let sources = NetSources::try_from(vec![NetSource::untagged(other)]).unwrap();
        peer.queue.network().publish(&NetCounters::default(), &sources);
        let to = |mac: [u8; 6]| [&[0; VNET_HEADER_BYTES][..], &mac, &[0; 60]].concat();
        assert!(peer.is_for_the_guest(&to(own)) && peer.is_for_the_guest(&to(other)));
        assert!(!peer.is_for_the_guest(&to([0xff; 6])) && !peer.is_for_the_guest(&[]));
        let from = |mac: [u8; 6]| [&[0; VNET_HEADER_BYTES + 6][..], &mac, &[0; 48]].concat();
        assert!(peer.is_from_the_guest(&from(own)) && !peer.is_from_the_guest(&from(other)));
        assert!(!peer.is_from_the_guest(&to(own)) && !peer.is_from_the_guest(&[]));
    }

    /// A reader of a connection, and the other end.
    fn connected(peer: &Arc<Peer>) -> (ChannelReader, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let channel = Channel::connect(address, &Security::default()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let (reader, writer) = channel.split().unwrap();
        peer.connect(writer);
        (reader, stream)
    }

    #[test]
    fn a_peer_that_sends_without_end_does_not_keep_the_event_thread() {
        let peer = backup(None);
        let (mut reader, mut stream) = connected(&peer);
        stream.write_all(&wire::PREAMBLE).unwrap();
        // The beginning of a message that is longer than all that is sent of it.
        stream.write_all(&wire::BODY_BYTES_MAX.to_le_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        let body = vec![0; 8 * TURN_BYTES];
        let mut sent_bytes = 0;
        while sent_bytes < body.len()
            && let Ok(count) = stream.write(&body[sent_bytes..])
        {
            sent_bytes += count;
        }
        let whole_turns = sent_bytes / (2 * TURN_BYTES);
        assert!(whole_turns > 1, "the host takes only {sent_bytes} bytes");
        for turn in 0..whole_turns {
            assert!(peer.receive(&mut reader), "turn {turn} of at least {whole_turns}");
        }
        while peer.receive(&mut reader) {}
        assert!(peer.lock().has_connection());
    }

    #[test]
    fn a_connection_that_ends_or_sends_rubbish_is_hung_up() {
        for rubbish in [&b""[..], b"SSH-2.0-OpenSSH\r\n"] {
            let peer = backup(None);
            let (mut reader, mut stream) = connected(&peer);
            stream.write_all(rubbish).unwrap();
            drop(stream);
            arrives(&reader, ENDED);
            // What was sent arrives before the end of the connection, in one piece or two.
            for _ in 0..2 {
                peer.receive(&mut reader);
            }
            assert!(!peer.lock().has_connection(), "{rubbish:?}");
            assert!(peer.outbox.lock().unwrap().writer.is_none(), "{rubbish:?}");
        }
    }
    fn encoded(messages: &[Message]) -> Vec<u8> {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| wire::encode(message, &mut bytes));
        bytes
    }

    /// The end of what the other side sends.
    const ENDED: PollFlags = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);

    /// Waits until the peer's socket has what was sent to it: it comes some time after write(2).
    fn arrives(reader: &ChannelReader, what: PollFlags) {
        poll(&mut [PollFd::new(reader.stream().as_fd(), what)], PollTimeout::NONE).unwrap();
    }

    /// Waits until the host says a thing of this name.
    fn hear(stream: &mut TcpStream, decoder: &mut wire::Decoder, name: &str) {
        let mut buffer = [0; 4096];
        loop {
            while let Some(message) = decoder.next_message().unwrap() {
                if message.name() == name {
                    return;
                }
            }
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "the connection ends before {name}");
            decoder.push(&buffer[..count]);
        }
    }

    #[test]
    fn a_digest_with_the_end_of_the_connection_behind_it_releases_nothing() {
        for hangs_up in [false, true] {
            let (network, socket) = UnixDatagram::pair().unwrap();
            network.set_nonblocking(true).unwrap();
            let peer = primary_with(Tap::over("lo", File::from(OwnedFd::from(socket))));
            let (mut reader, mut stream) = connected(&peer);
            let mut decoder = wire::Decoder::new();
            let (role, build) = (Role::Backup, crate::build::own());
            let fingerprint = crate::testing::header().fingerprint;
            let hello =
                Message::Hello { role, build, fingerprint, highest_term: Term(0), runs: false };
            stream.write_all(&[&wire::PREAMBLE[..], &encoded(&[hello])].concat()).unwrap();
            arrives(&reader, PollFlags::POLLIN);
            peer.receive(&mut reader);
            hear(&mut stream, &mut decoder, "Welcome");
            let term = Term(1);
            stream.write_all(&encoded(&[Message::Ready { term }])).unwrap();
            arrives(&reader, PollFlags::POLLIN);
            peer.receive(&mut reader);
            hear(&mut stream, &mut decoder, "LeaseRequest");
            let (at, frame) = (Exit(1), vec![7; 60]);
            let digest = OutputDigest::of(at, 0, &frame);
            peer.tell(|core, now_ns| {
                core.exit_complete(now_ns, at);
                core.flush_log(now_ns);
                core.step(now_ns, SessionEvent::Output { at, digest, frame });
            });
            let grant = Message::LeaseGrant { term, number: 1, lease_ns: u64::MAX };
            let report = Message::Digest { term, output: OutputOrdinal(1), at, digest };
            stream.write_all(&encoded(&[grant, report])).unwrap();
            if hangs_up {
                stream.shutdown(Shutdown::Write).unwrap();
                arrives(&reader, ENDED);
            } else {
                arrives(&reader, PollFlags::POLLIN);
            }
            peer.receive(&mut reader);
            // The thread that asked the witness may hold the outbox, and then does it.
            peer.finish_effects();
            let mut frame = [0; 100];
            let left = network.recv(&mut frame).ok();
            assert_eq!(left, (!hangs_up).then_some(60));
        }
    }
}
