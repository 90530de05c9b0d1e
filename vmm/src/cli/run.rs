//! `ftvmm --kernel …`: chooses where inputs come from and where outputs go, then enters the run loop.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ftvmm_replication::{End, LogHeader, LogWriter, MemoryLook, Ordinal};

use super::args::{Role, RunArgs};
use super::origin::Origin;
use super::{CommandError, check_report, host, write_report};
use crate::control::{ControlServer, Operator, SoloOperator};
use crate::disk::Telling;
use crate::guest::{Guest, GuestConfig};
use crate::host::clock::{HostClock, host_unix_seconds};
use crate::host::{
    BlockedSignals, Console, EventLoop, HostEventsError, HostOutputs, RawTerminal, STOP_LONGEST,
    StopLimit, Subscriber, Tap, TapReader, Ticker, WriteBehind, read_console, repeating,
    resting_timer, stderr_dropped_bytes,
};
use crate::input::{
    Alarm, CheckPlan, FileLog, FinishedLog, GuestClock, InputDelays, LiveInputs, LiveQueue, Look,
    OnRecordError, PulseWatch, Recorded, Restored,
};
use crate::kvm::install_kick_handler;
use crate::machine::Machine;
use crate::peer::announce_restored;
use crate::report::{Report, hex};
use crate::run_loop::{self, Ending, StopCause};
use crate::shipment::{Gauge, Shipment, ShippedInputs};
use crate::user_file::{self, Named};

/// The host may hold the processor of a guest that runs alone for so long before it is told.
const HELD_LONGEST: Duration = Duration::from_secs(1);

/// Runs a guest in the role the arguments name.
///
/// # Errors
/// Anything that ends the run badly.
pub fn run(args: &RunArgs) -> Result<(), CommandError> {
    check_files(args)?;
    install_kick_handler()?;
    match args.role {
        Role::Solo => solo(args),
        Role::Primary | Role::Backup => super::pair::pair(args),
    }
}

/// How often the recorder states what a replayer must agree with.
pub fn check_plan(args: &RunArgs) -> CheckPlan {
    CheckPlan {
        every_exits: args.check_every,
        memory_every_exits: args.check_memory_every,
        from: Ordinal(1),
        memory: MemoryLook::Renew,
    }
}

/// How long inputs wait for an exit of a recorded guest.
pub fn input_delays(args: &RunArgs) -> InputDelays {
    args.max_input_delay
        .map(Duration::from_millis)
        .map_or_else(InputDelays::default, InputDelays::all)
}

/// Where live inputs wait, and what waits for them to be overdue.
pub fn live_queue(args: &RunArgs) -> Result<(Arc<LiveQueue>, Subscriber), CommandError> {
    let timer = resting_timer()?;
    let queue = Arc::new(LiveQueue::new(timer.clone(), input_delays(args).first_wait()));
    queue.give_grace(Duration::from_secs(args.stop_grace));
    let waited = queue.clone();
    Ok((queue, Box::new(Ticker::on(timer, move || waited.overdue()))))
}

/// Looks whether the host holds the guest's processor for longer than `longest`, and says so in the log and in `status`. In
/// a pair the session does, and has the backup take over.
fn watch_processor(
    queue: Arc<LiveQueue>,
    clock: HostClock,
    longest: Duration,
) -> Result<Subscriber, HostEventsError> {
    let every = longest / 8;
    let mut watch = PulseWatch::new(longest.as_nanos() as u64);
    Ok(Box::new(repeating(every, move || {
        if watch.look(clock.host_now_ns(), queue.pulse()) == Look::Interrupt {
            queue.kick_vcpu();
        }
        every
    })?))
}

/// Calls `stop` when the host asks the run to end, and sees to it that it does end. To be called before the first thread
/// starts.
pub fn heed_signals(
    queue: &LiveQueue,
    args: &RunArgs,
    stop: impl Fn() + Send + Sync + 'static,
) -> Result<Arc<StopLimit>, CommandError> {
    let signals = BlockedSignals::block()?;
    let limit = StopLimit::start().map_err(host("thread for the end of the run"))?;
    queue.limit_stops_with(limit.clone());
    let longest = STOP_LONGEST + Duration::from_secs(args.stop_grace);
    signals.on_signal(limit.clone(), longest, stop)?;
    Ok(limit)
}

/// What a run still does when its guest stands still.
pub const END: &str = "the end of the recording and of the report";

/// How long [`END`] may take: all memory is digested.
pub fn end_longest(memory_mib: u32) -> Duration {
    const LEAST: Duration = Duration::from_secs(20);
    const PER_GIB: Duration = Duration::from_secs(10);
    LEAST + PER_GIB * (memory_mib / 1024)
}

/// The control socket, if there is to be one. To be held to the end of the run, and made after the signals are blocked.
pub fn control<O: Operator + 'static>(
    args: &RunArgs,
    operator: impl FnOnce() -> O,
) -> Result<Option<ControlServer>, CommandError> {
    let start = |path: &PathBuf| ControlServer::start(path, Arc::new(operator()));
    Ok(args.control.as_ref().map(start).transpose()?)
}

/// A recording that `path` is made for; refuses a path it cannot write before the guest has run.
pub fn create_log(
    path: &Path,
    overwrite: bool,
    on_error: OnRecordError,
    header: &LogHeader,
) -> Result<FileLog<WriteBehind>, CommandError> {
    let file = user_file::create("recording", path, overwrite)?;
    let file = WriteBehind::start(file).map_err(host("thread for the recording"))?;
    let writer = LogWriter::new(file, header)
        .map_err(|e| CommandError::Recording { path: path.into(), why: e.to_string() })?;
    let left = header.start.as_ref().map_or(0, |start| start.at.0.saturating_sub(1));
    Ok(FileLog::new(writer, Ordinal(left), path, on_error))
}

/// Refuses files that would be lost, and reports that could not be written.
fn check_files(args: &RunArgs) -> Result<(), CommandError> {
    let disk = args.disk.as_ref().map(|disk| disk.0.as_path());
    let named = Named::default()
        .read("--kernel", args.kernel.as_deref())
        .read("--initrd", args.initrd.as_deref())
        .read("--cpu-template", args.cpu_template.as_deref())
        .read("--restore", args.restore.as_deref())
        .written("--disk", disk)
        .written("--control", args.control.as_deref())
        .written("--record", args.record.as_deref())
        .written("--report", args.report.as_deref());
    named.check()?;
    if let Some(path) = &args.record {
        user_file::may_replace("recording", path, args.overwrite)?;
    }
    check_report(args.report.as_deref(), args.overwrite)
}

fn solo(args: &RunArgs) -> Result<(), CommandError> {
    let (queue, patience) = live_queue(args)?;
    let (stopped, watched) = (queue.clone(), queue.clone());
    let stop_limit = heed_signals(&queue, args, move || stopped.shut_down())?;
    let console = Console::start().map_err(host("thread for the console"))?;
    let mut waited: Vec<Subscriber> = vec![patience];
    let tap = args.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?;
    let (origin, disk) = Origin::of(args, host_unix_seconds(), Telling::AtOnce)?;
    let guest = Guest::assemble(&origin.config)?;
    origin.check(&guest)?;
    if let Some(disk) = &disk {
        let answered = queue.clone();
        queue.take_from_disk(disk.clone());
        disk.on_answer(move |_| answered.disk_answered());
    }
    let is_restored = origin.start().is_some();
    if let (Some(tap), Some(net), true) = (&tap, &origin.config.net, is_restored) {
        waited.push(Box::new(announce_restored(tap.clone(), net.mac, queue.clone())?));
    }
    let network = queue.network().clone();
    let mut outputs = HostOutputs::new(tap.clone(), disk.clone(), console.clone(), network.clone());
    let (means, host_clock) = (Arc::new(OnceLock::new()), HostClock::host_start());
    let _control = control(args, || SoloOperator {
        queue: queue.clone(),
        outputs: outputs.frames(),
        console: console.clone(),
        tap: tap.clone(),
        recording: args.record.clone(),
        clock: host_clock,
        shipment: means.clone(),
        gauge: Gauge::new(host_clock),
    })?;
    if let Some(tap) = tap {
        let uplink = args.net.as_ref().and_then(|net| net.uplink.clone());
        let (strays, on_link) = (Box::new(drop), Box::new(drop));
        waited.push(Box::new(TapReader::new(tap, queue.clone(), uplink, strays, on_link)));
    }
    // Files were read and hashed meanwhile.
    let config = GuestConfig { rtc_epoch_s: host_unix_seconds(), ..origin.config.clone() };
    let header = guest.log_header(&config);
    let log_header = LogHeader { start: origin.start(), ..header.clone() };
    let create =
        |path: &PathBuf| create_log(path, args.overwrite, args.record_error.into(), &log_header);
    let mut log = args.record.as_ref().map(create).transpose()?;
    let kicked = queue.clone();
    let ticker = Ticker::new(move || kicked.alarm())?;
    let alarm = Alarm::new(ticker.timer());
    waited.push(Box::new(ticker));
    waited.push(watch_processor(queue.clone(), host_clock, HELD_LONGEST)?);
    queue.set_unrecorded(log.is_none());
    let mut machine = guest.power_on(&config)?;
    tracing::info!("the guest is switched on");
    if let Some(fault) = args.inject_fault {
        machine.schedule(fault);
    }
    machine.show_network(queue.network().clone());
    queue.kick_with(machine.vcpu().kicker());
    let _events = EventLoop::start(waited)?;
    let terminal = RawTerminal::enter();
    read_console(queue.clone(), &terminal).map_err(host("console thread"))?;

    let started = host_clock.host_now_ns();
    let clock = GuestClock::anchored(host_clock, started, 0);
    let copy = machine.memory_copy().filter(|_| args.control.is_some());
    let own_disk = disk.clone();
    let ship = |copy| Arc::new(Shipment::new(copy, disk, queue.clone(), host_clock, header));
    let shipment = copy.map(ship);
    let mut live = LiveInputs::new(queue, clock, 0, alarm, input_delays(args));
    if is_restored {
        live.renew_identity();
    }
    if let Some(shipment) = &shipment {
        let _ = means.set(shipment.clone());
    }
    let parts = origin.into_parts();
    watched.pulse().begin();
    let result = match &mut log {
        None => {
            let mut inputs =
                Restored::new(ShippedInputs::new(live, shipment.clone()), parts, own_disk);
            run_loop::run(&mut machine, &mut inputs, &mut outputs)
        }
        Some(log) => {
            let recorded = Recorded::new(live, log, check_plan(args));
            let mut inputs =
                Restored::new(ShippedInputs::new(recorded, shipment.clone()), parts, own_disk);
            run_loop::run(&mut machine, &mut inputs, &mut outputs)
        }
    };
    if let Some(shipment) = shipment {
        shipment.end();
    }
    watched.pulse().end();
    stop_limit.goes_on(end_longest(config.memory_mib), END);
    drop(terminal);
    console.finish();
    let seconds = (host_clock.host_now_ns() - started) as f64 / 1e9;
    let ending = result?;
    machine.tsc().warn_of_late_sites();
    let end = end_at(&machine, &ending)?;
    let recording = log.map(|log| log.finish(ending.first_incomplete(), end));
    let report = Report {
        log_bytes: recording.as_ref().map_or(0, |recording| recording.bytes),
        recording_error: recording_error(recording.as_ref()),
        outputs: outputs.frames().load(Ordering::Relaxed),
        console_dropped_bytes: console.dropped_bytes(),
        network: network.report(),
        ..report("solo", &machine, &ending, end, seconds)
    };
    write_report(args.report.as_deref(), &report)?;
    verdict(&machine, &ending)?;
    complete(recording)
}

/// Why there is less in the recording than the guest did.
pub fn recording_error(recording: Option<&FinishedLog>) -> Option<String> {
    recording.and_then(|recording| recording.broken.as_ref()).map(ToString::to_string)
}

/// A recording that was wanted and is not there as a whole is a failure, however well the guest ended.
///
/// # Errors
/// What the host said when it was written.
pub fn complete(recording: Option<FinishedLog>) -> Result<(), CommandError> {
    recording.and_then(|recording| recording.broken).map_or(Ok(()), |broken| Err(broken.into()))
}

/// What a replay must agree with at the end, when the run ended where a replay can end too.
pub fn end_at(machine: &Machine, ending: &Ending) -> Result<Option<End>, CommandError> {
    Ok(if ending.at_exit { Some(machine.end(ending.reason())?) } else { None })
}

/// The part of the report every role has.
pub fn report(
    role: &'static str,
    machine: &Machine,
    ending: &Ending,
    end: Option<End>,
    seconds: f64,
) -> Report {
    let tsc = machine.tsc().counters();
    Report {
        role,
        end: Some(ending.cause),
        exits: ending.at.0,
        resets: machine.board().resets(),
        inputs: machine.inputs(),
        slices: machine.slices(),
        state_digest: end.map(|end| hex(&end.state_digest)),
        guest_faults: machine.board().guest_faults().count,
        disk: machine.board().disk_counters(),
        rdtsc_sites: tsc.sites,
        rdtsc_new_sites: tsc.new_sites,
        other_kernels: tsc.other_kernels,
        rdtsc_late_sites: tsc.late_sites,
        rdtsc_user_reads: tsc.user_reads,
        gp_passed: tsc.passed_gps,
        unknown_msrs: unknown_msrs(machine),
        log_dropped_bytes: stderr_dropped_bytes(),
        seconds,
        ..Report::default()
    }
}

fn unknown_msrs(machine: &Machine) -> BTreeMap<String, u64> {
    machine.msrs().unknown().iter().map(|(index, count)| (format!("{index:#x}"), *count)).collect()
}

/// A guest that crashed is a failure; every other end is clean.
pub fn verdict(machine: &Machine, ending: &Ending) -> Result<(), CommandError> {
    match ending.cause {
        StopCause::GuestPanic => Err(CommandError::GuestFailed(format!(
            "the guest's kernel panicked{}; see its console",
            machine.board().panic_reason().escape_ascii()
        ))),
        StopCause::GuestTripleFault => Err(CommandError::GuestFailed(
            "the guest's CPU shut down (triple fault); see its console".into(),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_the_host_holds_is_told_of_until_it_is_back() {
        let queue = Arc::new(LiveQueue::new(resting_timer().unwrap(), Duration::from_millis(5)));
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        let seen = queue.clone();
        // As in a call of the host that does not return.
        let thread = std::thread::spawn(move || {
            seen.pulse().begin();
            let _ = held.recv();
            seen.pulse().end();
        });
        let longest = Duration::from_millis(40);
        let watch = watch_processor(queue.clone(), HostClock::host_start(), longest).unwrap();
        let events = EventLoop::start(vec![watch]).unwrap();
        while queue.pulse().stuck_ns().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        while queue.pulse().stuck_ns().is_some() {
            queue.pulse().beat();
            std::thread::sleep(Duration::from_millis(1));
        }
        drop((events, let_go));
        thread.join().unwrap();
    }
}
