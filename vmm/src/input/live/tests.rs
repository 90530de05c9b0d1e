//! What live inputs give, and when.

use nix::sys::timerfd::Expiration;

use ftvmm_replication::{Event, GroupEncoder, Record};

use ftvmm_devices::{DiskOp, DiskRequest};

use super::*;
use crate::disk::{Disk, DiskFile, Telling};
use crate::host::resting_timer;

/// Inputs of a guest whose time would be `guest_ns`, and who has been told `last_ns`; and where they come from.
fn live_inputs(guest_ns: u64, last_ns: u64) -> (Arc<LiveQueue>, LiveInputs) {
    let queue = Arc::new(LiveQueue::new(resting_timer().unwrap(), Duration::from_millis(1)));
    let clock = GuestClock::anchored(HostClock::host_start(), 0, guest_ns);
    let alarm = Alarm::new(resting_timer().unwrap());
    let delays = InputDelays::default();
    (queue.clone(), LiveInputs::new(queue, clock, last_ns, alarm, delays))
}

/// Bytes of log for a sample `exits` exits and `gap_ns` of host time after another.
fn sample_bytes(first_ns: u64, gap_ns: u64, exits: u64) -> u64 {
    let mut encoder = GroupEncoder::new();
    let mut push = |at, host_ns| {
        let now_ns = logged_ns(host_ns);
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
fn a_slice_ends_for_a_survivor_too() {
    let (queue, mut live) = live_inputs(1_000_000_000, 0);
    let overdue = Situation { deadline_ns: Some(0), takes_interrupt: true, ..Situation::default() };
    assert!(matches!(live.next(&overdue), Ok(Step::Capture)));
    queue.set_unrecorded(true);
    assert_eq!(live.run_mode(Ordinal(1), false), RunMode::Unrecorded);
    let wanting =
        Situation { at: Some(Ordinal(2)), entropy_wanted_bytes: 8, ..Situation::default() };
    assert!(matches!(live.next(&wanting), Ok(Step::Apply(Input::Entropy { .. }))));
}

/// A follower's disk answers too; those answers reach the guest when it goes live, at an exit or at a slice.
#[test]
fn what_the_disk_said_before_a_take_over_reaches_the_guest() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(512).unwrap();
    let file = DiskFile::open(image.path()).unwrap();
    let disk = Disk::start(file, Telling::AtOnce).unwrap();
    let (queue, mut live) = live_inputs(1_000_000_000, 0);
    queue.set_closed(true);
    queue.take_from_disk(disk.clone());
    let answered = queue.clone();
    disk.on_answer(move |_| answered.disk_answered());
    for id in 1..=3 {
        disk.submit(DiskRequest { id, op: DiskOp::Flush });
    }
    disk.drain();
    assert_eq!(disk.take(2).map(|answer| answer.id), Some(2), "logged by the old primary");
    queue.set_closed(false);
    queue.overdue();
    let computing = Situation { takes_interrupt: true, ..Situation::default() };
    assert!(matches!(live.next(&computing), Ok(Step::Capture)));
    let slice = Situation { at: Some(Ordinal(9)), ..Situation::default() };
    for expected in [1, 3] {
        match live.next(&slice) {
            Ok(Step::Apply(Input::DiskDone { id, .. })) => assert_eq!(id, expected),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(live.next(&slice), Ok(Step::Proceed)));
}

#[test]
fn a_restored_guest_never_sees_time_go_back() {
    const STOOD_AT_NS: u64 = 5_000_000_000;
    let (_queue, mut live) = live_inputs(0, 0);
    live.restored(STOOD_AT_NS);
    let reads = Situation { at: Some(Ordinal(7)), reads_clock: true, ..Situation::default() };
    let Ok(Step::Apply(Input::Time { now_ns })) = live.next(&reads) else { panic!("no sample") };
    assert!(now_ns >= STOOD_AT_NS, "{now_ns}");
}

/// What a guest that reads the clock at every exit from `from` on is told, until it has caught up.
fn readings_ns(live: &mut LiveInputs, from: u64, deadline_ns: Option<u64>) -> Vec<u64> {
    let reads = Situation { reads_clock: true, deadline_ns, ..Situation::default() };
    let mut readings_ns = Vec::new();
    for at in (from..).map(Ordinal) {
        let told_ns = match live.next(&Situation { at: Some(at), ..reads }) {
            Ok(Step::Apply(Input::Time { now_ns })) => now_ns,
            other => panic!("{other:?}"),
        };
        if readings_ns.last() != Some(&told_ns) {
            readings_ns.push(told_ns);
        }
        if told_ns + LATE_NS_MAX > live.now_ns() {
            break;
        }
    }
    readings_ns
}

#[test]
fn after_a_stall_time_moves_in_steps_wherever_the_guest_is_in_its_tick() {
    const STOOD_AT_NS: u64 = 5_000_000_000;
    const STALL_NS: u64 = 1_000_000_000;
    const TICK_NS: u64 = 10_000_000;
    for deadline_ns in [None, Some(STOOD_AT_NS - 1), Some(STOOD_AT_NS + TICK_NS)] {
        let (_queue, mut live) = live_inputs(STOOD_AT_NS + STALL_NS, STOOD_AT_NS);
        let told_ns = readings_ns(&mut live, 1, deadline_ns);
        let caught_up_ns = told_ns.last().unwrap() - STOOD_AT_NS;
        assert!(caught_up_ns >= STALL_NS - LATE_NS_MAX, "{deadline_ns:?}: only {caught_up_ns}");
        for (before_ns, after_ns) in [STOOD_AT_NS].iter().chain(&told_ns).zip(&told_ns) {
            let step_ns = after_ns - before_ns;
            assert!(step_ns <= LATE_NS_MAX + TICK_NS, "{deadline_ns:?}: {before_ns} {after_ns}");
        }
    }
}

#[test]
fn a_guest_that_computes_catches_up_at_a_pace_its_threads_can_follow() {
    const STOOD_AT_NS: u64 = 5_000_000_000;
    let (_queue, mut live) = live_inputs(STOOD_AT_NS + 40_000_000_000, STOOD_AT_NS);
    let began_ns = live.host_now_ns();
    let reads = Situation { reads_clock: true, deadline_ns: Some(0), ..Situation::default() };
    let mut told_ns = STOOD_AT_NS;
    for at in (1..5000).map(Ordinal) {
        let Ok(Step::Apply(Input::Time { now_ns })) =
            live.next(&Situation { at: Some(at), ..reads })
        else {
            panic!("no sample")
        };
        told_ns = now_ns;
    }
    let most_ns = LATE_NS_MAX + CATCH_UP * (live.host_now_ns() - began_ns);
    assert!(told_ns - STOOD_AT_NS <= most_ns, "{told_ns}");
    // At a halt every thread has had its turn.
    let halted = Situation { at: Some(Ordinal(5000)), halted: true, ..reads };
    let Ok(Step::Apply(Input::Time { now_ns })) = live.next(&halted) else { panic!("none") };
    assert!(now_ns >= told_ns + LATE_NS_MAX - SAMPLE_NS, "{now_ns} after {told_ns}");
}

/// A kernel that reads its clock over again when a tick came between, and whose next tick is always due by the next exit.
#[test]
fn a_guest_whose_ticks_cost_more_than_their_time_gets_on() {
    const EXITS_PER_TICK: u64 = 5;
    const ROUNDS: usize = 100;
    let (_queue, mut live) = live_inputs(5_000_000_000_000, 1_000_000);
    let mut deadline_ns = 1_000_000;
    let mut at = 0;
    let mut read = |live: &mut LiveInputs, deadline_ns, interrupts_enabled| {
        at += 1;
        let at = Some(Ordinal(at));
        let exit = Situation { at, deadline_ns, interrupts_enabled, ..Situation::default() };
        let Ok(Step::Apply(Input::Time { now_ns })) =
            live.next(&Situation { reads_clock: true, ..exit })
        else {
            panic!("no sample")
        };
        let rest = live.next(&Situation { deadline_ns, ..exit });
        assert!(matches!(rest, Ok(Step::Proceed | Step::Apply(_))), "{rest:?}");
        let told_ns =
            if let Ok(Step::Apply(Input::Time { now_ns })) = rest { now_ns } else { now_ns };
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
    const STOOD_AT_NS: u64 = 5_000_000_000;
    let (_queue, mut live) = live_inputs(STOOD_AT_NS + 40_000_000_000, STOOD_AT_NS);
    let timer = resting_timer().unwrap();
    live.alarm = Alarm::new(timer.clone());
    let overdue = Situation { deadline_ns: Some(0), takes_interrupt: true, ..Situation::default() };
    assert!(matches!(live.next(&overdue), Ok(Step::Capture)));
    live.run_mode(Ordinal(1), false);
    let deadline_ns = Some(STOOD_AT_NS + 1_000_000_000);
    let exit = Situation { at: Some(Ordinal(2)), deadline_ns, ..Situation::default() };
    assert!(matches!(live.next(&exit), Ok(Step::Proceed)));
    let left = match timer.get().unwrap() {
        Some(Expiration::OneShot(left)) => Duration::from(left),
        other => panic!("{other:?}"),
    };
    assert!(left <= Duration::from_millis(1200), "{left:?}");
}

/// The alarm may go off where the guest cannot take an interrupt.
#[test]
fn every_exit_at_which_a_tick_is_held_sets_the_alarm() {
    const STOOD_AT_NS: u64 = 5_000_000_000;
    let (_queue, mut live) = live_inputs(STOOD_AT_NS, STOOD_AT_NS);
    let timer = resting_timer().unwrap();
    live.alarm = Alarm::new(timer.clone());
    let exit = |at, deadline_ns| {
        // Due by now.
        std::thread::sleep(Duration::from_millis(1));
        Situation { at: Some(Ordinal(at)), deadline_ns: Some(deadline_ns), ..Situation::default() }
    };
    let first = live.next(&exit(1, STOOD_AT_NS + 1));
    let Ok(Step::Apply(Input::Time { now_ns })) = first else { panic!("{first:?}") };
    for at in [2, 3] {
        assert!(matches!(live.next(&exit(at, now_ns + 1)), Ok(Step::Proceed)));
        assert!(timer.get().unwrap().is_some(), "exit {at}");
        crate::host::set_timer(&timer, None);
    }
}

/// One whose timer is further away than a step, and who reads no clock.
#[test]
fn a_guest_that_is_behind_gets_to_a_timer_that_is_far_ahead() {
    const STOOD_AT_NS: u64 = 5_000_000_000;
    const DEADLINE_NS: u64 = STOOD_AT_NS + 300_000_000;
    let (_queue, mut live) = live_inputs(STOOD_AT_NS + 40_000_000_000, STOOD_AT_NS);
    let deadline_ns = Some(DEADLINE_NS);
    let computes = Situation { deadline_ns, takes_interrupt: true, ..Situation::default() };
    let mut told_ns = STOOD_AT_NS;
    for at in (1..1000).map(Ordinal) {
        while !matches!(live.next(&computes), Ok(Step::Capture)) {}
        let slice = Situation { at: Some(at), deadline_ns, ..Situation::default() };
        while let Ok(Step::Apply(Input::Time { now_ns })) = live.next(&slice) {
            told_ns = now_ns;
        }
        live.run_mode(at, false);
        if told_ns >= DEADLINE_NS {
            return;
        }
    }
    panic!("only {told_ns}");
}

#[test]
fn who_listens_to_the_power_button_has_its_grace_and_who_does_not_has_none() {
    let at = |at, hears_power_button| Situation {
        at: Some(Ordinal(at)),
        hears_power_button,
        ..Situation::default()
    };
    let (queue, mut live) = live_inputs(0, 0);
    queue.give_grace(Duration::from_secs(86_400));
    queue.shut_down();
    assert!(matches!(live.next(&at(1, true)), Ok(Step::Apply(Input::PowerButton))));
    assert!(matches!(live.next(&at(1, true)), Ok(Step::Proceed)));
    queue.shut_down();
    assert!(matches!(live.next(&at(2, true)), Ok(Step::Stop(StopCause::Requested))));

    let (queue, mut live) = live_inputs(0, 0);
    queue.give_grace(Duration::from_secs(86_400));
    queue.shut_down();
    assert!(matches!(live.next(&at(1, false)), Ok(Step::Stop(StopCause::Requested))));

    let (queue, mut live) = live_inputs(0, 0);
    queue.give_grace(Duration::from_nanos(1));
    queue.shut_down();
    assert!(matches!(live.next(&at(1, true)), Ok(Step::Apply(Input::PowerButton))));
    std::thread::sleep(Duration::from_nanos(1));
    assert!(matches!(live.next(&at(2, true)), Ok(Step::Stop(StopCause::Requested))));
}

/// A guest that computes with interrupts disabled makes no exit at which anybody would look.
#[test]
fn the_end_of_the_grace_stops_a_guest_that_computes() {
    let timer = resting_timer().unwrap();
    let (queue, mut live) = live_inputs(0, 0);
    live.alarm = Alarm::new(timer.clone());
    queue.give_grace(Duration::from_secs(86_400));
    queue.shut_down();
    let heard =
        Situation { at: Some(Ordinal(1)), hears_power_button: true, ..Situation::default() };
    assert!(matches!(live.next(&heard), Ok(Step::Apply(Input::PowerButton))));
    assert!(matches!(live.next(&heard), Ok(Step::Proceed)));
    assert!(timer.get().unwrap().is_some());
}

#[test]
fn a_restored_guest_first_learns_that_it_is_another() {
    let (_queue, mut live) = live_inputs(0, 0);
    live.renew_identity();
    let here = Situation { at: Some(Ordinal(3)), ..Situation::default() };
    let Ok(Step::Apply(Input::NewIdentity { generation_id, unix_s })) = live.next(&here) else {
        panic!("no identity")
    };
    assert_ne!(generation_id, [0; 16]);
    assert!(unix_s.abs_diff(host_unix_seconds()) < 60);
    assert!(matches!(live.next(&here), Ok(Step::Proceed)));
}

#[test]
fn a_guest_that_waited_without_a_timer_is_told_the_time_at_once() {
    let (queue, mut live) = live_inputs(0, 0);
    let waker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_nanos(2 * LATE_NS_MAX));
        queue.push_console(b"x");
    });
    let halted = Situation { at: Some(Ordinal(1)), halted: true, ..Situation::default() };
    assert!(matches!(live.next(&halted), Ok(Step::Apply(Input::ConsoleRx { .. }))));
    waker.join().unwrap();
    let told_ns = readings_ns(&mut live, 2, None);
    assert!(told_ns[0] > 2 * LATE_NS_MAX, "{told_ns:?}");
}

#[test]
fn a_sample_is_at_most_a_microsecond_old_and_never_in_the_future() {
    for now_ns in [0, 999, 1000, 1001, 123_456_789_999] {
        assert!((0..1000).contains(&(now_ns - logged_ns(now_ns))));
    }
}
