//! How long inputs wait for an exit of a recorded guest before a slice makes one.
//!
//! What comes from outside waits [`InputDelays::inputs`] and no longer, unless the guest would get nowhere. A tick
//! of the guest's own timer waits longer where slices are dear: nobody but the guest can tell. A timer that owes the
//! guest ticks is waited for no longer than an input, or the guest would never catch up.

use std::time::Duration;

/// The guest runs so many times as long as a slice took before the next is taken, at most [`InputDelays::inputs`]: one
/// whose timer is faster than slices are still gets on.
const REST_PER_SLICE: u64 = 2;
/// Likewise for a slice that only a tick asks for, at most [`InputDelays::ticks`]: a guest that computes then loses at
/// most one part in so many to them.
const REST_PER_TICK_SLICE: u64 = 40;

/// The longest waits for an exit of a guest that makes none.
#[derive(Clone, Copy, Debug)]
pub struct InputDelays {
    /// Of what comes from outside: frames, typed bytes, a request to stop.
    pub inputs: Duration,
    /// Of the guest's timer, where slices are dear; where they are not, [`Self::inputs`]. They are while a guest boots: it
    /// writes much of its memory, which a slice would have to ship, and nobody has heard of it yet.
    pub ticks: Duration,
}

impl Default for InputDelays {
    fn default() -> Self {
        Self { inputs: Duration::from_millis(5), ticks: Duration::from_millis(100) }
    }
}

impl InputDelays {
    /// The same for everything.
    pub fn all(delay: Duration) -> Self {
        Self { inputs: delay, ticks: delay }
    }

    /// How long an input waits before the guest is stopped. The rest is for one that cannot take an interrupt then.
    pub fn first_wait(&self) -> Duration {
        self.inputs / 2
    }
}

/// For whom a slice would be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    /// Something from outside.
    Input,
    /// The guest's own timer.
    Tick,
}

/// See the module documentation. All times are guest time.
#[derive(Debug)]
pub(super) struct Patience {
    delays: InputDelays,
    /// When the slice was begun that the guest has not left yet.
    slice_began_ns: Option<u64>,
    /// The guest is left alone until then by ...
    inputs_rest_until_ns: u64,
    ticks_rest_until_ns: u64,
}

impl Patience {
    pub(super) fn new(delays: InputDelays) -> Self {
        Self { delays, slice_began_ns: None, inputs_rest_until_ns: 0, ticks_rest_until_ns: 0 }
    }

    pub(super) fn slice_begins(&mut self, now_ns: u64) {
        self.slice_began_ns = Some(now_ns);
    }

    pub(super) fn is_in_slice(&self) -> bool {
        self.slice_began_ns.is_some()
    }

    /// The guest goes on after a slice.
    pub(super) fn slice_ends(&mut self, now_ns: u64) {
        if let Some(began_ns) = self.slice_began_ns.take() {
            let cost_ns = now_ns.saturating_sub(began_ns);
            let until = |times: u64, most: Duration| {
                now_ns + cost_ns.saturating_mul(times).min(most.as_nanos() as u64)
            };
            self.inputs_rest_until_ns = until(REST_PER_SLICE, self.delays.inputs);
            self.ticks_rest_until_ns = until(REST_PER_TICK_SLICE, self.delays.ticks);
        }
    }

    /// The clock is another one: what was left alone by the one before is no longer.
    pub(super) fn rest_no_more(&mut self) {
        (self.inputs_rest_until_ns, self.ticks_rest_until_ns) = (0, 0);
    }

    /// When something that has waited its time can be given.
    pub(super) fn rests_until_ns(&self, whom: For) -> u64 {
        match whom {
            For::Input => self.inputs_rest_until_ns,
            For::Tick => self.ticks_rest_until_ns,
        }
    }

    /// When what came at `since_ns` has waited as long as it may.
    pub(super) fn ends_ns(&self, whom: For, since_ns: u64, booting: bool) -> u64 {
        let delay = match whom {
            For::Tick if booting => self.delays.ticks,
            _ => self.delays.inputs,
        };
        (since_ns + delay.as_nanos() as u64).max(self.rests_until_ns(whom))
    }

    /// Longest wait of what comes from outside.
    pub(super) fn inputs_ns(&self) -> u64 {
        self.delays.inputs.as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn after_slice_of(cost_ns: u64) -> Patience {
        let mut patience = Patience::new(InputDelays::default());
        patience.slice_begins(100 * MS);
        patience.slice_ends(100 * MS + cost_ns);
        assert!(!patience.is_in_slice());
        patience
    }

    #[test]
    fn ticks_wait_longer_where_slices_are_dear() {
        let cheap = after_slice_of(MS / 10);
        assert_eq!(cheap.ends_ns(For::Tick, 110 * MS, true), 210 * MS, "booting");
        assert_eq!(cheap.ends_ns(For::Tick, 110 * MS, false), 115 * MS);
        let dear = after_slice_of(MS);
        assert_eq!(dear.ends_ns(For::Tick, 110 * MS, false), 141 * MS);
        assert_eq!(dear.ends_ns(For::Input, 110 * MS, false), 115 * MS);
        let dearest = after_slice_of(20 * MS);
        assert_eq!(dearest.ends_ns(For::Tick, 125 * MS, false), 220 * MS);
        assert_eq!(dearest.ends_ns(For::Input, 118 * MS, false), 125 * MS);
        assert_eq!(dearest.rests_until_ns(For::Input), 125 * MS);
    }

    #[test]
    fn a_delay_that_was_asked_for_holds_for_ticks_too() {
        let mut patience = Patience::new(InputDelays::all(Duration::from_millis(2)));
        patience.slice_begins(0);
        patience.slice_ends(50 * MS);
        assert_eq!(patience.rests_until_ns(For::Tick), 52 * MS);
        assert_eq!(patience.ends_ns(For::Tick, 60 * MS, true), 62 * MS);
    }
}
