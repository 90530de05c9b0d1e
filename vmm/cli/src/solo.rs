//! A guest that runs alone, recorded or not.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use ftvmm_host::clock::{HostClock, host_unix_seconds};
use ftvmm_host::disk::{CompletionPolicy, Disk};
use ftvmm_host::folder::Place;
use ftvmm_host::{Console, Subscriber, Tap, TapReader};
use ftvmm_replication::{DiskMark, DiskPurpose, DiskState, LastRun};
use ftvmm_runtime::control::SoloOperator;
use ftvmm_runtime::input::{GuestTimer, InputQueue, LiveInputs, Recorder};
use ftvmm_runtime::outputs::HostOutputs;
use ftvmm_runtime::peer::announce_restored;
use ftvmm_runtime::sources::{Inputs, Source};
use ftvmm_runtime::step::{Ending, OutputSink};
use ftvmm_runtime::transfer::{ProgressCell, Restore, Transfer, TransferPort};

use super::args::RunArgs;
use super::disk::admit;
use super::guest_source::GuestSource;
use super::live_host::{
    HELD_LONGEST, SwitchedOn, check_plan, control, guest_timer, input_delays, input_queue,
    stop_on_signals, switch_on, watch_processor,
};
use super::outcome::end_at;
use super::progress_bar::TransferBar;
use super::run::{Conclusion, HostSide, Run, RunRole};
use super::written::Written;
use super::{CommandError, host};
use crate::guest::{Guest, GuestConfig, Machine};
use crate::report::Report;

/// The role of a guest that runs alone.
struct Solo {
    outputs: HostOutputs,
    disk: Option<Arc<Disk>>,
}

impl RunRole<Machine> for Solo {
    fn outputs(&mut self) -> &mut dyn OutputSink {
        &mut self.outputs
    }

    fn conclude(
        &mut self,
        machine: &Machine,
        _: &mut Inputs,
        result: Result<Ending, CommandError>,
    ) -> Result<Conclusion, CommandError> {
        let ending = result?;
        machine.tsc().warn_of_late_sites();
        let end = end_at(machine, &ending)?;
        if let Some(disk) = &self.disk {
            disk.close(DiskMark::default());
        }
        Ok(Conclusion::new(ending, end))
    }

    fn report(&self, _: &mut Inputs, report: Report) -> Report {
        Report { outputs: self.outputs.frames().load(Ordering::Relaxed), ..report }
    }
}

/// Runs a guest alone; what it writes at its end goes where `written` says.
///
/// # Errors
/// Anything that ends the run badly.
pub fn solo(args: &RunArgs, written: Written) -> Result<(), CommandError> {
    let (queue, input_timer) = input_queue(args)?;
    let stopped = queue.clone();
    let stop_limit = stop_on_signals(&queue, args, move || stopped.shut_down())?;
    let console = Console::start().map_err(host("thread for the console"))?;
    let tap = args.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?;
    let (source, disk) = GuestSource::of(args, host_unix_seconds(), CompletionPolicy::Immediate)?;
    let guest = Guest::assemble(&source.config)?;
    source.check(&guest)?;
    if let Some(disk) = &disk {
        admit(args, disk, DiskPurpose::Solo, LastRun::default(), None)?;
        disk.mark_now(DiskMark { state: DiskState::Active, ..DiskMark::default() })?;
        let answered = queue.clone();
        queue.take_from_disk(disk.clone());
        disk.on_completion(move |_| answered.disk_completed());
    }
    let network = queue.network().clone();
    let outputs = HostOutputs::new(tap.clone(), disk.clone(), console.clone(), network);
    let (transfer_cell, clock) = (Arc::new(OnceLock::new()), HostClock::host_start());
    let control = control(args, |snapshots| SoloOperator {
        queue: queue.clone(),
        outputs: outputs.frames(),
        console: console.clone(),
        tap: tap.clone(),
        recording: args.record.as_deref().and_then(|path| Place::of(path).ok()),
        snapshots,
        clock,
        transfer: transfer_cell.clone(),
        progress: ProgressCell::new(clock, Box::new(TransferBar::hidden())),
    })?;
    let mut events = events(args, &source, tap, &queue)?;
    let (timer, ticker) = guest_timer(&queue)?;
    events.extend([input_timer, ticker, watch_processor(queue.clone(), clock, HELD_LONGEST)?]);
    let host = HostSide {
        queue: Some(queue.clone()),
        console: Some(console),
        stop_limit: Some(stop_limit),
        control,
        ..HostSide::default()
    };
    let parts = Parts { host, queue, disk, clock, timer, transfer_cell };
    parts.switch_on(args, source, guest, outputs)?.go("solo", written, |host| {
        host.wait_for(events)?;
        host.enter_terminal()
    })
}

/// What a guest alone waits for besides its timers.
fn events(
    args: &RunArgs,
    source: &GuestSource,
    tap: Option<Tap>,
    queue: &Arc<InputQueue>,
) -> Result<Vec<Subscriber>, CommandError> {
    let Some(tap) = tap else { return Ok(Vec::new()) };
    let mut events: Vec<Subscriber> = Vec::new();
    if let (Some(net), Some(_)) = (&source.config.net, source.start()) {
        events.push(Box::new(announce_restored(tap.clone(), net.mac, queue.clone())?));
    }
    let uplink = args.net.as_ref().and_then(|net| net.uplink.clone());
    let queue = queue.clone();
    let on_frame = Box::new(move |frame| drop(queue.push_frame(frame)));
    events.push(Box::new(TapReader::new(tap, uplink, on_frame, Box::new(drop))));
    Ok(events)
}

/// What the run needs besides the guest.
struct Parts {
    host: HostSide,
    queue: Arc<InputQueue>,
    disk: Option<Arc<Disk>>,
    clock: HostClock,
    timer: GuestTimer,
    transfer_cell: Arc<OnceLock<Arc<Transfer>>>,
}

impl Parts {
    fn switch_on(
        self,
        args: &RunArgs,
        source: GuestSource,
        guest: Guest,
        outputs: HostOutputs,
    ) -> Result<Run<Machine, Solo>, CommandError> {
        let Self { mut host, queue, disk, clock, timer, transfer_cell } = self;
        // Files were read and hashed meanwhile.
        let config = GuestConfig { rtc_epoch_s: host_unix_seconds(), ..source.config.clone() };
        let SwitchedOn { machine, header, recording } =
            switch_on(args, guest, &config, source.start(), &queue)?;
        queue.set_unrecorded(recording.is_none());
        host.memory_mib = config.memory_mib;
        let copy = machine.memory_copy().filter(|_| args.control.is_some());
        let transfer =
            |copy| Arc::new(Transfer::new(copy, disk.clone(), queue.clone(), clock, header));
        host.transfer = copy.map(transfer);
        if let Some(transfer) = &host.transfer {
            let _ = transfer_cell.set(transfer.clone());
        }
        let mut live = LiveInputs::new(queue, clock, timer, input_delays(args));
        if source.start().is_some() {
            live.renew_identity();
        }
        let record = |recording| Recorder::new(Some(recording), None, check_plan(args));
        let inputs = Inputs::new(Source::Live(Box::new(live)))
            .recorded(recording.map(record))
            .transferable(host.transfer.clone().map(TransferPort::new))
            .restored(source.into_parts().map(|parts| Restore::new(parts, disk.clone())));
        Ok(Run::new(machine, Solo { outputs, disk }, inputs, host, clock))
    }
}
