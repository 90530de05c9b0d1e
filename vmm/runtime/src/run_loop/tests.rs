//! The loop with a fake machine: what is done in what order, and what the inputs are told.

use std::collections::VecDeque;

use ftvmm_devices::{Input, Output};
use ftvmm_replication::{MemoryCheckMode, Slice, StatePart};

use super::*;
use crate::testing::{Fake, NOW_NS, PIO, RESTORED, Told};

/// Inputs that give their steps one after the other, and then say `Stop`.
struct Script {
    told: Told,
    mode: RunMode,
    steps: VecDeque<Step>,
}

impl InputSource for Script {
    fn next(&mut self, situation: &RunSituation) -> Result<Step, InputError> {
        let here = situation.at.map_or_else(|| "between exits".to_owned(), |at| at.to_string());
        self.told.tell(format!("next {here}"));
        Ok(self.steps.pop_front().unwrap_or(Step::Stop(StopCause::Requested)))
    }

    fn answer(&mut self, answer: Answer) -> Result<(), InputError> {
        self.told.tell(match answer {
            Answer::Measured { at, .. } => format!("measured at {at}"),
            Answer::Captured { at, parts } => format!("captured {} part as {at}", parts.len()),
            Answer::Saved(state) => format!("saved at {}", state.at),
            Answer::Restored { stands: None, .. } => "restored a part".into(),
            Answer::Restored { stands: Some(stands), .. } => {
                format!("restored at {} at {} ns", stands.at, stands.guest_ns)
            }
        });
        Ok(())
    }

    fn run_mode(&mut self, at: Ordinal, _: bool) -> RunMode {
        self.told.tell(format!("leave {at}"));
        self.mode
    }
}

/// Runs `machine` with these steps; what was done, and how it ended.
fn told(
    mut machine: Fake,
    mode: RunMode,
    steps: Vec<Step>,
) -> (Vec<String>, Result<Ending, RunError>, Ordinal) {
    let told = machine.told.clone();
    let mut inputs = Script { told: told.clone(), mode, steps: steps.into() };
    let mut last = Ordinal(0);
    let result = run(&mut machine, &mut inputs, &mut told.clone(), &mut last);
    (told.take(), result, last)
}

fn slice() -> Vec<Slice> {
    vec![Slice { pages: vec![], cpu: Some(vec![1]) }]
}

#[test]
fn at_an_exit_come_inputs_then_its_answer_then_outputs_then_the_interrupt() {
    let mut machine = Fake::new(&[PIO, PIO]);
    machine.outputs = vec![Output::Frame(vec![1])];
    let steps = vec![Step::Apply(Input::Time { now_ns: 1 }), Step::Proceed];
    let (told, result, last) = told(machine, RunMode::Free, steps);
    let wanted = [
        "leave 0",
        "run Free",
        "next 1",
        "apply",
        "next 1",
        "handle exit 1",
        "emit 1",
        "interrupt",
        "leave 1",
        "run Free",
        "next 2",
    ];
    assert_eq!(told, wanted);
    let ending = result.unwrap();
    assert_eq!((ending.at, ending.at_exit, last), (Ordinal(2), true, Ordinal(2)));
    assert_eq!(ending.cause, StopCause::Requested, "before the exit is answered");
}

#[test]
fn a_recorded_guest_that_is_stopped_between_exits_only_goes_on() {
    let machine = Fake::new(&[PIO, Exit::Interrupted, Exit::WindowOpen, PIO]);
    let steps = vec![Step::Proceed, Step::Proceed, Step::Proceed];
    let (told, result, _) = told(machine, RunMode::UntilInterruptible, steps);
    let wanted = [
        "leave 0",
        "run UntilInterruptible",
        "next 1",
        "handle exit 1",
        "interrupt",
        "leave 1",
        "run UntilInterruptible",
        "next between exits",
        "leave 1",
        "run UntilInterruptible",
        "next between exits",
        "leave 1",
        "run UntilInterruptible",
        "next 2",
    ];
    assert_eq!(told, wanted);
    assert_eq!(result.unwrap().at, Ordinal(2));
}

#[test]
fn an_unrecorded_guest_takes_interrupts_and_sends_between_exits_too() {
    let mut machine = Fake::new(&[PIO, Exit::Interrupted]);
    machine.outputs = vec![Output::Frame(vec![1])];
    let steps = vec![Step::Proceed, Step::Apply(Input::Time { now_ns: 1 }), Step::Proceed];
    let (told, _, _) = told(machine, RunMode::Unrecorded, steps);
    let between = ["next between exits", "apply", "next between exits", "handle nothing 1"];
    assert_eq!(told[8..12], between, "{told:?}");
    assert_eq!(told[12..14], ["emit 1", "interrupt"]);
}

#[test]
fn a_slice_is_an_ordinal_of_its_own() {
    let machine = Fake::new(&[PIO, Exit::Interrupted, PIO]);
    let steps = vec![Step::Proceed, Step::Capture, Step::Proceed];
    let (told, result, _) = told(machine, RunMode::Free, steps);
    let wanted = ["capture", "captured 1 part as 2", "next 2", "handle slice 2", "interrupt"];
    assert_eq!(told[8..13], wanted, "{told:?}");
    assert_eq!(result.unwrap().at, Ordinal(3));
}

#[test]
fn a_slice_is_loaded_where_the_guest_stands_between_two_exits_or_at_one_that_never_was() {
    // Stopped before it.
    let machine = Fake::new(&[PIO, Exit::Interrupted]);
    let (before, ..) = told(machine, RunMode::Not, vec![Step::Proceed, Step::Load(slice())]);
    assert_eq!(before[7..], ["next between exits", "load", "next 2"]);
    // Past it: the exit 2 that this guest made is none of the recorder's.
    let machine = Fake::new(&[PIO, PIO]);
    let (past, ..) = told(machine, RunMode::Free, vec![Step::Proceed, Step::Load(slice())]);
    assert_eq!(past[7..], ["next 2", "load", "next 2"]);
}

#[test]
fn what_is_asked_for_is_answered_at_once() {
    let steps = vec![
        Step::Measure { memory: MemoryCheckMode::Renew },
        Step::SaveState,
        Step::Again,
        Step::RestoreState(StatePart::Pages(vec![])),
        Step::RestoreState(StatePart::Machine(vec![])),
    ];
    let (told, result, last) = told(Fake::new(&[Exit::Hlt]), RunMode::Free, steps);
    let restored = format!("restored at {} at {NOW_NS} ns", RESTORED.0);
    let wanted = [
        "next 1",
        "measure Renew",
        "measured at 1",
        "next 1",
        "save",
        "saved at 1",
        "next 1",
        "next 1",
        "restore",
        "restored a part",
        "next 1",
        "restore",
        &restored,
        "next 70",
    ];
    assert_eq!(told[2..], wanted);
    assert_eq!((result.unwrap().at, last), (RESTORED.0, RESTORED.0));
}

#[test]
fn a_state_is_not_saved_at_an_exit_that_must_be_completed_first() {
    let (told, ..) = told(Fake::new(&[PIO]), RunMode::Free, vec![Step::SaveState]);
    assert_eq!(told[2..], ["next 1", "save", "next 1"]);
}

#[test]
fn a_machine_that_restarts_does_so_after_its_outputs_and_one_that_ends_is_left_alone() {
    let mut machine = Fake::new(&[PIO, PIO]);
    machine.outputs = vec![Output::Console(vec![1])];
    machine.handled = vec![
        (Ordinal(1), Handled::Restarts),
        (Ordinal(2), Handled::Ended(StopCause::GuestPowerOff)),
    ];
    let (told, result, _) = told(machine, RunMode::Free, vec![Step::Proceed, Step::Proceed]);
    assert_eq!(told[3..7], ["handle exit 1", "emit 1", "restart 1", "interrupt"]);
    assert_eq!(told[10..], ["handle exit 2", "emit 2"]);
    let ending = result.unwrap();
    assert_eq!((ending.cause, ending.at_exit), (StopCause::GuestPowerOff, true));
    assert_eq!(ending.first_incomplete(), Ordinal(3));
}

#[test]
fn a_run_that_fails_says_how_far_it_came() {
    let (_, result, last) = told(Fake::new(&[PIO]), RunMode::Free, vec![Step::Proceed]);
    assert!(matches!(result, Err(RunError::Kvm(_))), "{result:?}");
    assert_eq!(last, Ordinal(1));
}
