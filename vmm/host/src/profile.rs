//! Where a run's time goes (`--profile FILE`): each thread is in one phase at a time, and a phase
//! is given the ticks of the processor's counter that pass in it.
//!
//! Under an emulator that counts instructions (`-icount`) a tick is an instruction. Nothing of this
//! reaches the guest.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::Serialize;

use crate::clock::{HostClock, host_cpu_ns, host_ticks};
use crate::sync::{Mutex, lock};

/// What a thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// What no other phase names.
    Other,
    /// `KVM_RUN`, with the guest in it.
    Kvm,
    /// An exit is handled: devices, interrupts, checks.
    Handler,
    /// The inputs for an exit are found.
    Inputs,
    /// The log is written or read.
    Log,
    /// The session decides.
    Session,
    /// The channel is written or read, TLS included.
    Channel,
    /// The tap is written or read.
    Tap,
    /// The disk is read or written.
    Disk,
    /// The thread waits: ticks here are time that passes, not work.
    Wait,
}

/// Every phase, in the order of their numbers.
const PHASES: [Phase; 10] = [
    Phase::Other,
    Phase::Kvm,
    Phase::Handler,
    Phase::Inputs,
    Phase::Log,
    Phase::Session,
    Phase::Channel,
    Phase::Tap,
    Phase::Disk,
    Phase::Wait,
];

/// What a thread spent in one phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spent {
    /// Ticks that passed in it.
    pub ticks: u64,
    /// How often it was entered.
    pub entered: u64,
}

/// Phases by thread, of a run so far. A phase counts when it is left.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Profile {
    /// Nanoseconds since the profile began.
    pub elapsed_ns: u64,
    /// Ticks since then.
    pub elapsed_ticks: u64,
    /// Nanoseconds of processor time that the process has had since it started.
    pub cpu_ns: u64,
    /// By the threads' names; those of one name are added up.
    pub threads: BTreeMap<String, BTreeMap<Phase, Spent>>,
}

static IS_ON: AtomicBool = AtomicBool::new(false);
static BEGUN: Mutex<Option<Begun>> = Mutex::new(None);

struct Begun {
    clock: HostClock,
    ticks: u64,
    threads: Vec<(String, Arc<Counters>)>,
}

impl Begun {
    /// For a new thread. It goes on with those of one of its name that has ended, so that the
    /// clients of a long run leave nothing behind.
    fn counters(&mut self, name: String) -> Arc<Counters> {
        // Nobody else holds what an ended thread had.
        let ended =
            self.threads.iter_mut().filter(|(other, _)| *other == name).find_map(
                |(_, counters)| Arc::get_mut(counters).is_some().then(|| counters.clone()),
            );
        if let Some(counters) = ended {
            return counters;
        }
        let counters = Arc::<Counters>::default();
        self.threads.push((name, counters.clone()));
        counters
    }
}

/// Of one thread, which alone writes them.
#[derive(Default)]
struct Counters {
    ticks: [AtomicU64; PHASES.len()],
    entered: [AtomicU64; PHASES.len()],
}

fn add(counter: &AtomicU64, more: u64) {
    // One thread writes, so no addition is lost.
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// Where this thread is.
struct Here {
    phase: Cell<Phase>,
    since: Cell<u64>,
    counters: Arc<Counters>,
}

impl Here {
    fn begin() -> Self {
        let name = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let counters = lock(&BEGUN).as_mut().map(|begun| begun.counters(name)).unwrap_or_default();
        Self { phase: Cell::new(Phase::Other), since: Cell::new(host_ticks()), counters }
    }

    fn change(&self, to: Phase) -> Phase {
        let now = host_ticks();
        let from = self.phase.replace(to);
        let passed = now.wrapping_sub(self.since.replace(now));
        add(&self.counters.ticks[from as usize], passed);
        from
    }
}

thread_local! {
    static HERE: Here = Here::begin();
}

/// The thread is in a phase until this is dropped.
#[must_use]
pub struct Within {
    before: Option<Phase>,
}

impl Drop for Within {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // A thread that ends has no place any more.
            let _ = HERE.try_with(|here| here.change(before));
        }
    }
}

/// This thread enters a phase, if the run has a profile.
#[inline]
pub fn enter(phase: Phase) -> Within {
    if !IS_ON.load(Ordering::Relaxed) {
        return Within { before: None };
    }
    let before = HERE.try_with(|here| {
        add(&here.counters.entered[phase as usize], 1);
        here.change(phase)
    });
    Within { before: before.ok() }
}

/// The profile of this run begins.
pub fn begin() {
    let (clock, ticks) = (HostClock::host_start(), host_ticks());
    *lock(&BEGUN) = Some(Begun { clock, ticks, threads: Vec::new() });
    IS_ON.store(true, Ordering::Release);
}

/// What was spent so far, of a run that has a profile.
pub fn so_far() -> Option<Profile> {
    let begun = lock(&BEGUN);
    let Begun { clock, ticks, threads } = begun.as_ref()?;
    let mut by_name = BTreeMap::<String, BTreeMap<Phase, Spent>>::new();
    for (name, counters) in threads {
        let phases = by_name.entry(name.clone()).or_default();
        for phase in PHASES {
            let of = |counters: &[AtomicU64]| counters[phase as usize].load(Ordering::Relaxed);
            let (ticks, entered) = (of(&counters.ticks), of(&counters.entered));
            if ticks > 0 || entered > 0 {
                let spent = phases.entry(phase).or_default();
                spent.ticks = spent.ticks.wrapping_add(ticks);
                spent.entered = spent.entered.wrapping_add(entered);
            }
        }
    }
    Some(Profile {
        elapsed_ns: clock.host_now_ns(),
        elapsed_ticks: host_ticks().wrapping_sub(*ticks),
        cpu_ns: host_cpu_ns(),
        threads: by_name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contain::Thread;

    /// One test: the profile is the process's.
    #[test]
    fn ticks_go_to_the_phase_in_which_they_pass() {
        drop(enter(Phase::Disk));
        assert_eq!(so_far(), None, "there is none yet");
        begin();
        let worker = Thread::Disk.start(|| {
            let _outer = enter(Phase::Handler);
            for _ in 0..3 {
                let _inner = enter(Phase::Log);
                std::hint::black_box([0_u8; 4096]);
            }
        });
        worker.unwrap().join().unwrap();
        let profile = so_far().unwrap();
        let worker = &profile.threads["disk"];
        let entered: Vec<_> = worker.iter().map(|(&phase, spent)| (phase, spent.entered)).collect();
        assert!(entered.contains(&(Phase::Handler, 1)), "{entered:?}");
        assert!(entered.contains(&(Phase::Log, 3)), "{entered:?}");
        assert!(worker[&Phase::Log].ticks > 0 && worker[&Phase::Handler].ticks > 0);
        let spent: u64 = worker.values().map(|spent| spent.ticks).sum();
        assert!(spent <= profile.elapsed_ticks, "{profile:?}");
        assert!(profile.cpu_ns > 0);
        for (number, phase) in PHASES.into_iter().enumerate() {
            assert_eq!(phase as usize, number);
        }
    }

    #[test]
    fn a_thread_goes_on_where_one_of_its_name_has_ended() {
        let mut begun = Begun { clock: HostClock::host_start(), ticks: 0, threads: Vec::new() };
        let [first, second] = [(); 2].map(|()| begun.counters("client".into()));
        add(&first.entered[0], 1);
        assert!(!Arc::ptr_eq(&first, &second), "each is written by one thread");
        drop(first);
        let third = begun.counters("client".into());
        assert_eq!(third.entered[0].load(Ordering::Relaxed), 1);
        let _other = begun.counters("disk".into());
        assert_eq!(begun.threads.len(), 3);
    }
}
