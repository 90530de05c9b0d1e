//! Watches whether the vCPU's thread makes progress. The host may hold it: in a write to a server
//! that is gone, in a call of a failing device. A thread that waits for an input or for
//! the other host is not held, and a guest that computes comes back when it is interrupted.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use ftvmm_host::profile::{self, Phase};

/// Units of the times in `/proc/PID/stat`: `USER_HZ`, 100 on every x86-64 Linux (proc(5)).
const NS_PER_TICK: u64 = 10_000_000;

/// What the watching thread reads of the vCPU thread.
#[derive(Debug, Default)]
pub struct Pulse {
    /// The thread's id while it runs the guest; 0 before and afterwards.
    thread: AtomicI32,
    beats: AtomicU64,
    rests: AtomicBool,
    stuck_ns: AtomicU64,
}

/// The thread waits of its own accord until this is dropped.
pub struct IdleGuard<'a> {
    pulse: &'a Pulse,
    _wait: profile::Within,
}

impl Drop for IdleGuard<'_> {
    fn drop(&mut self) {
        self.pulse.beat();
        self.pulse.rests.store(false, Ordering::Release);
    }
}

impl Pulse {
    /// This thread runs the guest from now on.
    pub fn begin(&self) {
        self.thread.store(nix::unistd::gettid().as_raw(), Ordering::Release);
    }

    /// The guest has ended.
    pub fn end(&self) {
        self.thread.store(0, Ordering::Release);
    }

    /// The thread has made progress.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// The thread is about to wait for something that may never come.
    pub fn idle(&self) -> IdleGuard<'_> {
        self.rests.store(true, Ordering::Release);
        IdleGuard { pulse: self, _wait: profile::enter(Phase::Wait) }
    }

    /// For how long the thread has been held, if it is.
    pub fn stuck_ns(&self) -> Option<u64> {
        Some(self.stuck_ns.load(Ordering::Relaxed)).filter(|&stuck_ns| stuck_ns > 0)
    }

    /// What the host's kernel says of the thread: its state, and the processor time it has had.
    fn thread_time(&self) -> Option<(char, u64)> {
        let thread = self.thread.load(Ordering::Acquire);
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?;
        // After the name, which may hold anything: state, then utime and stime as the 12th and
        // 13th.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?.chars().next()?;
        let mut times = fields.skip(10).map_while(|field| field.parse::<u64>().ok());
        Some((state, (times.next()? + times.next()?) * NS_PER_TICK))
    }
}

/// What a look at the thread says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuHealth {
    /// It has made progress, or waits, or computes.
    Well,
    /// It may be running the guest: interrupt it.
    Interrupt,
    /// The host does not run it.
    Stuck {
        /// For how long.
        unseen_ns: u64,
    },
}

/// Checks a [`Pulse`] from time to time.
#[derive(Debug)]
pub struct PulseWatch {
    limit_ns: u64,
    looked_ns: u64,
    beats: u64,
    unseen_ns: u64,
    worked_ns: u64,
    warned: bool,
}

impl PulseWatch {
    /// A thread is stuck when it was not seen for `limit_ns`.
    pub fn new(limit_ns: u64) -> Self {
        let (looked_ns, beats, unseen_ns, worked_ns) = (0, 0, 0, 0);
        Self { limit_ns, looked_ns, beats, unseen_ns, worked_ns, warned: false }
    }

    /// Looks; to be called several times within the limit. A pause of the watching thread itself,
    /// which the whole process may have made, does not count as the other's.
    pub fn look(&mut self, now_ns: u64, pulse: &Pulse) -> VcpuHealth {
        let since_ns = (now_ns - self.looked_ns).min(self.limit_ns / 4);
        self.looked_ns = now_ns;
        let beats = pulse.beats.load(Ordering::Relaxed);
        let moved = std::mem::replace(&mut self.beats, beats) != beats;
        let runs = pulse.thread.load(Ordering::Acquire) != 0;
        if moved || !runs || pulse.rests.load(Ordering::Acquire) {
            return self.is_well(pulse);
        }
        self.unseen_ns += since_ns;
        if self.unseen_ns < self.limit_ns / 4 {
            return VcpuHealth::Well;
        }
        // A thread that works is not held, however long it takes: it digests a big guest's memory.
        let (state, worked_ns) = pulse.thread_time().unwrap_or(('?', 0));
        let works = worked_ns.saturating_sub(self.worked_ns) > since_ns / 2 && self.worked_ns > 0;
        self.worked_ns = worked_ns;
        if works {
            self.unseen_ns = self.limit_ns / 4;
        }
        if self.unseen_ns < self.limit_ns {
            return VcpuHealth::Interrupt;
        }
        let unseen_ns = self.unseen_ns;
        pulse.stuck_ns.store(unseen_ns, Ordering::Relaxed);
        if !std::mem::replace(&mut self.warned, true) {
            let (thread, unseen_ms) = (pulse.thread.load(Ordering::Relaxed), unseen_ns / 1_000_000);
            tracing::error!(thread, %state, unseen_ms, "this host holds the guest's processor");
        }
        VcpuHealth::Stuck { unseen_ns }
    }

    fn is_well(&mut self, pulse: &Pulse) -> VcpuHealth {
        (self.unseen_ns, self.worked_ns) = (0, 0);
        if std::mem::take(&mut self.warned) {
            pulse.stuck_ns.store(0, Ordering::Relaxed);
            tracing::warn!("the guest's processor is back");
        }
        VcpuHealth::Well
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT_NS: u64 = 400;

    fn watched(now_ns: u64) -> (Pulse, PulseWatch) {
        let (pulse, mut watch) = (Pulse::default(), PulseWatch::new(LIMIT_NS));
        // A thread that is not there works never.
        pulse.thread.store(i32::MAX, Ordering::Relaxed);
        watch.look(now_ns, &pulse);
        pulse.beat();
        assert_eq!(watch.look(now_ns, &pulse), VcpuHealth::Well);
        (pulse, watch)
    }

    fn looks(watch: &mut PulseWatch, pulse: &Pulse, from_ns: u64) -> Vec<VcpuHealth> {
        (1..=5).map(|n| watch.look(from_ns + n * LIMIT_NS / 4, pulse)).collect()
    }

    #[test]
    fn a_thread_that_does_not_come_round_is_interrupted_and_then_stuck_until_it_does() {
        let (pulse, mut watch) = watched(1000);
        let stuck = |unseen_ns| VcpuHealth::Stuck { unseen_ns };
        let seen = looks(&mut watch, &pulse, 1000);
        let interrupts = [VcpuHealth::Interrupt; 3];
        assert_eq!((&seen[..3], &seen[3..]), (&interrupts[..], &[stuck(400), stuck(500)][..]));
        assert_eq!(pulse.stuck_ns(), Some(500));
        pulse.beat();
        assert_eq!(watch.look(2000, &pulse), VcpuHealth::Well);
        assert_eq!(pulse.stuck_ns(), None);
    }

    #[test]
    fn who_waits_or_has_ended_is_not_stuck() {
        let (pulse, mut watch) = watched(0);
        let rest = pulse.idle();
        assert_eq!(looks(&mut watch, &pulse, 0), [VcpuHealth::Well; 5]);
        drop(rest);
        assert_eq!(watch.look(1000, &pulse), VcpuHealth::Well);
        pulse.end();
        assert_eq!(looks(&mut watch, &pulse, 1000), [VcpuHealth::Well; 5]);
    }

    #[test]
    fn a_pause_of_the_whole_process_counts_once_at_most() {
        let (pulse, mut watch) = watched(0);
        assert_eq!(watch.look(1_000_000, &pulse), VcpuHealth::Interrupt);
        pulse.beat();
        assert_eq!(watch.look(1_000_001, &pulse), VcpuHealth::Well);
    }

    #[test]
    fn a_thread_that_works_is_not_stuck() {
        let pulse = Pulse::default();
        pulse.begin();
        let (state, before_ns) = pulse.thread_time().unwrap();
        assert_eq!(state, 'R');
        while pulse.thread_time().unwrap().1 < before_ns + 3 * NS_PER_TICK {}
        let mut watch = PulseWatch::new(4 * NS_PER_TICK);
        watch.beats = u64::MAX;
        watch.look(0, &pulse);
        for n in 1..20 {
            let worked_ns = pulse.thread_time().unwrap().1;
            while pulse.thread_time().unwrap().1 < worked_ns + NS_PER_TICK {}
            assert!(
                !matches!(watch.look(n * NS_PER_TICK, &pulse), VcpuHealth::Stuck { .. }),
                "{n}"
            );
        }
    }
}
