//! How long inputs wait for an exit of a recorded guest before a slice makes one.
//!
//! What comes from outside waits [`InputDelays::inputs`] and no longer, unless the guest would get
//! nowhere. A tick of the guest's own timer waits longer where slices are expensive; only the guest
//! could notice. A timer that owes the guest ticks is waited for no longer than an input, or the
//! guest would never catch up.

use std::time::Duration;

use ftvmm_replication::GuestNs;

/// After a slice the guest runs for at least this many times the slice's duration, capped at
/// [`InputDelays::inputs`], so that a timer faster than slices cannot stop its progress.
const PAUSE_PER_SLICE: u64 = 2;
/// The same for a slice that only a tick asks for, capped at [`InputDelays::ticks`]: a computing
/// guest spends at most about 1/40 of its time in them.
const PAUSE_PER_TICK_SLICE: u64 = 40;

/// The longest waits for an exit of a guest that makes none.
#[derive(Clone, Copy, Debug)]
pub struct InputDelays {
    /// Of what comes from outside: frames, typed bytes, a request to stop.
    pub inputs: Duration,
    /// Of the guest's timer, where slices are expensive; where they are not, [`Self::inputs`]. They
    /// are expensive while a guest boots: it writes much of its memory, which a slice would have to
    /// send. No client waits for it yet.
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

    /// How long an input waits before the guest is stopped. The rest is for one that cannot take an
    /// interrupt then.
    pub fn first_wait(&self) -> Duration {
        self.inputs / 2
    }
}

/// For whom a slice would be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Requester {
    /// Something from outside.
    Input,
    /// The guest's own timer.
    Tick,
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct SlicePacing {
    delays: InputDelays,
    /// No slice is made before these times, for ...
    no_input_slice_before: GuestNs,
    no_tick_slice_before: GuestNs,
}

impl SlicePacing {
    pub(super) fn new(delays: InputDelays) -> Self {
        Self { delays, no_input_slice_before: GuestNs(0), no_tick_slice_before: GuestNs(0) }
    }

    /// The guest goes on at `now` after a slice that was begun at `began`.
    pub(super) fn slice_ends(&mut self, began: GuestNs, now: GuestNs) {
        let cost_ns = now.since_ns(began);
        let until = |times: u64, most: Duration| {
            now.saturating_add_ns(cost_ns.saturating_mul(times).min(most.as_nanos() as u64))
        };
        self.no_input_slice_before = until(PAUSE_PER_SLICE, self.delays.inputs);
        self.no_tick_slice_before = until(PAUSE_PER_TICK_SLICE, self.delays.ticks);
    }

    /// The clock has been replaced: pauses by the one before are void.
    pub(super) fn rest_no_more(&mut self) {
        (self.no_input_slice_before, self.no_tick_slice_before) = (GuestNs(0), GuestNs(0));
    }

    /// When something that has waited its time can be given.
    pub(super) fn no_slice_before(&self, whom: Requester) -> GuestNs {
        match whom {
            Requester::Input => self.no_input_slice_before,
            Requester::Tick => self.no_tick_slice_before,
        }
    }

    /// When what came at `since` has waited as long as it may.
    pub(super) fn ends(&self, whom: Requester, since: GuestNs, booting: bool) -> GuestNs {
        let delay = match whom {
            Requester::Tick if booting => self.delays.ticks,
            _ => self.delays.inputs,
        };
        since.saturating_add_ns(delay.as_nanos() as u64).max(self.no_slice_before(whom))
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

    fn ms(ms: u64) -> GuestNs {
        GuestNs(ms * MS)
    }

    fn after_slice_of(cost_ns: u64) -> SlicePacing {
        let mut pacing = SlicePacing::new(InputDelays::default());
        pacing.slice_ends(ms(100), ms(100).saturating_add_ns(cost_ns));
        pacing
    }

    #[test]
    fn ticks_wait_longer_where_slices_are_dear() {
        let cheap = after_slice_of(MS / 10);
        assert_eq!(cheap.ends(Requester::Tick, ms(110), true), ms(210), "booting");
        assert_eq!(cheap.ends(Requester::Tick, ms(110), false), ms(115));
        let expensive = after_slice_of(MS);
        assert_eq!(expensive.ends(Requester::Tick, ms(110), false), ms(141));
        assert_eq!(expensive.ends(Requester::Input, ms(110), false), ms(115));
        let most_expensive = after_slice_of(20 * MS);
        assert_eq!(most_expensive.ends(Requester::Tick, ms(125), false), ms(220));
        assert_eq!(most_expensive.ends(Requester::Input, ms(118), false), ms(125));
        assert_eq!(most_expensive.no_slice_before(Requester::Input), ms(125));
    }

    #[test]
    fn a_delay_that_was_asked_for_holds_for_ticks_too() {
        let mut pacing = SlicePacing::new(InputDelays::all(Duration::from_millis(2)));
        pacing.slice_ends(ms(0), ms(50));
        assert_eq!(pacing.no_slice_before(Requester::Tick), ms(52));
        assert_eq!(pacing.ends(Requester::Tick, ms(60), true), ms(62));
    }

    #[test]
    fn another_clock_leaves_nobody_alone() {
        let mut pacing = after_slice_of(20 * MS);
        pacing.rest_no_more();
        assert_eq!(pacing.ends(Requester::Input, ms(1), false), ms(6));
    }
}
