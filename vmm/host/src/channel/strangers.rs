//! What is said of connections that are not the other host's: one line a second, however many.

use std::net::SocketAddr;

use crate::Seldom;

/// What was said, and what was not.
#[derive(Debug)]
pub(super) struct Strangers {
    of_peers: Seldom,
    /// Lines about the host itself, which no stranger may hide.
    of_host: Seldom,
}

impl Default for Strangers {
    fn default() -> Self {
        Self { of_peers: Seldom::new(1, 1), of_host: Seldom::new(1, 1) }
    }
}

impl Strangers {
    /// Somebody at `peer` was sent away.
    pub fn say(&mut self, now_ns: u64, peer: SocketAddr, why: &str) {
        if let Some(others) = self.of_peers.may_say(now_ns) {
            tracing::warn!(%peer, others, "a connection was refused: {why}");
        }
    }

    /// The host had no descriptor for a connection.
    pub fn not_accepted(&mut self, now_ns: u64, error: &std::io::Error) {
        if let Some(others) = self.of_host.may_say(now_ns) {
            tracing::warn!(%error, others, "a connection was not accepted");
        }
    }

    /// Says how many were not named, when a second has passed.
    pub fn say_held(&mut self, now_ns: u64) {
        if self.of_peers.held() > 0
            && let Some(count) = self.of_peers.may_say(now_ns)
        {
            tracing::warn!(count, "more connections were refused");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_the_others_are_counted() {
        let mut strangers = Strangers::default();
        let said = |strangers: &mut Strangers, ms: u64| {
            strangers.of_peers.may_say(ms * 1_000_000).is_some()
        };
        assert!(said(&mut strangers, 5));
        assert!((6..1000).all(|ms| !said(&mut strangers, ms)));
        assert_eq!(strangers.of_peers.held(), 994);
        strangers.say_held(1_004_000_000);
        assert_eq!(strangers.of_peers.held(), 995);
        strangers.say_held(1_005_000_000);
        assert_eq!(strangers.of_peers.held(), 0);
        assert!(!said(&mut strangers, 1500));
    }
}
