//! The connection to the other host, and what is told to one that comes while it stands.

use core::net::SocketAddr;

use super::PeerCore;
use super::resume::Resume;
use crate::message::Message;
use crate::policy::Refusal;
use crate::wire::{self, Decoder};

/// The one that stands, or stood last.
#[derive(Debug, Default)]
pub(super) struct Connection {
    /// While it stands.
    pub decoder: Option<Decoder>,
    /// When it was made.
    pub since_ns: u64,
    /// The other host ended it for a reason that may pass.
    pub turned_away: Option<Refusal>,
    /// What makes it again when it breaks.
    pub resume: Resume,
}

impl Connection {
    pub fn begin(now_ns: u64) -> Self {
        Self { decoder: Some(Decoder::new()), since_ns: now_ns, ..Self::default() }
    }
}

impl PeerCore {
    /// What a host that connects beside the one at `peer` is told before its connection is closed:
    /// the reason, and its bytes. `None` where it may wait to be served.
    #[must_use]
    pub fn turn_away(&self, now_ns: u64, peer: Option<SocketAddr>) -> Option<(Refusal, Vec<u8>)> {
        let for_s = now_ns.saturating_sub(self.connection.since_ns) / 1_000_000_000;
        let refusal = self.session.refuses_another(peer, for_s)?;
        let mut bytes = wire::PREAMBLE.to_vec();
        wire::encode(&Message::Refuse { refusal: refusal.clone() }, &mut bytes);
        Some((refusal, bytes))
    }

    /// Why the primary sent this backup away, if it did and the reason may pass: it is to connect
    /// again.
    #[must_use]
    pub fn turned_away(&self) -> Option<&Refusal> {
        self.connection.turned_away.as_ref()
    }
}
