//! Lines that would be said again and again: at once, then after a pause that grows.

/// What was said last, and what was not.
#[derive(Debug)]
pub struct Seldom {
    first_ns: u64,
    longest_ns: u64,
    pause_ns: u64,
    due_ns: u64,
    held: u64,
}

impl Seldom {
    /// The first line is said at once, the next after `first_s` seconds. The pause doubles up to
    /// `longest_s` seconds.
    #[must_use]
    pub const fn new(first_s: u64, longest_s: u64) -> Self {
        let first_ns = first_s * 1_000_000_000;
        let longest_ns = longest_s * 1_000_000_000;
        Self { first_ns, longest_ns, pause_ns: first_ns, due_ns: 0, held: 0 }
    }

    /// Whether the line is to be said now: if so, how many were not since the last one.
    pub fn may_say(&mut self, now_ns: u64) -> Option<u64> {
        if now_ns < self.due_ns {
            self.held += 1;
            return None;
        }
        self.due_ns = now_ns.saturating_add(self.pause_ns);
        self.pause_ns = self.pause_ns.saturating_mul(2).min(self.longest_ns);
        Some(core::mem::take(&mut self.held))
    }

    /// How many were not said since the last one.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held
    }

    /// What the lines are about is over: the next one is a first.
    pub fn is_over(&mut self) {
        *self = Self { pause_ns: self.first_ns, due_ns: 0, held: 0, ..*self };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    /// The seconds at which one of ten lines a second is said.
    fn said(seldom: &mut Seldom, seconds: std::ops::Range<u64>) -> Vec<u64> {
        let moments = (seconds.start * 10)..(seconds.end * 10);
        moments.filter(|tenth| seldom.may_say(tenth * S / 10).is_some()).map(|t| t / 10).collect()
    }

    #[test]
    fn the_pause_grows_to_its_longest_and_begins_anew() {
        let mut seldom = Seldom::new(10, 60);
        assert_eq!(said(&mut seldom, 5..300), [5, 15, 35, 75, 135, 195, 255]);
        seldom.is_over();
        assert_eq!(said(&mut seldom, 300..312), [300, 310]);
    }

    #[test]
    fn what_was_not_said_is_counted() {
        let mut seldom = Seldom::new(60, 60);
        assert_eq!(seldom.may_say(S), Some(0));
        assert_eq!(seldom.may_say(2 * S), None);
        assert_eq!(seldom.may_say(60 * S), None);
        assert_eq!(seldom.may_say(61 * S), Some(2));
    }
}
