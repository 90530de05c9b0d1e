//! What live inputs give, in which order, and how long they wait.

use std::time::Duration;

use ftvmm_devices::{DiskOp, DiskRequest};
use ftvmm_host::disk::{CompletionPolicy, Disk, DiskFile};
use ftvmm_host::{Typed, resting_timer};
use ftvmm_machine::situation::StopCause;
use ftvmm_replication::HostNs;

use super::*;
use crate::input::input_queue::{InputQueue, Pending, Shutdown, Urgency};
use crate::input::sampling::{LATE_NS_MAX, SAMPLE_NS};

const MS: u64 = 1_000_000;
const STOOD_AT_NS: u64 = 5_000 * MS;

/// A guest and what arrives for it, on a host whose time the test tells.
struct Live {
    core: LiveCore,
    pending: Pending,
    now: HostNs,
    is_unrecorded: bool,
}

impl Live {
    /// A guest whose clock shows `guest_ns`, and who has been told `last_ns`.
    fn new(guest_ns: u64, last_ns: u64) -> Self {
        let clock = GuestClock::anchored(HostNs(0), GuestNs(guest_ns));
        let core = LiveCore::new(clock, GuestNs(last_ns), InputDelays::default());
        Self { core, pending: Pending::default(), now: HostNs(0), is_unrecorded: false }
    }

    fn host(&mut self) -> (&mut LiveCore, Host<'_>) {
        let Self { core, pending, now, is_unrecorded } = self;
        (core, Host { now: *now, is_unrecorded: *is_unrecorded, pending })
    }

    fn next(&mut self, situation: RunSituation) -> Next {
        let (core, host) = self.host();
        core.next(&situation, host)
    }

    fn wake(&mut self, situation: RunSituation) -> Next {
        let (core, host) = self.host();
        core.wake(&situation, host)
    }

    /// The input this situation has, if it has one.
    fn input(&mut self, situation: RunSituation) -> Option<Input> {
        match self.next(situation) {
            Next::Step(Step::Apply(input)) => Some(input),
            _ => None,
        }
    }

    /// What the guest is told of the time, if it is told.
    fn told_ns(&mut self, situation: RunSituation) -> Option<u64> {
        match self.input(situation) {
            Some(Input::Time { now_ns }) => Some(now_ns),
            _ => None,
        }
    }

    fn captures(&mut self, situation: RunSituation) -> bool {
        matches!(self.next(situation), Next::Step(Step::Capture))
    }

    fn leaves(&mut self, situation: RunSituation) -> bool {
        matches!(self.next(situation), Next::Leave { .. })
    }

    fn run_mode(&mut self, interrupt_waits: bool) -> RunMode {
        let now = self.now;
        self.core.leave(interrupt_waits, self.is_unrecorded, || now)
    }

    fn pass_ns(&mut self, ns: u64) {
        self.now = self.now.saturating_add_ns(ns);
    }

    fn alarm_after(&mut self) -> Option<Duration> {
        self.core.take_setting().and_then(|setting| setting.after)
    }
}

fn exit(at: u64) -> RunSituation {
    RunSituation { at: Some(Ordinal(at)), ..RunSituation::default() }
}

#[test]
fn inputs_come_in_order_and_the_tick_last() {
    let mut live = Live::new(STOOD_AT_NS, STOOD_AT_NS - 1);
    live.core.renew_identity();
    live.pending.frames.extend([vec![1], vec![2]]);
    live.pending.console.extend(*b"ab");
    live.pending.announce = true;
    live.pending.signals.push_back(Input::Nmi);
    let all = RunSituation {
        reads_clock: true,
        entropy_wanted_bytes: 1000,
        takes_frames: true,
        deadline_ns: Some(STOOD_AT_NS),
        ..exit(1)
    };
    assert!(matches!(live.next(all), Next::NewIdentity));
    assert_eq!(live.told_ns(all), Some(STOOD_AT_NS));
    assert!(matches!(live.next(all), Next::Entropy { bytes: 256 }));
    let frame = |byte: u8| Input::NetRx { frame: vec![byte] };
    let console = Input::ConsoleRx { bytes: b"ab".to_vec() };
    for expected in [Input::Nmi, frame(1), frame(2), Input::NetAnnounce, console] {
        assert_eq!(live.input(all), Some(expected));
    }
    assert!(live.leaves(all));
    live.pass_ns(MS);
    live.pending.console.push_back(b'c');
    let tick =
        RunSituation { deadline_ns: Some(STOOD_AT_NS + MS), interrupts_enabled: true, ..exit(2) };
    let tick_after = RunSituation { at: Some(Ordinal(3)), ..tick };
    assert!(matches!(live.input(tick), Some(Input::ConsoleRx { .. })));
    assert!(live.leaves(tick), "the guest has not got on since the tick before");
    assert_eq!(live.told_ns(tick_after), Some(STOOD_AT_NS + MS));
    live.pending.stop = Some((StopCause::Requested, Urgency::NextExit));
    assert!(matches!(live.next(tick_after), Next::Step(Step::Stop(StopCause::Requested))));
}

#[test]
fn frames_wait_for_a_card_that_takes_them() {
    let mut live = Live::new(0, 0);
    live.pending.frames.push_back(vec![1]);
    live.pending.deadline_passed = true;
    assert!(live.leaves(exit(1)));
    let computing = RunSituation { takes_interrupt: true, ..RunSituation::default() };
    assert!(!live.captures(computing));
    assert!(live.captures(RunSituation { takes_frames: true, ..computing }));
}

#[test]
fn a_halted_guest_waits_for_its_timer_or_an_arrival() {
    let mut live = Live::new(STOOD_AT_NS, STOOD_AT_NS);
    let halted = |deadline_ns| RunSituation { halted: true, deadline_ns, ..exit(1) };
    let until = |next| match next {
        Next::Wait { until } => until,
        other => panic!("{other:?}"),
    };
    assert_eq!(until(live.next(halted(None))), None);
    assert_eq!(until(live.wake(halted(Some(STOOD_AT_NS + 3 * MS)))), Some(HostNs(3 * MS)));
    live.pass_ns(MS);
    live.pending.attention = true;
    let timer = halted(Some(STOOD_AT_NS + 3 * MS));
    assert!(matches!(live.wake(timer), Next::Step(Step::Again)));
    assert_eq!(until(live.next(timer)), Some(HostNs(3 * MS)));
    live.pass_ns(2 * MS);
    assert!(matches!(live.wake(timer), Next::Step(Step::Apply(Input::Time { now_ns }))
        if now_ns == STOOD_AT_NS + 3 * MS));
    assert_eq!(live.alarm_after(), None, "it sleeps");
}

#[test]
fn a_guest_that_waited_without_a_timer_is_told_the_time_at_once() {
    let mut live = Live::new(0, 0);
    let halted = RunSituation { halted: true, ..exit(1) };
    assert!(matches!(live.next(halted), Next::Wait { until: None }));
    live.pass_ns(2 * LATE_NS_MAX);
    live.pending.console.push_back(b'x');
    assert!(matches!(live.wake(halted), Next::Step(Step::Apply(Input::ConsoleRx { .. }))));
    assert_eq!(live.told_ns(RunSituation { reads_clock: true, ..exit(2) }), Some(2 * LATE_NS_MAX));
}

#[test]
fn who_waits_without_record_is_interrupted_when_the_timer_is_due() {
    let mut live = Live::new(STOOD_AT_NS, STOOD_AT_NS);
    let deadline_ns = Some(STOOD_AT_NS + 10 * MS);
    live.is_unrecorded = true;
    assert!(live.leaves(RunSituation { deadline_ns, ..RunSituation::default() }));
    assert_eq!(live.alarm_after(), Some(Duration::from_millis(10)));
    live.is_unrecorded = false;
    assert!(live.leaves(RunSituation { deadline_ns, ..exit(1) }));
    assert_eq!(live.alarm_after(), Some(Duration::from_millis(15)), "may make an exit by itself");
}

#[test]
fn the_host_is_told_when_the_guest_left_by_its_own_clock() {
    let mut live = Live::new(STOOD_AT_NS, STOOD_AT_NS);
    live.pass_ns(700 * MS + 300);
    match live.next(exit(1)) {
        // Guest time is sampled in microseconds.
        Next::Leave { now } => assert_eq!(now, HostNs(700 * MS)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_slice_ends_for_a_survivor_too() {
    let mut live = Live::new(1000 * MS, 0);
    let overdue =
        RunSituation { deadline_ns: Some(0), takes_interrupt: true, ..RunSituation::default() };
    assert!(live.captures(overdue));
    live.is_unrecorded = true;
    assert_eq!(live.run_mode(false), RunMode::Unrecorded);
    let wanting = RunSituation { entropy_wanted_bytes: 8, ..exit(2) };
    assert!(matches!(live.next(wanting), Next::Entropy { bytes: 8 }));
}

/// A follower's disk answers too; those answers reach the guest when it goes live, at an exit or at
/// a slice.
#[test]
fn what_the_disk_said_before_a_take_over_reaches_the_guest() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(512).unwrap();
    let file = DiskFile::open(image.path()).unwrap();
    let disk = Disk::start(file, CompletionPolicy::Immediate).unwrap();
    let queue = Arc::new(InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1)));
    let mut live = Live::new(1000 * MS, 0);
    queue.set_closed(true);
    queue.take_from_disk(disk.clone());
    let answered = queue.clone();
    disk.on_completion(move |_| answered.disk_completed());
    for id in 1..=3 {
        disk.submit(DiskRequest { id, op: DiskOp::Flush });
    }
    disk.drain();
    assert_eq!(disk.take(2).map(|answer| answer.id), Some(2), "logged by the old primary");
    queue.set_closed(false);
    queue.deadline_passed();
    live.pending = std::mem::take(&mut *queue.lock());
    assert!(live.captures(RunSituation { takes_interrupt: true, ..RunSituation::default() }));
    for expected in [1, 3] {
        match live.input(exit(9)) {
            Some(Input::DiskDone { id, .. }) => assert_eq!(id, expected),
            other => panic!("{other:?}"),
        }
    }
    assert!(live.leaves(exit(9)));
}

#[test]
fn another_clock_goes_on_where_the_guest_is_and_forgets_the_times_of_the_one_before() {
    let mut live = Live::new(0, 0);
    live.is_unrecorded = true;
    assert!(live.leaves(RunSituation { deadline_ns: Some(MS), ..exit(1) }));
    assert!(live.alarm_after().is_some());
    live.pass_ns(9 * MS);
    let now = live.now;
    live.core.resume(GuestClock::anchored(now, GuestNs(STOOD_AT_NS)), GuestNs(STOOD_AT_NS));
    assert_eq!(live.core.take_setting().map(|setting| setting.after), Some(None));
    assert_eq!(live.told_ns(RunSituation { reads_clock: true, ..exit(7) }), Some(STOOD_AT_NS));
}

/// What a guest that reads the clock at every exit from `from` on is told, until it has caught up.
fn readings_ns(live: &mut Live, deadline_ns: Option<u64>, clock_ns: u64) -> Vec<u64> {
    let mut readings_ns = Vec::new();
    for at in 1.. {
        live.pass_ns(SAMPLE_NS);
        let reads = RunSituation { reads_clock: true, deadline_ns, ..exit(at) };
        let told_ns = live.told_ns(reads).unwrap();
        readings_ns.push(told_ns);
        if told_ns + LATE_NS_MAX > clock_ns + live.now.0 {
            break;
        }
    }
    readings_ns
}

#[test]
fn after_a_stall_time_moves_in_steps_wherever_the_guest_is_in_its_tick() {
    const STALL_NS: u64 = 1_000 * MS;
    const TICK_NS: u64 = 10 * MS;
    for deadline_ns in [None, Some(STOOD_AT_NS - 1), Some(STOOD_AT_NS + TICK_NS)] {
        let mut live = Live::new(STOOD_AT_NS + STALL_NS, STOOD_AT_NS);
        let told_ns = readings_ns(&mut live, deadline_ns, STOOD_AT_NS + STALL_NS);
        let caught_up_ns = told_ns.last().unwrap() - STOOD_AT_NS;
        assert!(caught_up_ns >= STALL_NS - LATE_NS_MAX, "{deadline_ns:?}: only {caught_up_ns}");
        for (before_ns, after_ns) in [STOOD_AT_NS].iter().chain(&told_ns).zip(&told_ns) {
            let step_ns = after_ns - before_ns;
            assert!(step_ns <= LATE_NS_MAX + TICK_NS, "{deadline_ns:?}: {before_ns} {after_ns}");
        }
    }
}

/// A kernel that reads its clock over again when a tick came between, and whose next tick is always
/// due by the next exit.
#[test]
fn a_guest_whose_ticks_cost_more_than_their_time_gets_on() {
    const EXITS_PER_TICK: u64 = 5;
    const ROUNDS: usize = 100;
    let mut live = Live::new(5_000_000 * MS, MS);
    let mut deadline_ns = MS;
    let mut at = 0;
    let mut read = |live: &mut Live, deadline_ns, interrupts_enabled| {
        at += 1;
        live.pass_ns(SAMPLE_NS);
        let there = RunSituation { deadline_ns, interrupts_enabled, ..exit(at) };
        let read_ns = live.told_ns(RunSituation { reads_clock: true, ..there }).unwrap();
        let told_ns = live.told_ns(there).unwrap_or(read_ns);
        (told_ns, deadline_ns.is_some_and(|at| at <= told_ns))
    };
    let (mut ticks, mut got_on) = (0, 0);
    for _ in 0..ROUNDS {
        let (now_ns, ticked) = read(&mut live, Some(deadline_ns), true);
        if !ticked {
            got_on += 1;
            continue;
        }
        ticks += 1;
        deadline_ns = now_ns + 2 * SAMPLE_NS;
        for _ in 0..EXITS_PER_TICK {
            let (_, again) = read(&mut live, Some(deadline_ns), false);
            assert!(!again, "the next tick waits before the guest is back from this one");
        }
    }
    assert!(ticks >= ROUNDS / 2 - 1 && got_on >= ROUNDS / 2 - 1, "{ticks} ticks, {got_on}");
}

/// A guest far behind its clock is stopped for its tick as soon as one that is not.
#[test]
fn the_alarm_of_a_guest_that_is_behind_is_not_late() {
    let mut live = Live::new(STOOD_AT_NS + 40_000 * MS, STOOD_AT_NS);
    let overdue =
        RunSituation { deadline_ns: Some(0), takes_interrupt: true, ..RunSituation::default() };
    assert!(live.captures(overdue));
    live.run_mode(false);
    assert!(live.leaves(RunSituation { deadline_ns: Some(STOOD_AT_NS + 1000 * MS), ..exit(2) }));
    assert_eq!(live.alarm_after(), Some(Duration::from_millis(1005)));
}

/// The timer may go off where the guest cannot take an interrupt.
#[test]
fn every_exit_at_which_a_tick_is_held_sets_the_alarm() {
    let mut live = Live::new(STOOD_AT_NS, STOOD_AT_NS);
    live.pass_ns(MS);
    let at = |at, deadline_ns| RunSituation { deadline_ns: Some(deadline_ns), ..exit(at) };
    let now_ns = live.told_ns(at(1, STOOD_AT_NS + 1)).unwrap();
    for exit in [2, 3] {
        live.pass_ns(MS);
        assert!(live.leaves(at(exit, now_ns + 1)));
        assert_eq!(live.alarm_after(), Some(Duration::from_millis(5)), "exit {exit}");
    }
}

/// One whose timer is further away than a step, and who reads no clock.
#[test]
fn a_guest_that_is_behind_gets_to_a_timer_that_is_far_ahead() {
    const DEADLINE_NS: u64 = STOOD_AT_NS + 300 * MS;
    let mut live = Live::new(STOOD_AT_NS + 40_000 * MS, STOOD_AT_NS);
    let deadline_ns = Some(DEADLINE_NS);
    let computes = RunSituation { deadline_ns, takes_interrupt: true, ..RunSituation::default() };
    let mut told_ns = STOOD_AT_NS;
    for at in 1..1000 {
        while !live.captures(computes) {
            live.pass_ns(MS);
        }
        let slice = RunSituation { deadline_ns, ..exit(at) };
        while let Some(now_ns) = live.told_ns(slice) {
            told_ns = now_ns;
        }
        live.run_mode(false);
        if told_ns >= DEADLINE_NS {
            return;
        }
    }
    panic!("only {told_ns}");
}

/// A run that was told to end, with so much grace.
fn ending(grace: Duration) -> Live {
    let mut live = Live::new(0, 0);
    live.pending.grace = grace;
    live.pending.shutdown = Shutdown::Wanted;
    live
}

#[test]
fn who_listens_to_the_power_button_has_its_grace_and_who_does_not_has_none() {
    let stops = |next| matches!(next, Next::Step(Step::Stop(StopCause::Requested)));
    let hears = |at| RunSituation { hears_power_button: true, ..exit(at) };
    assert!(stops(ending(Duration::from_secs(1)).next(exit(1))));

    let mut live = ending(Duration::from_secs(1));
    assert_eq!(live.input(hears(1)), Some(Input::PowerButton));
    assert!(live.leaves(hears(1)));
    // One that computes with interrupts disabled makes no exit at which anybody would look.
    assert_eq!(live.alarm_after(), Some(Duration::from_secs(1)));
    live.pass_ns(999 * MS);
    let sleeps = RunSituation { halted: true, ..hears(2) };
    assert!(matches!(live.next(sleeps), Next::Wait { until: Some(HostNs(1_000_000_000)) }));
    assert!(!live.captures(RunSituation::default()));
    live.pass_ns(MS);
    assert!(live.captures(RunSituation::default()));
    assert!(stops(live.next(hears(3))));
}

#[test]
fn a_restored_guest_first_learns_that_it_is_another() {
    let queue = Arc::new(InputQueue::new(resting_timer().unwrap(), Duration::from_millis(1)));
    let timer = GuestTimer::new(resting_timer().unwrap());
    let mut live = LiveInputs::new(queue, HostClock::host_start(), timer, InputDelays::default());
    live.renew_identity();
    let Ok(Step::Apply(Input::NewIdentity { generation_id, unix_s })) = live.next(&exit(3)) else {
        panic!("no identity")
    };
    assert_ne!(generation_id, [0; 16]);
    assert!(unix_s.abs_diff(host_unix_seconds()) < 60);
    assert!(matches!(live.next(&exit(3)), Ok(Step::Proceed)));
}

#[test]
fn what_is_typed_reaches_the_guest_or_ends_the_run() {
    let queue = InputQueue::new(resting_timer().unwrap(), Duration::from_millis(5));
    queue.take_typed(Typed::Bytes(b"ls"));
    queue.take_typed(Typed::Break);
    assert!(!queue.is_stopped());
    queue.take_typed(Typed::Quit);
    let waiting = queue.lock();
    assert_eq!(waiting.console, *b"ls");
    assert_eq!(waiting.signals, [Input::ConsoleBreak]);
    assert_eq!(waiting.stop, Some((StopCause::Requested, Urgency::NextExit)));
}
