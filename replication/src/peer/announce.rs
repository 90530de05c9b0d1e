//! When the guest is announced to the network.
//!
//! A few times, because a frame may be lost, with growing pauses as QEMU has them
//! (`net/announce.c`).

/// How often a new place is announced.
const ROUNDS: u32 = 5;
/// Pause after the first announcement, and what each further pause is longer, in nanoseconds.
const FIRST_PAUSE_NS: u64 = 50_000_000;
const LONGER_NS: u64 = 100_000_000;

/// When the next announcement is due.
#[derive(Clone, Copy, Debug, Default)]
pub struct Announcer {
    done: u32,
    wanted: u32,
    due_ns: u64,
}

impl Announcer {
    /// The guest is at a new place.
    pub fn start(&mut self, now_ns: u64) {
        *self = Announcer { done: 0, wanted: ROUNDS, due_ns: now_ns };
    }

    /// Whether there is none to come.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done == self.wanted
    }

    /// Whether an announcement is to be made now. True once for each.
    pub fn is_due(&mut self, now_ns: u64) -> bool {
        let is_due = self.done < self.wanted && now_ns >= self.due_ns;
        if is_due {
            self.due_ns = now_ns + FIRST_PAUSE_NS + u64::from(self.done) * LONGER_NS;
            self.done += 1;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_spaced_and_end() {
        let mut announcer = Announcer::default();
        assert!(!announcer.is_due(u64::MAX));
        announcer.start(1000);
        let millisecond = 1_000_000;
        let due: Vec<u64> =
            (0..2000).filter(|ms| announcer.is_due(1000 + ms * millisecond)).collect();
        assert_eq!(due, [0, 50, 200, 450, 800]);
    }
}
