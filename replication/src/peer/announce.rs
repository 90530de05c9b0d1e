//! When the guest is announced to the network.
//!
//! A few times, because a frame may be lost, with growing pauses as QEMU has them
//! (`net/announce.c`). Then again after some seconds, and whenever the guest's address is heard
//! from elsewhere: a host that was taken for dead may come back and say a last word, and switches
//! look for the guest where they heard it last.

/// How often a new place is announced at once.
const ROUNDS: u32 = 5;
/// Pause after the first announcement, and what each further pause is longer, in nanoseconds.
const FIRST_PAUSE_NS: u64 = 50_000_000;
const LONGER_NS: u64 = 100_000_000;
/// Pauses before the announcements after those, in nanoseconds.
const LATER_NS: [u64; 3] = [2_000_000_000, 5_000_000_000, 15_000_000_000];
/// Shortest time between two announcements for which the guest's own address is the reason, in
/// nanoseconds.
const AGAIN_NS: u64 = 1_000_000_000;

/// When the next announcement is due.
#[derive(Clone, Copy, Debug, Default)]
pub struct Announcer {
    done: u32,
    wanted: u32,
    due_ns: u64,
    /// One is wanted out of turn.
    again: bool,
    /// When the last one was made.
    last_ns: Option<u64>,
    /// One was due that may not have been made.
    given: bool,
}

impl Announcer {
    /// The guest is at a new place.
    pub fn start(&mut self, now_ns: u64) {
        let wanted = ROUNDS + LATER_NS.len() as u32;
        self.stop();
        (self.wanted, self.due_ns) = (wanted, now_ns);
    }

    /// The guest is elsewhere.
    pub fn stop(&mut self) {
        let Self { last_ns, given, .. } = *self;
        *self = Self { last_ns, given, ..Self::default() };
    }

    /// Whether an announcement was due since [`Self::take_given`].
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.given
    }

    /// As [`Self::is_given`], once.
    pub fn take_given(&mut self) -> bool {
        core::mem::take(&mut self.given)
    }

    /// The guest was heard at another place.
    pub fn again(&mut self, now_ns: u64) {
        self.again |= self.last_ns.is_none_or(|last_ns| now_ns >= last_ns + AGAIN_NS);
    }

    /// Whether there is none to come.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done == self.wanted
    }

    /// Whether an announcement is to be made now. True once for each.
    pub fn is_due(&mut self, now_ns: u64) -> bool {
        let is_next = self.done < self.wanted && now_ns >= self.due_ns;
        if is_next {
            self.done += 1;
            self.due_ns = now_ns + self.pause_ns();
        }
        let is_due = core::mem::take(&mut self.again) || is_next;
        if is_due {
            (self.last_ns, self.given) = (Some(now_ns), true);
        }
        is_due
    }

    /// Pause after the last announcement.
    fn pause_ns(&self) -> u64 {
        match self.done.checked_sub(ROUNDS) {
            None => FIRST_PAUSE_NS + u64::from(self.done.saturating_sub(1)) * LONGER_NS,
            Some(later) => LATER_NS.get(later as usize).copied().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn rounds_are_spaced_and_end() {
        let mut announcer = Announcer::default();
        assert!(!announcer.is_due(u64::MAX));
        announcer.start(1000);
        let due: Vec<u64> = (0..60_000).filter(|ms| announcer.is_due(1000 + ms * MS)).collect();
        assert_eq!(due, [0, 50, 200, 450, 800, 2800, 7800, 22_800]);
        assert!(announcer.is_done());
    }

    #[test]
    fn a_guest_that_is_heard_elsewhere_is_announced_again_but_not_for_every_frame() {
        let mut announcer = Announcer::default();
        announcer.start(0);
        let heard = |announcer: &mut Announcer, ms| {
            announcer.again(ms * MS);
            announcer.is_due(ms * MS)
        };
        for ms in 0..3000 {
            announcer.is_due(ms * MS);
        }
        let due: Vec<u64> = (3000..5500).filter(|ms| heard(&mut announcer, *ms)).collect();
        assert_eq!(due, [3800, 4800], "the last was at 2800");
        let mut silent = Announcer::default();
        assert!(heard(&mut silent, 5), "also one that has never been announced here");
        silent.start(6 * MS);
        silent.again(7 * MS);
        silent.stop();
        assert!(!silent.is_due(u64::MAX), "the guest is elsewhere");
    }
}
