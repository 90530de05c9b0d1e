//! The run loop. It serves every role: a role is a choice of where inputs come from and where
//! outputs go, and the loop does not know which.
//!
//! ```text
//! exit → inputs for this ordinal → apply → handle → outputs → sink → interrupt
//! ```
//!
//! Inputs come before the exit is answered, so that a clock the guest reads shows the sample taken
//! at that very exit. Only synchronous exits have an ordinal. A recorded run that must give an
//! input to a guest that makes none stops it anywhere and makes that point one: a slice, whose
//! state goes into the log.

use ftvmm_host::profile::{self, Phase};
use ftvmm_replication::Ordinal;
use thiserror::Error;

use crate::input_error::InputError;
pub use crate::step::{Answer, Ending, InputSource, OutputSink, Standpoint, Step};
use ftvmm_machine::cpu::CpuError;
use ftvmm_machine::exit::Exit;
use ftvmm_machine::machine_state::StateError;
use ftvmm_machine::page_tracker::LoadError;
pub use ftvmm_machine::situation::{RunMode, RunSituation, StopCause};
use ftvmm_machine::virtual_machine::{Handled, RestartError, VirtualMachine};

/// Why a run failed.
#[derive(Debug, Error)]
pub enum RunError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] CpuError),
    /// A slice cannot be taken over.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The machine cannot go back to power-on.
    #[error(transparent)]
    Restart(#[from] RestartError),
    /// A state cannot be restored.
    #[error(transparent)]
    State(#[from] StateError),
    /// Inputs or outputs failed.
    #[error(transparent)]
    Input(#[from] InputError),
}

/// Where the guest stands.
#[derive(Clone, Copy)]
struct Point {
    /// The last exit ordinal.
    at: Ordinal,
    exit: Exit,
}

impl Point {
    fn ending(self, cause: StopCause) -> Ending {
        Ending { cause, at: self.at, at_exit: self.exit.is_synchronous() }
    }
}

/// Runs `machine` until it ends itself, its inputs end it, or something fails. `last` follows the
/// last exit ordinal, also of a run that fails.
///
/// # Errors
/// When KVM or the input source fails.
pub fn run<M: VirtualMachine>(
    machine: &mut M,
    inputs: &mut dyn InputSource,
    outputs: &mut dyn OutputSink,
    last: &mut Ordinal,
) -> Result<Ending, RunError> {
    let _handler = profile::enter(Phase::Handler);
    loop {
        let mode = inputs.run_mode(*last, machine.interrupt_waits());
        let exit = run_guest(machine, mode)?;
        if exit.is_synchronous() {
            *last = last.next();
        }
        let mut point = Point { at: *last, exit };
        let stopped = take_inputs(machine, inputs, &mut point);
        *last = point.at;
        if let Some(cause) = stopped? {
            return Ok(point.ending(cause));
        }
        let Point { at, exit } = point;
        if !exit.is_synchronous() && mode != RunMode::Unrecorded {
            continue;
        }
        let handled = machine.handle(at, exit)?;
        for output in machine.take_outputs() {
            let digest = machine.digest_output(at, &output);
            outputs.emit(at, digest, output)?;
        }
        match handled {
            Handled::GoesOn => {}
            Handled::Restarts => machine.restart(at)?,
            Handled::Ended(cause) => return Ok(point.ending(cause)),
        }
        machine.deliver_interrupt()?;
    }
}

fn run_guest<M: VirtualMachine>(machine: &mut M, mode: RunMode) -> Result<Exit, CpuError> {
    let _kvm = profile::enter(Phase::Kvm);
    machine.run(mode)
}

/// Does what the inputs say for this point, until they have no more for it or end the run.
fn take_inputs<M: VirtualMachine>(
    machine: &mut M,
    inputs: &mut dyn InputSource,
    point: &mut Point,
) -> Result<Option<StopCause>, RunError> {
    loop {
        let Point { at, exit } = *point;
        match inputs.next(&machine.situation(at, exit)?)? {
            Step::Apply(input) => machine.apply(input),
            Step::Measure { memory } => {
                let check = machine.measure(memory)?;
                inputs.answer(Answer::Measured { at, check })?;
            }
            Step::Capture => {
                let at = at.next();
                *point = Point { at, exit: Exit::Slice };
                let parts = machine.capture()?;
                inputs.answer(Answer::Captured { at, parts })?;
            }
            Step::Load(parts) => {
                // A guest that ran past the slice made an exit that never was.
                let at = if exit.is_synchronous() { at } else { at.next() };
                *point = Point { at, exit: Exit::Slice };
                machine.load(&parts)?;
            }
            Step::SaveState => {
                if let Some(state) = machine.save(at, exit)? {
                    inputs.answer(Answer::Saved(Box::new(state)))?;
                }
            }
            Step::RestoreState(part) => {
                let stands = machine.restore(&part)?.map(|(at, exit)| {
                    *point = Point { at, exit };
                    Standpoint { at, guest_ns: machine.now_ns() }
                });
                inputs.answer(Answer::Restored { part, stands })?;
            }
            Step::Again => {}
            Step::Proceed => return Ok(None),
            Step::Stop(cause) => return Ok(Some(cause)),
        }
    }
}

#[cfg(test)]
mod tests;
