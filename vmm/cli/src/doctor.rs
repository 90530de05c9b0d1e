//! `ftvmm doctor`: can this machine's KVM run guests deterministically?
//!
//! `/dev/kvm` answering is not enough. Some hypervisors interpret ring 0, ignore the CPUID table or
//! lose CR4.TSD, and answer every capability query like any other. So each property ftvmm rests on
//! is tried with a micro-guest ([`PROBES`]), and what fails is named.
//!
//! Invariants: an examination always ends, whatever KVM does; it leaves nothing behind but an empty
//! handler of one real-time signal; one failing check does not keep the others from being made.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use std::{fmt, thread};

use ftvmm_host::clock::HostClock;
use ftvmm_host::contain::landlock_here;
use ftvmm_kvm::micro_guest::Findings;
use ftvmm_kvm::probes::{Host, PROBES, SPEED_NAMES, Weight};
use serde::Serialize;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

/// What the examination found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// True when ftvmm can run guests here.
    pub suitable: bool,
    /// True when guest code runs so slowly that somebody must be interpreting it.
    pub interpreted: bool,
    /// One line: the verdict, and what to do.
    pub summary: String,
    /// Every check made, in order.
    pub checks: Vec<Check>,
}

/// One line of the diagnosis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at; the same at every examination.
    pub name: &'static str,
    /// Whether it holds.
    pub verdict: Verdict,
    /// What was found; when the check failed, also what would have been right.
    pub detail: String,
}

/// Whether a check holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It does.
    Pass,
    /// It does not, and every guest needs it.
    Fail,
    /// It does not, and the detail says what would not work.
    Warn,
    /// Nothing depends on it.
    Info,
}

/// Every so often the probing thread is interrupted, so that no guest runs for ever.
const KICK_PERIOD_MS: u64 = 25;
/// Interruptions after which a thread that makes no progress is abandoned: KVM hangs in the kernel.
/// Well above what one guest is allowed (`vmm/kvm/src/micro_guest`): a minute.
const KICKS_WITHOUT_PROGRESS_MAX: u32 = 2400;
/// Offset of the real-time signal that interrupts; the run loop of a guest uses offset 0.
const KICK_SIGNAL_OFFSET: i32 = 1;

const OPEN: &str = "/dev/kvm";
const LANDLOCK: &str = "confined files";
const COMPLETE: &str = "examination complete";

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Examines this machine. Takes a few seconds.
pub fn examine() -> Diagnosis {
    let mut diagnosis = supervise(KICKS_WITHOUT_PROGRESS_MAX, examine_host);
    let (name, verdict) = (LANDLOCK, Verdict::Info);
    diagnosis.checks.push(Check { name, verdict, detail: landlock_here().into() });
    diagnosis
}

/// Runs `work` on a thread of its own and collects the checks it makes, to the end or until nothing
/// more comes.
///
/// Meanwhile this thread interrupts the other every 25 ms with a signal whose handler does nothing:
/// that ends a `KVM_RUN` with `EINTR`, which no guest can notice. A signal that arrives just before
/// `KVM_RUN` is lost, and the next one does its work.
fn supervise(
    kicks_without_progress_max: u32,
    work: impl FnOnce(&mut dyn FnMut(Check)) + Send + 'static,
) -> Diagnosis {
    let signal = SIGRTMIN() + KICK_SIGNAL_OFFSET;
    if let Err(cause) = register_signal_handler(signal, on_kick) {
        let detail = format!("sigaction of the real-time signal {signal} failed: {cause}");
        return Diagnosis::new(vec![Check { name: COMPLETE, verdict: Verdict::Fail, detail }]);
    }
    let (sender, receiver) = mpsc::channel();
    let prober = thread::spawn(move || {
        // The caller may have blocked the signal on its own threads; a failure means it was not
        // blocked.
        let _ = unblock_signal(signal);
        work(&mut |check| {
            // The receiver only goes when it has given this thread up.
            let _ = sender.send(check);
        });
    });
    let mut checks = Vec::new();
    let mut kicks = 0;
    let complete = loop {
        match receiver.recv_timeout(Duration::from_millis(KICK_PERIOD_MS)) {
            Ok(check) => {
                checks.push(check);
                kicks = 0;
            }
            Err(RecvTimeoutError::Timeout) if kicks == kicks_without_progress_max => {
                break Err("KVM did not come back although signals were waiting");
            }
            Err(RecvTimeoutError::Timeout) => {
                kicks += 1;
                // A thread that has just ended needs no kick.
                let _ = prober.kill(signal);
            }
            Err(RecvTimeoutError::Disconnected) => {
                break prober.join().map_err(|_| "the probe panicked; this is a fault of ftvmm");
            }
        }
    };
    if let Err(why) = complete {
        let after = checks.last().map_or("nothing", |check| check.name);
        let detail = format!("{why} (the last check made was: {after})");
        checks.push(Check { name: COMPLETE, verdict: Verdict::Fail, detail });
    }
    Diagnosis::new(checks)
}

/// Makes every check and hands each to `found` as soon as it is made.
fn examine_host(found: &mut dyn FnMut(Check)) {
    let mut report = |name, weight, findings| found(Check::new(name, weight, findings));
    let clock = HostClock::host_start();
    match Host::open(Box::new(move || clock.host_now_ns())) {
        Ok(host) => {
            report(OPEN, Weight::Needed, Ok(host.describe()));
            for probe in PROBES {
                report(probe.name, probe.weight, (probe.examine)(&host));
            }
        }
        Err(failure) => report(OPEN, Weight::Needed, Err(failure)),
    }
}

impl Check {
    fn new(name: &'static str, weight: Weight, findings: Findings) -> Self {
        let (verdict, detail) = match (findings, weight) {
            (Ok(detail), Weight::Informational) => (Verdict::Info, detail),
            (Ok(detail), _) => (Verdict::Pass, detail),
            (Err(failure), Weight::Needed) => (Verdict::Fail, failure.to_string()),
            (Err(failure), Weight::Informational) => (Verdict::Info, failure.to_string()),
            (Err(failure), Weight::Useful { without_it }) => {
                (Verdict::Warn, format!("{failure}; would not work: {without_it}"))
            }
        };
        Self { name, verdict, detail }
    }
}

impl Diagnosis {
    fn new(checks: Vec<Check>) -> Self {
        let named = |verdict| {
            checks.iter().filter(move |c| c.verdict == verdict).map(|c| c.name).collect::<Vec<_>>()
        };
        let (failed, passed) = (named(Verdict::Fail), named(Verdict::Pass));
        let warned = named(Verdict::Warn);
        let suitable = failed.is_empty();
        let interpreted =
            [&failed, &warned].iter().any(|names| names.iter().any(|n| SPEED_NAMES.contains(n)));
        let slowly = if interpreted { ", but guest code is interpreted" } else { "" };
        let summary = if !suitable {
            let names = failed.join(", ");
            format!("unsuitable: {names}; use the lab (cargo xtask does this by itself)")
        } else if warned.is_empty() {
            format!("suitable: all {} checks hold", passed.len())
        } else {
            let (held, names) = (passed.len(), warned.join(", "));
            format!("suitable{slowly}: {held} checks hold; not needed by most guests: {names}")
        };
        Self { suitable, interpreted, summary, checks }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for Check { name, verdict, detail } in &self.checks {
            let verdict = match verdict {
                Verdict::Pass => "pass",
                Verdict::Fail => "FAIL",
                Verdict::Warn => "warn",
                Verdict::Info => "info",
            };
            writeln!(f, "{verdict}  {name:width$}  {detail}")?;
        }
        write!(f, "{}", self.summary)
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_kvm::micro_guest::{ProbeFailure, Ring, Stop, programs};

    use super::*;

    fn check(name: &'static str, verdict: Verdict) -> Check {
        Check { name, verdict, detail: format!("about {name}") }
    }

    #[test]
    fn one_failure_makes_unsuitable_and_is_named() {
        let diagnosis = Diagnosis::new(vec![
            check("HLT exit", Verdict::Pass),
            check("dirty log", Verdict::Fail),
            check("PMU", Verdict::Info),
        ]);
        assert!(!diagnosis.suitable);
        assert_eq!(
            diagnosis.summary,
            "unsuitable: dirty log; use the lab (cargo xtask does this by itself)"
        );
    }

    #[test]
    fn slowness_alone_says_so() {
        let diagnosis = Diagnosis::new(vec![
            check("HLT exit", Verdict::Pass),
            check(SPEED_NAMES[0], Verdict::Warn),
        ]);
        assert!(diagnosis.suitable && diagnosis.interpreted);
        let begins = "suitable, but guest code is interpreted: 1 checks hold; not needed by most \
                      guests: speed";
        assert!(diagnosis.summary.starts_with(begins), "{}", diagnosis.summary);
    }

    #[test]
    fn what_no_guest_needs_fails_no_host_and_says_what_would_not_work() {
        let failure = || ProbeFailure::Missing { names: "x".into() };
        let useful = Weight::Useful { without_it: "the template avx" };
        let check = Check::new("single step", useful, Err(failure()));
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.detail.ends_with("; would not work: the template avx"), "{}", check.detail);
        let diagnosis =
            Diagnosis::new(vec![check, Check::new("a", Weight::Needed, Ok("b".into()))]);
        assert!(diagnosis.suitable && !diagnosis.interpreted);
        assert_eq!(
            diagnosis.summary,
            "suitable: 1 checks hold; not needed by most guests: single step"
        );
        let information = Check::new("c", Weight::Informational, Err(failure()));
        assert_eq!(information.verdict, Verdict::Info);
        assert_eq!(Check::new("d", Weight::Needed, Err(failure())).verdict, Verdict::Fail);
    }

    #[test]
    fn the_table_is_aligned() {
        let diagnosis =
            Diagnosis::new(vec![check("a", Verdict::Pass), check("longer name", Verdict::Info)]);
        assert_eq!(
            diagnosis.to_string(),
            "pass  a            about a\n\
             info  longer name  about longer name\n\
             suitable: all 1 checks hold"
        );
    }

    #[test]
    fn json_keeps_the_words_scripts_look_for() {
        let json = serde_json::to_value(Diagnosis::new(vec![check("a", Verdict::Fail)])).unwrap();
        assert_eq!(json["suitable"], false);
        assert_eq!(json["checks"][0]["verdict"], "fail");
        assert_eq!(json["checks"][0]["name"], "a");
    }

    #[test]
    fn a_prober_that_never_ends_is_abandoned() {
        let diagnosis = supervise(3, |found| {
            found(check("first", Verdict::Pass));
            loop {
                thread::park();
            }
        });
        assert!(!diagnosis.suitable);
        assert_eq!(diagnosis.checks[1].name, COMPLETE);
        assert!(diagnosis.checks[1].detail.contains("first"), "{diagnosis}");
    }

    #[test]
    fn a_prober_that_panics_makes_unsuitable() {
        let diagnosis = supervise(KICKS_WITHOUT_PROGRESS_MAX, |_| panic!("on purpose"));
        assert!(!diagnosis.suitable);
        assert!(diagnosis.checks[0].detail.contains("panicked"), "{diagnosis}");
    }

    #[test]
    fn a_guest_that_never_stops_is_given_up() {
        let diagnosis = supervise(KICKS_WITHOUT_PROGRESS_MAX, |found| {
            let clock = HostClock::host_start();
            let Ok(host) = Host::open(Box::new(move || clock.host_now_ns())) else { return };
            let stop = host
                .guest(programs::count_down(), Ring::Kernel)
                .and_then(|mut guest| guest.run_to(Stop::Report));
            let given_up = matches!(stop, Err(ProbeFailure::NoStop { .. }));
            let verdict = if given_up { Verdict::Pass } else { Verdict::Fail };
            found(check("given up", verdict));
        });
        assert!(diagnosis.suitable, "{diagnosis}");
    }

    #[test]
    fn an_examination_makes_every_check_it_can() {
        let diagnosis = examine();
        let opened = diagnosis.checks[0].verdict == Verdict::Pass;
        let expected = 1 + if opened { 1 + PROBES.len() } else { 1 };
        assert_eq!(diagnosis.checks.len(), expected, "{diagnosis}");
        let failed =
            |name| diagnosis.checks.iter().any(|c| c.name == name && c.verdict == Verdict::Fail);
        if diagnosis.checks[0].detail.contains("kvm_pvm") {
            for name in ["CPUID mask (ring 0)", "RDTSC with CR4.TSD", "INT3"] {
                assert!(failed(name), "{name} holds under kvm_pvm? {diagnosis}");
            }
            assert!(!diagnosis.suitable);
        }
    }
}
