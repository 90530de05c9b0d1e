//! Holds a tick of the guest's timer back until the guest has got on since the last one.
//!
//! Inputs reach a recorded guest at exits, and a clock read is one. A guest whose exits are
//! expensive, or whose time goes fast after a stall, may need longer for a tick than the next one
//! takes to come. The next one would then interrupt its clock read each time, and a kernel that
//! reads again when a tick came between (Linux, `ktime_get`) would do so for ever. Ticks a periodic
//! timer owes the guest are none of these: they come when the guest has ended the one before.

use ftvmm_machine::situation::RunSituation;
use ftvmm_replication::Ordinal;

/// A tick is held back at no more exits than this: more than a guest makes for one tick, and a
/// guest that waits with interrupts disabled for a time to come is not kept from it.
const HELD_EXITS_MAX: u32 = 64;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct TickHold {
    /// The exit the guest stands at.
    at: Option<Ordinal>,
    /// Interrupts are enabled there, and no tick came.
    is_free: bool,
    /// The guest has gone past such an exit since its last tick.
    got_on: bool,
    /// The last exit at which the next tick was held back.
    held_at: Option<Ordinal>,
    /// At how many it was.
    held_exits: u32,
}

impl TickHold {
    /// No tick has come yet.
    pub(super) fn new() -> Self {
        Self { at: None, is_free: false, got_on: true, held_at: None, held_exits: 0 }
    }

    /// The guest stands at an exit; may be told of the same one again.
    pub(super) fn arrive(&mut self, situation: &RunSituation) {
        if self.at != situation.at {
            self.got_on |= self.is_free;
            self.at = situation.at;
            self.is_free = situation.interrupts_enabled;
        }
    }

    /// Whether a tick that is due must wait for a later exit. The answer for an exit stays.
    pub(super) fn holds(&mut self) -> bool {
        if self.at.is_none() {
            return false;
        }
        if self.held_at == self.at {
            return true;
        }
        let holds = !self.got_on && self.held_exits < HELD_EXITS_MAX;
        if holds {
            self.held_at = self.at;
            self.held_exits += 1;
        }
        holds
    }

    /// The guest is given a tick.
    pub(super) fn ticked(&mut self) {
        *self = Self { at: self.at, is_free: false, got_on: false, held_at: None, held_exits: 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(at: u64, interrupts_enabled: bool) -> RunSituation {
        RunSituation { at: Some(Ordinal(at)), interrupts_enabled, ..RunSituation::default() }
    }

    /// Whether a tick that is due at this exit waits; one that does not is given.
    fn waits(hold: &mut TickHold, situation: &RunSituation) -> bool {
        hold.arrive(situation);
        let holds = hold.holds();
        assert_eq!(hold.holds(), holds, "asked again");
        if !holds {
            hold.ticked();
        }
        holds
    }

    #[test]
    fn the_next_tick_waits_until_the_guest_is_back_and_has_gone_past_an_exit() {
        let mut hold = TickHold::new();
        assert!(!waits(&mut hold, &exit(1, true)), "the first");
        for handler in 2..6 {
            assert!(waits(&mut hold, &exit(handler, false)));
        }
        assert!(waits(&mut hold, &exit(6, true)), "reads its clock again");
        assert!(!waits(&mut hold, &exit(7, true)));
        assert!(waits(&mut hold, &exit(8, true)));
    }

    #[test]
    fn no_tick_waits_for_ever() {
        let mut hold = TickHold::new();
        assert!(!waits(&mut hold, &exit(1, true)));
        let exits = (2..).take_while(|at| waits(&mut hold, &exit(*at, false))).count();
        assert_eq!(exits, HELD_EXITS_MAX as usize);
    }

    #[test]
    fn between_exits_nothing_waits() {
        let mut hold = TickHold::new();
        assert!(!waits(&mut hold, &exit(1, false)));
        assert!(!waits(&mut hold, &RunSituation::default()));
    }
}
