//! Connects again to the other host after the connection broke (`PeerCore::wants_connection`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ftvmm_host::channel::Channel;
use ftvmm_host::contain::Thread;
use ftvmm_host::sync::lock;

use super::Peer;

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(10);
/// The shortest limit of an attempt.
const LONGEST_MIN: Duration = Duration::from_millis(50);

impl Peer {
    /// Connects to `address` until that succeeds or is not wanted any more, on a thread of its own.
    pub(super) fn connect_again(self: &Arc<Self>, address: SocketAddr) {
        if self.port.is_connecting.swap(true, Ordering::AcqRel) {
            return;
        }
        let peer = Arc::clone(self);
        let started = Thread::Connect.start(move || {
            peer.dial(address);
            peer.port.is_connecting.store(false, Ordering::Release);
            let _ = peer.port.joining.write(1);
        });
        if let Err(error) = started {
            self.port.is_connecting.store(false, Ordering::Release);
            tracing::error!(%error, "the connection to the other host is not made again");
        }
    }

    fn dial(&self, address: SocketAddr) {
        // Time for two of them before the other host is lost.
        let lease_ns = self.lock().session().lease_ns();
        let longest = Duration::from_nanos(lease_ns / 4).max(LONGEST_MIN);
        while self.lock().wants_connection() {
            match Channel::connect_within(address, &self.port.security, longest) {
                Ok(channel) => {
                    *lock(&self.port.dialed) = Some(channel);
                    return;
                }
                Err(error) => tracing::debug!(%address, %error, "no connection yet"),
            }
            std::thread::sleep(PAUSE);
        }
    }
}
