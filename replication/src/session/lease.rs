//! The lease: for how long the primary may release what the backup has let go.
//!
//! Why: the backup's digests wait in a socket, and a primary that was away reads them when another
//! host may be active. So a digest alone releases nothing. The primary asks for a lease; a backup
//! that follows answers. From the moment it has read the request until the lease is over it does
//! not take over (decision 0033). The primary counts from the moment at which it *asked*, which
//! was earlier, on a clock that counts its own absence. The messages' way takes from the lease and
//! adds nothing to it.

/// What a backup's promise is longer than the lease it grants: the part of it by which the two
/// hosts' clocks may differ in speed, and more.
const MARGIN_PART: u64 = 8;
/// A lease is renewed when half of it is over, but not more often than this, in nanoseconds.
const RENEW_NS_MIN: u64 = 1_000_000;

/// How long a backup that grants a lease of `lease_ns` keeps its promise after it has read the
/// request.
pub(super) fn promise_ns(lease_ns: u64) -> u64 {
    lease_ns.saturating_add(lease_ns / MARGIN_PART)
}

/// The primary's lease of its backup.
#[derive(Clone, Debug, Default)]
pub(super) struct Lease {
    /// The last request's number; no two have the same.
    number: u64,
    /// When the request was made that is not answered yet.
    asked_ns: Option<u64>,
    /// When the next request is due.
    renew_ns: u64,
    /// The first moment at which nothing may be released.
    until_ns: u64,
}

impl Lease {
    /// Whether frames may leave at `now_ns`.
    pub(super) fn is_valid(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns
    }

    /// When the next request is due. A request that was not answered while its lease would have
    /// lasted is made anew: the answer to it would be of no use.
    pub(super) fn due_ns(&self, lease_ns: u64) -> u64 {
        self.asked_ns.map_or(self.renew_ns, |asked_ns| asked_ns.saturating_add(lease_ns))
    }

    /// Notes a request; its number.
    pub(super) fn ask(&mut self, now_ns: u64) -> u64 {
        self.asked_ns = Some(now_ns);
        self.number += 1;
        self.number
    }

    /// The backup answers request `number` with a lease of `granted_ns`, of which no more than
    /// `lease_ns` is used. `false` when no such request was made.
    #[must_use]
    pub(super) fn on_grant(&mut self, number: u64, granted_ns: u64, lease_ns: u64) -> bool {
        if number == self.number
            && let Some(asked_ns) = self.asked_ns.take()
        {
            let granted_ns = granted_ns.min(lease_ns);
            self.until_ns = asked_ns.saturating_add(granted_ns);
            self.renew_ns = asked_ns.saturating_add((granted_ns / 2).max(RENEW_NS_MIN));
        }
        number <= self.number
    }

    /// Another backup, or the old one with another state, has promised nothing yet. An answer to
    /// an older request is none to a later one.
    pub(super) fn forget(&mut self) {
        *self = Self { number: self.number, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE_NS: u64 = 100_000_000;

    #[test]
    fn a_lease_runs_from_the_request_and_ends_without_an_answer() {
        let mut lease = Lease::default();
        assert!(!lease.is_valid(0));
        assert_eq!(lease.due_ns(LEASE_NS), 0);
        let first = lease.ask(1000);
        assert!(!lease.is_valid(1000), "nobody has promised anything");
        assert_eq!(lease.due_ns(LEASE_NS), 1000 + LEASE_NS);
        assert!(lease.on_grant(first, u64::MAX, LEASE_NS));
        assert!(lease.is_valid(999 + LEASE_NS) && !lease.is_valid(1000 + LEASE_NS));
        assert_eq!(lease.due_ns(LEASE_NS), 1000 + LEASE_NS / 2);
        let second = lease.ask(1000 + LEASE_NS / 2);
        assert!(lease.is_valid(999 + LEASE_NS), "a request does not end the lease");
        assert!(lease.on_grant(second, LEASE_NS / 4, LEASE_NS));
        let until_ns = 1000 + LEASE_NS / 2 + LEASE_NS / 4;
        assert!(lease.is_valid(until_ns - 1) && !lease.is_valid(until_ns), "it grants less");
    }

    #[test]
    fn only_the_last_request_can_be_answered_and_once() {
        let mut lease = Lease::default();
        let old = lease.ask(0);
        let new = lease.ask(LEASE_NS);
        assert!(lease.on_grant(old, LEASE_NS, LEASE_NS), "late, and of no use");
        assert!(!lease.is_valid(LEASE_NS / 2));
        assert!(!lease.on_grant(new + 1, LEASE_NS, LEASE_NS), "nobody asked for this one");
        assert!(!lease.is_valid(LEASE_NS / 2));
        assert!(lease.on_grant(new, LEASE_NS, LEASE_NS));
        assert!(lease.is_valid(LEASE_NS + 1));
        lease.forget();
        assert!(!lease.is_valid(LEASE_NS + 1));
        assert!(lease.on_grant(new, LEASE_NS, LEASE_NS), "the answer to the backup's old state");
        assert!(!lease.is_valid(LEASE_NS + 1));
    }

    #[test]
    fn a_backup_that_grants_nothing_is_not_asked_without_pause() {
        let mut lease = Lease::default();
        let number = lease.ask(5);
        assert!(lease.on_grant(number, 0, LEASE_NS));
        assert!(!lease.is_valid(5));
        assert_eq!(lease.due_ns(LEASE_NS), 5 + RENEW_NS_MIN);
    }

    #[test]
    fn a_promise_is_longer_than_its_lease() {
        assert_eq!(promise_ns(800), 900);
        assert_eq!(promise_ns(u64::MAX), u64::MAX);
    }
}
