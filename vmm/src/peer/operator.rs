//! Answers for one half of a pair (`--control`).

use std::sync::Arc;

use super::Peer;
use crate::control::{Operator, Refused, Role, Status};

/// Answers for the run of this [`Peer`].
pub struct PeerOperator(pub Arc<Peer>);

impl Operator for PeerOperator {
    fn status(&self) -> Status {
        let exit = self.0.queue.last_exit();
        let state = self.0.lock();
        let role = if state.follows() { Role::Backup } else { Role::Primary };
        Status {
            role,
            state: state.session.state_name().into(),
            protected: state.session.is_protected(),
            term: state.session.term().map(|term| term.0),
            peer: state.channel.as_ref().and_then(|channel| channel.peer_address()),
            exit,
            outputs: state.counters.outputs,
            log_bytes: state.counters.log_bytes,
            lag_exits: state.session.lag_exits(),
            divergences: state.counters.divergences,
            takeovers: state.counters.takeovers,
            takeover_us: state.counters.takeover_ns.map(|ns| ns / 1000),
            uptime_ms: self.0.clock.host_now_ns() / 1_000_000,
            ..Status::default()
        }
    }

    fn stop(&self) -> Result<(), Refused> {
        self.0.host_stop();
        Ok(())
    }
}
