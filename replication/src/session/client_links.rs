//! Which of the two hosts the guest's clients can reach, and when the roles change for it.

use super::Context;
use super::decision::{Decision, Situation, Trouble};
use crate::message::Message;
use crate::policy::{LinkPolicy, SessionConfig};
use crate::session::Action;

/// The state of both hosts' links to the clients.
#[derive(Clone, Debug)]
pub(super) struct ClientLinks {
    /// Since when this host's link is down.
    down_since_ns: Option<u64>,
    /// The state of this host's link as last sent to the peer; up until something else was sent.
    told: bool,
    /// The state of the peer's link as last received.
    peer_up: bool,
    /// When this side last asked for a switch.
    asked_ns: Option<u64>,
}

impl Default for ClientLinks {
    fn default() -> Self {
        Self { down_since_ns: None, told: true, peer_up: true, asked_ns: None }
    }
}

impl ClientLinks {
    /// Whether this host's link to the clients is up.
    pub(super) fn own_up(&self) -> bool {
        self.down_since_ns.is_none()
    }

    /// Whether the peer's link is up, as last received.
    pub(super) fn peer_up(&self) -> bool {
        self.peer_up
    }

    /// A connection begins: neither side has sent a link state yet.
    pub(super) fn forget_peer(&mut self) {
        (self.told, self.peer_up, self.asked_ns) = (true, true, None);
    }

    pub(super) fn on_own(&mut self, up: bool, now_ns: u64) {
        if up {
            (self.down_since_ns, self.asked_ns) = (None, None);
        } else {
            self.down_since_ns.get_or_insert(now_ns);
        }
    }

    pub(super) fn on_peer(&mut self, up: bool) {
        self.peer_up = up;
    }

    /// Sends the link state to a peer that follows or is followed, if it has changed.
    pub(super) fn tell(&mut self, cx: &mut Context<'_>) {
        let up = self.own_up();
        if self.told != up {
            self.told = up;
            cx.send(Message::ClientLink { up });
        }
    }

    /// When a protected primary has to ask for a switch: after the link was down for the failure
    /// limit, and not while a switch is under way.
    pub(super) fn deadline_ns(&self, config: &SessionConfig) -> Option<u64> {
        let wanted = config.on_link_down == LinkPolicy::Switch && self.peer_up;
        let first_ns = self.down_since_ns.filter(|_| wanted)? + config.failure_ns;
        let again_ns = self.asked_ns.map_or(0, |asked_ns| asked_ns + 2 * config.handshake_ns);
        Some(first_ns.max(again_ns))
    }

    /// Has the roles of a protected pair change, if that is due.
    pub(super) fn ask_for_switch(&mut self, cx: &mut Context<'_>) {
        if self.deadline_ns(cx.config).is_none_or(|at_ns| at_ns > cx.now_ns) {
            return;
        }
        let detail = "this host's way to the clients is broken, the other's is whole";
        match cx.decide(Situation::Protected, Trouble::LinkDown, detail) {
            Decision::SwitchRoles => cx.act(Action::SwitchRoles),
            decision => panic!("cannot {decision:?} for a broken link"),
        }
        self.asked_ns = Some(cx.now_ns);
    }
}
