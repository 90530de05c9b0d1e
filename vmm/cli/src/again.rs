//! A backup that its primary does not take yet: it waits, and asks again.

use std::net::SocketAddr;
use std::sync::Arc;

use ftvmm_host::Seldom;
use ftvmm_host::channel::{CONNECT_SECONDS_MAX, Channel, ChannelError, HandshakeError};
use ftvmm_host::clock::{HostClock, sleep_ms};
use ftvmm_replication::policy::Refusal;
use ftvmm_runtime::peer::Peer;

/// Pause before the first new question, in milliseconds; the next ones are twice as long each.
const PAUSE_FIRST_MS: u64 = 1000;
/// The longest pause, in milliseconds. A guest that loses its backup waits so long for this one.
const PAUSE_LONGEST_MS: u64 = 4000;
/// Looks for a request to stop meanwhile, in milliseconds.
const LOOK_EVERY_MS: u64 = 100;
/// The reason is said so often, in seconds.
const SAID_EVERY_S: u64 = 60;

/// What a backup does between two questions.
pub struct Again {
    clock: HostClock,
    lines: Seldom,
    pause_ms: u64,
}

impl Default for Again {
    fn default() -> Self {
        Self {
            clock: HostClock::host_start(),
            lines: Seldom::new(SAID_EVERY_S, SAID_EVERY_S),
            pause_ms: PAUSE_FIRST_MS,
        }
    }
}

impl Again {
    /// Waits, then connects to the primary again, and returns with the connection or when the host
    /// is asked to stop.
    ///
    /// # Errors
    /// When nobody answers any more, as long as at the start, or what answers is not accepted.
    pub fn ask(
        &mut self,
        peer: &Arc<Peer>,
        address: SocketAddr,
        reason: &Refusal,
    ) -> Result<(), ChannelError> {
        if self.lines.may_say(self.clock.host_now_ns()).is_some() {
            tracing::warn!(primary = %address, "{reason}; this backup waits and asks again");
        }
        let since_ns = self.clock.host_now_ns();
        loop {
            if self.pause(peer) {
                return Ok(());
            }
            let cause = match Channel::connect_once(address, peer.security()) {
                Ok(channel) => {
                    peer.dialed(channel);
                    return Ok(());
                }
                Err(HandshakeError::Lost(cause)) => cause,
                Err(cause) => return Err(ChannelError::Handshake { address, cause }),
            };
            let waited_ns = self.clock.host_now_ns() - since_ns;
            if waited_ns > CONNECT_SECONDS_MAX * 1_000_000_000 {
                return Err(ChannelError::Connect { address, cause });
            }
        }
    }

    /// Returns whether the host was asked to stop.
    fn pause(&mut self, peer: &Arc<Peer>) -> bool {
        let until_ns = self.clock.host_now_ns() + self.pause_ms * 1_000_000;
        self.pause_ms = (2 * self.pause_ms).min(PAUSE_LONGEST_MS);
        while self.clock.host_now_ns() < until_ns {
            if peer.stopped().is_some() {
                return true;
            }
            sleep_ms(LOOK_EVERY_MS);
        }
        false
    }
}
