//! What the caller may know of a host of a pair.

use super::{Begin, Effect, Follower, LogPacer, Mode, PeerCore, PeerCounters, Roles, Transfer};
use crate::policy::StopReason;
use crate::session::Session;

impl PeerCore {
    /// The role state machine.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Numbers for the report.
    #[must_use]
    pub fn counters(&self) -> &PeerCounters {
        &self.counters
    }

    /// Set when the guest may start.
    #[must_use]
    pub fn begin(&self) -> Option<Begin> {
        self.guest.begin
    }

    /// Why the session is over, if it is.
    #[must_use]
    pub fn stop(&self) -> Option<&StopReason> {
        self.stop.as_ref()
    }

    /// True while the log goes to a backup.
    #[must_use]
    pub fn records_log(&self) -> bool {
        self.mode == Mode::Recording
    }

    /// True while inputs come from the other host's log.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.mode == Mode::Following
    }

    /// True while the guest takes inputs between exits, because no backup follows and no recording
    /// is made.
    #[must_use]
    pub fn is_unrecorded(&self) -> bool {
        self.mode == Mode::Alone && self.guest.unrecorded_when_alone
    }

    /// True while a whole state comes or goes.
    #[must_use]
    pub fn is_transferring(&self) -> bool {
        self.follower.is_joining() || self.session.is_attaching()
    }

    /// True while a whole state comes.
    #[must_use]
    pub fn is_joining(&self) -> bool {
        self.follower.is_joining()
    }

    /// True while a connection stands, or one that broke is made again.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.has_connection() || self.connection.resume.is_broken()
    }

    /// True while a connection stands; there may be none for a while that is made again.
    #[must_use]
    pub fn has_connection(&self) -> bool {
        self.connection.decoder.is_some()
    }

    /// True while the guest must wait at its exit.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        self.guest.congested
    }

    /// True while the guest is to stand still for a switch of roles.
    #[must_use]
    pub fn wants_yield(&self) -> bool {
        self.guest.yields
    }

    /// What the guest's thread must know before it asks for inputs.
    #[must_use]
    pub fn roles(&self) -> Roles {
        Roles {
            follows: self.follows(),
            joins: self.is_joining(),
            yields: self.guest.yields,
            is_over: self.stop.is_some(),
        }
    }

    /// What follows the other host's log.
    #[must_use]
    pub fn follower(&mut self) -> &mut Follower {
        &mut self.follower
    }

    /// The log of a guest that is followed.
    #[must_use]
    pub fn log(&self) -> &LogPacer {
        &self.log
    }

    /// The state on its way to the backup.
    #[must_use]
    pub fn transfer(&self) -> &Transfer {
        &self.transfer
    }

    /// Counts a state that has been sent.
    pub fn count_attach(&mut self, stopped_ns: u64) {
        self.counters.attaches += 1;
        self.counters.attach_stopped_ns = self.counters.attach_stopped_ns.max(Some(stopped_ns));
    }

    /// What is to be done, in this order. Empty at the next call. Where [`Self::has_release`],
    /// [`Self::release`] comes first.
    #[must_use]
    pub fn take_effects(&mut self) -> Vec<Effect> {
        core::mem::take(&mut self.effects)
    }

    /// Whether there is anything to be done.
    #[must_use]
    pub fn has_effects(&self) -> bool {
        !self.effects.is_empty() || self.session.has_release()
    }

    /// Whether something may leave only if no other host is active now: [`Self::release`] asks
    /// that.
    #[must_use]
    pub fn has_release(&self) -> bool {
        self.announcer.is_given() || self.session.has_release()
    }
}
