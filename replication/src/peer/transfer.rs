//! The state on its way to the backup, as the sender counts.

/// Bytes of parts on their way that the backup has not put in place: enough to keep the channel
/// busy, little enough that both sides have them in memory.
const WINDOW_BYTES: u64 = 4 << 20;

/// See the module documentation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Transfer {
    /// Which one: a newer one ends those before it.
    number: u64,
    sent_bytes: u64,
    restored_bytes: u64,
}

impl Transfer {
    /// True while `number` is the transfer under way.
    #[must_use]
    pub fn is_number(&self, number: u64) -> bool {
        self.number == number
    }

    /// Whether another part may be sent before the backup has put one in place.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.sent_bytes.saturating_sub(self.restored_bytes) <= WINDOW_BYTES
    }

    /// A new transfer; its number.
    pub(super) fn begin(&mut self) -> u64 {
        *self = Self { number: self.number + 1, ..Self::default() };
        self.number
    }

    pub(super) fn sent(&mut self, bytes: u64) {
        self.sent_bytes += bytes;
    }

    /// What the backup says it has. No more than it was sent is believed.
    pub(super) fn restored(&mut self, restored_bytes: u64) {
        self.restored_bytes = restored_bytes.min(self.sent_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_wait_while_the_window_is_full_and_a_peer_cannot_open_it_for_good() {
        let mut transfer = Transfer::default();
        assert_eq!(transfer.begin(), 1);
        transfer.sent(WINDOW_BYTES);
        assert!(transfer.has_room());
        transfer.sent(1);
        assert!(!transfer.has_room());
        transfer.restored(u64::MAX);
        assert!(transfer.has_room());
        transfer.sent(WINDOW_BYTES + 1);
        assert!(!transfer.has_room(), "what was not sent cannot have been taken");
    }

    #[test]
    fn a_new_transfer_ends_the_one_before() {
        let mut transfer = Transfer::default();
        let first = transfer.begin();
        transfer.sent(u64::MAX);
        let second = transfer.begin();
        assert!(!transfer.is_number(first) && transfer.is_number(second));
        assert!(transfer.has_room());
    }
}
