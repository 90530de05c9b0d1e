//! What is said of connections that are not the other host's: one line a second, however many.

use std::net::SocketAddr;

use crate::Seldom;

/// Between two lines, in nanoseconds.
const BETWEEN_NS: u64 = 1_000_000_000;

/// What was said, and what was not.
#[derive(Debug)]
pub(super) struct Strangers {
    last_ns: Option<u64>,
    held: u64,
    /// Lines about the host itself, which no stranger may hide.
    of_host: Seldom,
}

impl Default for Strangers {
    fn default() -> Self {
        Self { last_ns: None, held: 0, of_host: Seldom::new(1, 1) }
    }
}

impl Strangers {
    /// A line is allowed now; otherwise it is counted.
    fn may_say(&mut self, now_ns: u64) -> bool {
        let may = self.last_ns.is_none_or(|last| now_ns.saturating_sub(last) >= BETWEEN_NS);
        match may {
            true => self.last_ns = Some(now_ns),
            false => self.held += 1,
        }
        may
    }

    /// Somebody at `peer` was sent away.
    pub fn say(&mut self, now_ns: u64, peer: SocketAddr, why: &str) {
        if self.may_say(now_ns) {
            let others = std::mem::take(&mut self.held);
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
        if self.held > 0 && self.may_say(now_ns) {
            let count = std::mem::take(&mut self.held);
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
        let said = |strangers: &mut Strangers, ms: u64| strangers.may_say(ms * 1_000_000);
        assert!(said(&mut strangers, 5));
        assert!((6..1000).all(|ms| !said(&mut strangers, ms)));
        assert_eq!(strangers.held, 994);
        strangers.say_held(1_004_000_000);
        assert_eq!(strangers.held, 995);
        strangers.say_held(1_005_000_000);
        assert_eq!(strangers.held, 0);
        assert!(!said(&mut strangers, 1500));
    }
}
