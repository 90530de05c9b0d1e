//! One run of a guest, in any role: from a machine that is switched on to the exit status.

use std::sync::Arc;
use std::time::Duration;

use ftvmm_host::clock::HostClock;
use ftvmm_host::{Console, EventLoop, RawTerminal, StopLimit, Subscriber, read_console};
use ftvmm_replication::{End, Ordinal};
use ftvmm_runtime::control::ControlServer;
use ftvmm_runtime::input::{FinishedLog, InputQueue};
use ftvmm_runtime::run_loop;
use ftvmm_runtime::sources::Inputs;
use ftvmm_runtime::step::{Ending, OutputSink};
use ftvmm_runtime::transfer::Transfer;

use super::contain::run_guest;
use super::outcome::{Reported, verdict};
use super::recording::complete;
use super::written::Written;
use super::{CommandError, host};
use crate::report::Report;

/// What a run still does when its guest stands still.
const END: &str = "the end of the recording and of the report";

/// How long [`END`] may take: all memory is digested.
fn end_longest(memory_mib: u32) -> Duration {
    const LEAST: Duration = Duration::from_secs(20);
    const PER_GIB: Duration = Duration::from_secs(10);
    LEAST + PER_GIB * (memory_mib / 1024)
}

/// What differs between the roles. Dropped before the host's threads end.
pub trait RunRole<M> {
    /// Where the guest's outputs go.
    fn outputs(&mut self) -> &mut dyn OutputSink;

    /// The guest has stopped: informs the other host, if there is one, and returns the result of
    /// the run.
    ///
    /// # Errors
    /// When the run failed, or its end cannot be told. The recording has no end then.
    fn conclude(
        &mut self,
        machine: &M,
        inputs: &mut Inputs,
        result: Result<Ending, CommandError>,
    ) -> Result<Conclusion, CommandError>;

    /// Adds to the report what the role knows.
    fn report(&self, inputs: &mut Inputs, report: Report) -> Report;
}

/// The result of a run that did not fail.
pub struct Conclusion {
    /// Where it ended.
    pub ending: Ending,
    /// The end record, if a replay can end at this point too.
    pub end: Option<End>,
    /// True when the guest has ended, and not only the replay.
    pub is_over: bool,
    /// What the other host or the recording says.
    pub verdict: Result<(), CommandError>,
    /// A failure to report when nothing else failed.
    pub remark: Result<(), CommandError>,
}

impl Conclusion {
    /// The guest ended here, without a failure.
    pub fn new(ending: Ending, end: Option<End>) -> Self {
        Self { ending, end, is_over: true, verdict: Ok(()), remark: Ok(()) }
    }
}

/// What a run has of its host; a replay has nothing of it. Fields are dropped in their order: first
/// the terminal is as it was, then no event reaches the guest any more, then no client.
#[derive(Default)]
pub struct HostSide {
    /// Where the vCPU's thread waits, with its pulse.
    pub queue: Option<Arc<InputQueue>>,
    /// Where the guest prints.
    pub console: Option<Arc<Console>>,
    /// Ends the process when its end takes too long.
    pub stop_limit: Option<Arc<StopLimit>>,
    /// Sends the guest's state to a backup or a file.
    pub transfer: Option<Arc<Transfer>>,
    /// How much memory is digested at the end.
    pub memory_mib: u32,
    /// The terminal, while what is typed there is the guest's.
    pub terminal: Option<RawTerminal>,
    /// The thread that waits for the host.
    pub events: Option<EventLoop>,
    /// The control socket.
    #[expect(dead_code, reason = "it is served while it is held")]
    pub control: Option<ControlServer>,
}

impl HostSide {
    /// Starts to wait for the host's events.
    ///
    /// # Errors
    /// When the host refuses a descriptor or a thread.
    pub fn wait_for(&mut self, events: Vec<Subscriber>) -> Result<(), CommandError> {
        self.events = Some(EventLoop::start(events)?);
        Ok(())
    }

    /// Gives the guest what is typed at the terminal.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn enter_terminal(&mut self) -> Result<(), CommandError> {
        let terminal = self.terminal.insert(RawTerminal::enter());
        match &self.queue {
            Some(queue) => {
                let queue = queue.clone();
                read_console(terminal, move |typed| queue.take_typed(typed))
                    .map_err(host("console thread"))
            }
            None => Ok(()),
        }
    }

    fn begin(&self) {
        if let Some(queue) = &self.queue {
            queue.pulse().begin();
        }
    }

    /// The guest does not run any more.
    fn stand_still(&mut self) {
        if let Some(queue) = &self.queue {
            queue.pulse().end();
        }
        if let Some(transfer) = &self.transfer {
            transfer.end();
        }
        self.prolong_stop();
        self.terminal = None;
    }

    /// A stop that was ordered may take as long as the end of a run does.
    fn prolong_stop(&self) {
        if let Some(limit) = &self.stop_limit {
            limit.goes_on(end_longest(self.memory_mib), END);
        }
    }

    fn finish_console(&self) {
        if let Some(console) = &self.console {
            console.finish();
        }
    }
}

/// One run of a guest. It is put together by its role and ended here, in one order on every path:
/// also when something fails between power-on and the first instruction, and when the run itself
/// fails.
///
/// 1. The pulse ends, so that the vCPU thread is not taken for a stuck one.
/// 2. The transfer ends: a snapshot that was begun is complete or gone.
/// 3. An ordered stop gets the time the rest may take.
/// 4. The terminal is as it was.
/// 5. The role concludes: the other host, or the recording that is replayed, has the last word.
/// 6. The recording is closed: with the guest's end, or with all there was before a failure.
/// 7. What the guest printed is written out.
/// 8. The report is written, also of a run that failed.
///
/// What is left ends with the fields, in their order: the role waits for its incident reports, then
/// the event thread ends, then the control socket, then the inputs and the machine.
pub struct Run<M, R> {
    role: R,
    host: HostSide,
    inputs: Inputs,
    machine: M,
    /// The last exit of the guest.
    last: Ordinal,
    clock: HostClock,
}

impl<M: Reported, R: RunRole<M>> Run<M, R> {
    /// A run of `machine`, which is switched on.
    pub fn new(machine: M, role: R, inputs: Inputs, host: HostSide, clock: HostClock) -> Self {
        Self { role, host, inputs, machine, last: Ordinal(0), clock }
    }

    /// Runs the guest, after `prepare`, to its end, and writes what is to be written. A report
    /// calls the role `name`.
    ///
    /// # Errors
    /// Anything that ends the run badly.
    pub fn go(
        mut self,
        name: &'static str,
        written: Written,
        prepare: impl FnOnce(&mut HostSide) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        let prepared = prepare(&mut self.host).and_then(|()| run_guest());
        let started_ns = self.clock.host_now_ns();
        let result = prepared.and_then(|()| self.execute());
        let seconds = (self.clock.host_now_ns() - started_ns) as f64 / 1e9;
        self.end(result, Report { role: name, seconds, ..Report::default() }, &written)
    }

    fn execute(&mut self) -> Result<Ending, CommandError> {
        self.host.begin();
        let Self { machine, inputs, role, last, .. } = self;
        Ok(run_loop::run(machine, inputs, role.outputs(), last)?)
    }

    fn end(
        mut self,
        result: Result<Ending, CommandError>,
        report: Report,
        places: &Written,
    ) -> Result<(), CommandError> {
        self.host.stand_still();
        let concluded = self.role.conclude(&self.machine, &mut self.inputs, result);
        // The other host may have ordered a stop only now.
        self.host.prolong_stop();
        let recording = self.close_recording(concluded.as_ref().ok());
        self.host.finish_console();
        let report = self.report(report, concluded.as_ref().ok(), recording.as_ref());
        let written = places.write(&report);
        let Conclusion { ending, verdict: said, remark, .. } = concluded.inspect_err(|_| {
            // The failure itself is what the command ends with.
            if let Err(error) = &written {
                tracing::error!("{error}");
            }
        })?;
        written?;
        said?;
        verdict(&self.machine, &ending)?;
        complete(recording)?;
        remark
    }

    fn close_recording(&mut self, conclusion: Option<&Conclusion>) -> Option<FinishedLog> {
        let recording = self.inputs.take_recording()?;
        Some(match conclusion {
            None => recording.abandon(),
            Some(Conclusion { ending, end, is_over, .. }) => {
                recording.finish(ending.first_incomplete(), end.filter(|_| *is_over))
            }
        })
    }

    fn report(
        &mut self,
        begun: Report,
        conclusion: Option<&Conclusion>,
        recording: Option<&FinishedLog>,
    ) -> Report {
        let end = conclusion.and_then(|conclusion| conclusion.end);
        let console = self.host.console.as_ref();
        let network = self.host.queue.as_ref().map(|queue| queue.network().report());
        let broken = recording.and_then(|recording| recording.broken.as_ref());
        let report = Report {
            role: begun.role,
            seconds: begun.seconds,
            end: conclusion.map(|conclusion| conclusion.ending.cause),
            exits: self.last.0,
            log_bytes: recording.map_or(0, |recording| recording.bytes),
            recording_error: broken.map(ToString::to_string),
            state_digest: end.map(|end| crate::report::hex(&end.state_digest)),
            console_dropped_bytes: console.map_or(0, |console| console.dropped_bytes()),
            network: network.unwrap_or_default(),
            ..self.machine.report()
        };
        self.role.report(&mut self.inputs, report)
    }
}

#[cfg(test)]
mod tests;
