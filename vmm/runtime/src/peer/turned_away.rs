//! A host that comes while another is connected: this host says why it does not serve it, and a
//! backup that was told so comes again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ftvmm_host::Seldom;
use ftvmm_host::channel::{Channel, ChannelWriter};
use ftvmm_host::sync::lock;
use ftvmm_replication::policy::Refusal;

use super::Peer;

/// Connections that stay open behind what they were told. One that is closed with bytes unread is
/// reset (tcp(7)), and the other host might find that before it finds the reason.
const KEPT_MAX: usize = 4;
/// A host that comes again and again is named so often, in seconds.
const SAID_EVERY_S: u64 = 60;

/// What this host has said to those it does not serve.
#[derive(Debug)]
pub struct TurnedAway {
    kept: VecDeque<ChannelWriter>,
    lines: Seldom,
}

impl Default for TurnedAway {
    fn default() -> Self {
        Self { kept: VecDeque::new(), lines: Seldom::new(SAID_EVERY_S, SAID_EVERY_S) }
    }
}

impl TurnedAway {
    /// Tells the host that waits why it is not served, unless it may be in a moment.
    pub fn turn_away(&mut self, peer: &Peer) {
        let mut pending = lock(&peer.port.pending);
        if pending.is_none() {
            return;
        }
        let now_ns = peer.clocks.session.host_now_ns();
        let other = peer.address().peer;
        let Some((reason, bytes)) = peer.lock().turn_away(now_ns, other) else { return };
        let Some(channel) = pending.take() else { return };
        drop(pending);
        let visitor = channel.peer_address().ok();
        if let Some(others) = self.lines.may_say(now_ns) {
            tracing::warn!(?visitor, %reason, others, "a second backup was sent away");
        }
        // Who is gone needs to be told nothing.
        let Ok((_, mut writer)) = channel.split() else { return };
        writer.push(bytes);
        if writer.flush().is_ok() {
            self.kept.push_back(writer);
        }
        if self.kept.len() > KEPT_MAX {
            self.kept.pop_front();
        }
    }
}

impl Peer {
    /// Why the primary did not take this backup, where that may pass.
    pub fn turned_away(&self) -> Option<Refusal> {
        self.lock().turned_away().cloned()
    }

    /// Serves this connection to the primary, which did not take this backup before. Returns when
    /// it is served, or the session is over.
    pub fn dialed(self: &Arc<Self>, channel: Channel) {
        let port = &self.port;
        port.is_dialing.store(true, Ordering::Release);
        *lock(&port.dialed) = Some(channel);
        let _ = port.joining.write(1);
        self.wait_for(|core, _| {
            let is_served = !port.is_dialing.load(Ordering::Acquire);
            (is_served || core.stop().is_some()).then_some(())
        });
    }
}
