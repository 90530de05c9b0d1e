//! What a connection that breaks needs of the session, which does not hear of it at first.

use super::{RoleState, Session, lease};

impl Session {
    /// The connection broke and may be made again: nothing leaves before the backup has granted a
    /// lease afterwards.
    pub fn forget_lease(&mut self) {
        if let RoleState::Primary(primary) = &mut self.state {
            primary.forget_lease();
        }
    }

    /// How long a lease is, in nanoseconds.
    #[must_use]
    pub fn lease_ns(&self) -> u64 {
        self.config.lease_ns()
    }

    /// How long a backup keeps the promise of a lease that it grants, in nanoseconds.
    #[must_use]
    pub fn promise_ns(&self) -> u64 {
        lease::promise_ns(self.config.lease_ns())
    }
}
