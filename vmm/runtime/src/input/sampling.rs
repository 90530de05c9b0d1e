//! Guest time: the host's clock, except after a stall and at a tick that has to wait.

use ftvmm_machine::situation::RunSituation;
use ftvmm_replication::{GuestClock, GuestNs, HostNs};

use super::tick_hold::TickHold;

/// How far a sample may lie behind a timer that is due, or behind the sample before it when no
/// timer runs. After a stall (a take-over, a host that slept) the guest catches up sample by
/// sample: its kernel takes the ACPI timer's 24 bits for a clock that went back when it jumps by
/// more than half of them, 2.3 s (Linux, `clocksource_delta`).
pub(super) const LATE_NS_MAX: u64 = 100_000_000;
/// How many times as fast as the host's clock guest time may go while a guest that computes is
/// behind it: its threads must get on with its ticks, or it reports one that did not (Linux'
/// watchdog, after 20 s).
const CATCH_UP: u64 = 4;
/// Resolution of the samples of the host's clock.
pub(super) const SAMPLE_NS: u64 = 1000;

/// Guest time as it is sampled: in whole microseconds, so that a sample costs at most four bytes of
/// log.
fn logged(now: GuestNs) -> GuestNs {
    GuestNs(now.0 - now.0 % SAMPLE_NS)
}

/// What the clocks say at an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    /// Guest time for a sample.
    pub(super) now: GuestNs,
    /// What the guest's clock shows, however far the guest is behind it.
    pub(super) clock: GuestNs,
    /// The guest's timer is due, and its tick may come.
    pub(super) is_due: bool,
    /// It is due, and its tick waits for a later exit.
    pub(super) is_held: bool,
    /// The guest is behind its clock.
    pub(super) is_behind: bool,
}

/// Reads the guest's clock as the guest is to see it.
#[derive(Debug)]
pub(super) struct Sampler {
    clock: GuestClock,
    /// Guest time of the last sample.
    last: GuestNs,
    /// The host's clock at the last sample that moved guest time.
    last_host: HostNs,
    /// How far guest time was behind its clock at the last exit.
    lag_ns: u64,
    /// Guest time when a guest without a timer was last known to have waited of its own accord.
    rested: GuestNs,
    hold: TickHold,
}

impl Sampler {
    /// For a guest that has seen guest time up to `last`.
    pub(super) fn new(clock: GuestClock, last: GuestNs) -> Self {
        let (last_host, rested) = (HostNs(0), GuestNs(0));
        Self { clock, last, last_host, lag_ns: 0, rested, hold: TickHold::new() }
    }

    /// Goes on with another clock, after the guest has seen guest time up to `last`.
    pub(super) fn resume(&mut self, clock: GuestClock, last: GuestNs) {
        (self.clock, self.last) = (clock, last);
        // A time of the clock before.
        self.lag_ns = 0;
        self.hold = TickHold::new();
    }

    /// Guest time, for a guest that is not behind.
    pub(super) fn now(&self, host: HostNs) -> GuestNs {
        logged(self.clock.guest_at(host)).max(self.last)
    }

    /// Guest time of the last sample.
    pub(super) fn last(&self) -> GuestNs {
        self.last
    }

    /// What the host's clock shows when the guest's shows `guest`.
    pub(super) fn host_at(&self, guest: GuestNs) -> HostNs {
        self.clock.host_at(guest)
    }

    /// What the guest's clock shows when a guest so far behind comes to `guest`.
    pub(super) fn clock_at(&self, guest: GuestNs) -> GuestNs {
        guest.saturating_add_ns(self.lag_ns)
    }

    /// A guest without a timer has waited until now.
    pub(super) fn rests(&mut self, host: HostNs) {
        self.rested = self.now(host);
    }

    /// The clocks at an exit, or where an unrecorded guest was interrupted. May be asked again.
    pub(super) fn read(
        &mut self,
        situation: &RunSituation,
        in_slice: bool,
        host: HostNs,
    ) -> Reading {
        self.hold.arrive(situation);
        let (mut now, lag_ns) = self.catch_up(situation, host);
        self.lag_ns = lag_ns;
        let clock = now.saturating_add_ns(lag_ns);
        let due = situation.deadline_ns.map(GuestNs).filter(|at| *at <= now);
        // A tick that the guest's time has passed is there already.
        let may_hold = !situation.halted && !in_slice;
        let held = due.filter(|at| may_hold && *at > self.last && self.hold.holds());
        if let Some(at) = held {
            now = logged(at.saturating_sub_ns(1)).max(self.last);
        }
        let is_held = held.is_some();
        Reading { now, clock, is_due: due.is_some() && !is_held, is_held, is_behind: lag_ns > 0 }
    }

    /// Guest time for a sample, and how far that is behind what its clock shows; for the time stamp
    /// counter to the nanosecond: there are drivers that refuse a coarse one (Linux,
    /// `jent_entropy_init`).
    fn catch_up(&self, situation: &RunSituation, host: HostNs) -> (GuestNs, u64) {
        // A guest at its tick has no timer for some exits: the old one is over, the next one not
        // yet set.
        let due = situation.deadline_ns.map_or(self.rested, GuestNs).max(self.last);
        let latest = logged(due.saturating_add_ns(LATE_NS_MAX));
        let now = match situation.reads_counter {
            true => self.clock.guest_at(host).max(self.last),
            false => self.now(host),
        };
        if now <= latest {
            return (now, 0);
        }
        let told = if situation.halted {
            // All its threads have had their turn when it halts.
            latest
        } else {
            let passed_ns = host.since_ns(self.last_host);
            let step_ns = passed_ns.saturating_mul(CATCH_UP).min(LATE_NS_MAX);
            logged(self.last.saturating_add_ns(step_ns)).max(self.last)
        };
        (told, now.since_ns(told))
    }

    /// The guest is told `now`.
    pub(super) fn tell(&mut self, now: GuestNs, situation: &RunSituation, host: HostNs) {
        if situation.deadline_ns.is_some_and(|at| GuestNs(at) <= now) {
            self.hold.ticked();
        }
        // Readings so close that a step rounds down to nothing must add up, or guest time stands
        // still.
        if now > self.last {
            self.last_host = host;
        }
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_devices::Input;
    use ftvmm_replication::{Event, GroupEncoder, Ordinal, Record};
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;
    const STOOD_AT: GuestNs = GuestNs(5_000 * MS);

    /// For a guest that stands `behind_ns` behind its clock.
    fn sampler(behind_ns: u64) -> Sampler {
        let clock = GuestClock::anchored(HostNs(0), STOOD_AT.saturating_add_ns(behind_ns));
        Sampler::new(clock, STOOD_AT)
    }

    fn exit(at: u64) -> RunSituation {
        RunSituation { at: Some(Ordinal(at)), ..RunSituation::default() }
    }

    #[test]
    fn a_guest_is_told_its_clock_unless_it_is_too_far_behind() {
        // Behind, host time since the last sample, timer; halted, reads the counter; told, still
        // behind.
        let after_a_stall = [
            (0, 1_234, None, false, false, 1_000, false),
            (0, 1_234, None, false, true, 1_234, false),
            (100 * MS, 0, None, false, false, 100 * MS, false),
            (1000 * MS, 0, None, false, false, 0, true),
            (1000 * MS, MS, None, false, false, 4 * MS, true),
            (1000 * MS, MS + 100, None, false, true, 4 * MS, true),
            (1000 * MS, 50 * MS, None, false, false, 100 * MS, true),
            (1000 * MS, 0, None, true, false, 100 * MS, true),
            (200 * MS, 0, Some(150 * MS), false, false, 200 * MS, false),
            (1000 * MS, 0, Some(300 * MS), false, false, 0, true),
            (1000 * MS, 0, Some(300 * MS), true, false, 400 * MS, true),
        ];
        for row in after_a_stall {
            let (behind_ns, passed_ns, timer_ns, halted, reads_counter, told_ns, is_behind) = row;
            let deadline_ns = timer_ns.map(|ns| STOOD_AT.0 + ns);
            let situation = RunSituation { deadline_ns, halted, reads_counter, ..exit(1) };
            let reading = sampler(behind_ns).read(&situation, false, HostNs(passed_ns));
            assert_eq!(reading.now, STOOD_AT.saturating_add_ns(told_ns), "{row:?}");
            assert_eq!(reading.is_behind, is_behind, "{row:?}");
            let shown_ns = reading.clock.since_ns(STOOD_AT);
            assert!(behind_ns + passed_ns - shown_ns < SAMPLE_NS, "{row:?}: {shown_ns}");
        }
    }

    #[test]
    fn the_next_tick_is_held_until_the_guest_has_got_on() {
        let mut sampler = sampler(0);
        let host = HostNs(10 * MS);
        let at = |at, ns: u64| RunSituation { deadline_ns: Some(STOOD_AT.0 + ns), ..exit(at) };
        let first = sampler.read(&at(1, MS), false, host);
        assert!(first.is_due && !first.is_held);
        sampler.tell(first.now, &at(1, MS), host);
        let host = HostNs(20 * MS);
        let next = sampler.read(&at(2, 11 * MS), false, host);
        assert!(next.is_held && !next.is_due);
        assert_eq!(next.now, STOOD_AT.saturating_add_ns(11 * MS - SAMPLE_NS));
        assert_eq!(next.clock, STOOD_AT.saturating_add_ns(20 * MS));
        // Neither at a slice nor at a halt, nor one that is passed.
        assert!(sampler.read(&at(3, 11 * MS), true, host).is_due);
        assert!(sampler.read(&RunSituation { halted: true, ..at(3, 11 * MS) }, false, host).is_due);
        assert!(sampler.read(&at(3, 10 * MS), false, host).is_due);
    }

    #[test]
    fn a_guest_that_waited_without_a_timer_is_told_the_time_at_once() {
        let mut sampler = sampler(0);
        let host = HostNs(2 * LATE_NS_MAX);
        sampler.rests(host);
        let reading = sampler.read(&exit(2), false, host);
        assert_eq!(reading.now, STOOD_AT.saturating_add_ns(2 * LATE_NS_MAX));
    }

    #[test]
    fn readings_too_close_for_a_step_add_up() {
        let mut sampler = sampler(1000 * MS);
        for passed_ns in 0..1000 {
            let reading = sampler.read(&exit(passed_ns), false, HostNs(passed_ns));
            sampler.tell(reading.now, &exit(passed_ns), HostNs(passed_ns));
        }
        assert_eq!(sampler.last(), STOOD_AT.saturating_add_ns(3 * SAMPLE_NS));
    }

    proptest! {
        #[test]
        fn time_goes_on_in_steps_and_never_ahead_of_its_clock(
            behind_ns in 0..3000 * MS,
            exits in prop::collection::vec(
                (0..200 * MS, prop::option::of(0..500 * MS), any::<[bool; 4]>()),
                1..60,
            ),
        ) {
            let mut sampler = sampler(behind_ns);
            let mut host = HostNs(0);
            for (at, (passed_ns, timer_ns, flags)) in (1..).zip(exits) {
                let [halted, reads_counter, interrupts_enabled, in_slice] = flags;
                host = host.saturating_add_ns(passed_ns);
                let last = sampler.last();
                let deadline_ns = timer_ns.map(|ns| (last.0 + ns).saturating_sub(50 * MS));
                let situation = RunSituation {
                    deadline_ns,
                    halted,
                    reads_counter,
                    interrupts_enabled,
                    ..exit(at)
                };
                let reading = sampler.read(&situation, in_slice, host);
                prop_assert_eq!(sampler.read(&situation, in_slice, host), reading);
                let clock = sampler.clock.guest_at(host).max(last);
                prop_assert!(last <= reading.now && reading.now <= reading.clock);
                prop_assert!(reading.clock <= clock && clock.since_ns(reading.clock) < SAMPLE_NS);
                let due = deadline_ns.map_or(last, GuestNs).max(last);
                prop_assert!(reading.now.since_ns(due) <= LATE_NS_MAX);
                prop_assert!(!(reading.is_due && reading.is_held));
                if reading.is_due {
                    prop_assert!(due.max(last) <= reading.now);
                }
                if reading.is_held {
                    prop_assert!(reading.now < due && !halted && !in_slice);
                }
                if reading.is_behind && !halted {
                    let step_ns = CATCH_UP * host.since_ns(sampler.last_host);
                    prop_assert!(reading.now.since_ns(last) <= step_ns);
                }
                sampler.tell(reading.now, &situation, host);
            }
        }
    }

    /// Bytes of log for a sample `exits` exits and `gap_ns` of host time after another.
    fn sample_bytes(first_ns: u64, gap_ns: u64, exits: u64) -> u64 {
        let mut encoder = GroupEncoder::new();
        let mut push = |at, now_ns| {
            let now_ns = logged(GuestNs(now_ns)).0;
            encoder.push(&Record { at: Ordinal(at), event: Event::Input(Input::Time { now_ns }) });
            encoder.body_bytes()
        };
        let before = push(1, first_ns);
        push(1 + exits, first_ns + gap_ns) - before
    }

    #[test]
    fn a_clock_read_costs_at_most_four_bytes_of_log() {
        const NS_PER_S: u64 = 1_000_000_000;
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..10_000 {
            let first_ns = rng.u64(..1000 * NS_PER_S);
            let gap_ns = rng.u64(..=2 * NS_PER_S) >> rng.u32(..32);
            assert!(sample_bytes(first_ns, gap_ns, rng.u64(..15)) <= 4, "{gap_ns} ns");
            // A tick of the tiny kernel with many exits on the way.
            assert!(sample_bytes(first_ns, gap_ns % 10_000_000, rng.u64(..140)) <= 4);
        }
    }

    #[test]
    fn a_sample_is_at_most_a_microsecond_old_and_never_in_the_future() {
        for now_ns in [0, 999, 1000, 1001, 123_456_789_999] {
            assert!((0..1000).contains(&(now_ns - logged(GuestNs(now_ns)).0)));
        }
    }
}
