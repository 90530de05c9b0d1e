//! How a run ends on each of its paths, with a fake machine.

use std::path::{Path, PathBuf};

use event_manager::{EventOps, Events, MutEventSubscriber};
use ftvmm_devices::Output;
use ftvmm_host::folder::Place;
use ftvmm_host::resting_timer;
use ftvmm_machine::exit::Exit;
use ftvmm_machine::situation::StopCause;
use ftvmm_machine::virtual_machine::Handled;
use ftvmm_replication::{Event, MemoryCheckMode};
use ftvmm_runtime::input::{
    CheckPlan, GuestTimer, InputDelays, LiveInputs, OnRecordError, Recorder,
};
use ftvmm_runtime::sources::Source;
use ftvmm_runtime::testing::{EndTold, Fake, PIO, Told, header};

use super::super::recording::{create_log, open_log};
use super::*;

impl Reported for Fake {
    fn report(&self) -> Report {
        Report { inputs: 1, ..Report::default() }
    }

    fn panic_reason(&self) -> String {
        ": oops".into()
    }
}

/// A role that tells what it is asked, and how far the recording is by then.
struct Asked {
    told: Told,
    outputs: Told,
    recording: PathBuf,
    is_over: bool,
    ends: EndTold,
}

impl RunRole<Fake> for Asked {
    fn outputs(&mut self) -> &mut dyn OutputSink {
        &mut self.outputs
    }

    fn conclude(
        &mut self,
        machine: &Fake,
        _: &mut Inputs,
        result: Result<Ending, CommandError>,
    ) -> Result<Conclusion, CommandError> {
        self.told.tell(format!("conclude, {}", read(&self.recording)));
        let ending = result?;
        let end = super::super::outcome::end_at(machine, &ending)?;
        Ok(Conclusion { is_over: self.is_over, ..Conclusion::new(ending, end) })
    }

    fn report(&self, _: &mut Inputs, report: Report) -> Report {
        self.ends.0.tell(format!("report, {}", read(&self.recording)));
        report
    }
}

/// What a recording holds.
fn read(path: &Path) -> String {
    let (mut through, mut inputs, mut end) = (Ordinal(0), 0, "no end");
    // While it is written, not even the header may be in the file.
    let groups = open_log(path)
        .into_iter()
        .flat_map(|mut reader| std::iter::from_fn(move || reader.next_group().ok().flatten()));
    for group in groups {
        through = group.horizon;
        for record in group.records {
            match record.event {
                Event::Input(_) => inputs += 1,
                Event::End(_) => end = "an end",
                _ => {}
            }
        }
    }
    format!("recorded through {through}: {inputs} input, {end}")
}

/// A thing that is waited for, and never comes.
struct Nothing(#[expect(dead_code, reason = "dropped with the event thread")] EndTold);

impl MutEventSubscriber for Nothing {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}

    fn init(&mut self, _: &mut EventOps<'_>) {}
}

struct Ran {
    told: Vec<String>,
    result: Result<(), CommandError>,
    report: serde_json::Value,
}

/// Runs a recorded guest that reads one line of its console and makes `exits`.
fn ran(
    exits: &[Exit],
    handled: Vec<(Ordinal, Handled)>,
    is_over: bool,
    prepared: Result<(), CommandError>,
) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let [recording, report] = ["r.log", "report"].map(|name| folder.path().join(name));
    let log = create_log(&recording, false, OnRecordError::Stop, &header()).unwrap();
    let told = Told::default();
    let ends = |what| EndTold(told.clone(), what);

    let lasts = Duration::from_millis(1);
    let queue = Arc::new(InputQueue::new(resting_timer().unwrap(), lasts));
    queue.push_console(b"x");
    let clock = HostClock::host_start();
    let timer = GuestTimer::new(resting_timer().unwrap());
    let delays = InputDelays::default();
    let live = LiveInputs::new(queue.clone(), clock, timer, delays);
    let (from, memory) = (Ordinal(1), MemoryCheckMode::None);
    let plan = CheckPlan { every_exits: 0, memory_every_exits: 0, from, memory };
    let recorder = Recorder::new(Some(log), None, plan);
    let inputs = Inputs::new(Source::Live(Box::new(live))).recorded(Some(recorder));

    let mut machine = Fake::new(exits);
    machine.handled = handled;
    machine.outputs = vec![Output::Console(vec![b'y'])];
    machine.ends = Some(ends("machine"));
    let outputs = Told::default();
    let role = Asked { told: told.clone(), outputs, recording, is_over, ends: ends("role") };
    let host = HostSide { queue: Some(queue), ..HostSide::default() };
    let events = ends("event thread");
    let written = Written { report: Place::of(&report).ok(), profile: None };
    let result = Run::new(machine, role, inputs, host, clock).go("solo", written, |host| {
        host.wait_for(vec![Box::new(Nothing(events))])?;
        prepared
    });
    let report = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    Ran { told: told.take(), result, report }
}

#[test]
fn a_run_that_fails_keeps_its_recordings_tail_and_ends_in_order() {
    let Ran { told, result, report } = ran(&[PIO, PIO], vec![], true, Ok(()));
    let wanted = [
        "conclude, recorded through 0: 0 input, no end",
        "report, recorded through 2: 1 input, no end",
        "role ends",
        "event thread ends",
        "machine ends",
    ];
    assert_eq!(told, wanted);
    let error = result.unwrap_err();
    assert_eq!(error.status(), 1, "{error}");
    assert_eq!((&report["exits"], &report["inputs"]), (&2.into(), &1.into()));
    assert!(report["end"].is_null() && report["state_digest"].is_null(), "{report}");
}

#[test]
fn what_fails_before_the_first_instruction_ends_in_the_same_order() {
    let prepared = Err(CommandError::Unsuitable);
    let Ran { told, result, report } = ran(&[PIO], vec![], true, prepared);
    let wanted = [
        "conclude, recorded through 0: 0 input, no end",
        "report, recorded through 0: 0 input, no end",
        "role ends",
        "event thread ends",
        "machine ends",
    ];
    assert_eq!(told, wanted);
    assert!(matches!(result, Err(CommandError::Unsuitable)));
    assert_eq!(report["exits"], 0);
}

#[test]
fn a_guest_that_switched_itself_off_is_the_recordings_end() {
    let off = vec![(Ordinal(2), Handled::Ended(StopCause::GuestPowerOff))];
    let Ran { told, result, report } = ran(&[PIO, PIO], off.clone(), true, Ok(()));
    // The guest did not get past exit 2, so the recording ends at exit 3.
    assert_eq!(told[1], "report, recorded through 2: 1 input, an end");
    result.unwrap();
    assert_eq!(report["end"], "guest_power_off");
    assert_eq!(report["state_digest"], "07".repeat(32));
    assert!(report["log_bytes"].as_u64().unwrap() > 0, "{report}");

    let Ran { told, .. } = ran(&[PIO, PIO], off, false, Ok(()));
    assert_eq!(told[1], "report, recorded through 2: 1 input, no end", "a replay stopped there");
}

#[test]
fn a_guest_that_crashed_is_a_failure_with_a_whole_recording() {
    let panicked = vec![(Ordinal(1), Handled::Ended(StopCause::GuestPanic))];
    let Ran { told, result, .. } = ran(&[PIO], panicked, true, Ok(()));
    assert_eq!(told[1], "report, recorded through 1: 1 input, an end");
    let error = result.unwrap_err();
    assert_eq!(error.status(), 1);
    assert!(error.to_string().contains("panicked: oops"), "{error}");
}
