//! The host's side of a live run: the input queue, signals, the watchdog of the vCPU thread, the
//! control socket; and switching the guest on.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ftvmm_host::clock::{HostClock, sleep_ms};
use ftvmm_host::folder::Folder;
use ftvmm_host::{
    BlockedSignals, HostEventsError, STOP_LONGEST, StopLimit, Subscriber, Ticker, repeating,
    resting_timer,
};
use ftvmm_replication::{FileHeader, LogHeader, MemoryCheckMode, Ordinal, Start};
use ftvmm_runtime::control::{ControlError, ControlServer, Operator};
use ftvmm_runtime::input::{
    CheckPlan, GuestTimer, InputDelays, InputQueue, PulseWatch, Recording, VcpuHealth,
};

use super::args::RunArgs;
use super::recording::create_log;
use super::{CommandError, host};
use crate::guest::{Guest, GuestConfig, Machine};

/// How long the vCPU thread of a guest without a pair may be held before it is reported.
pub const HELD_LONGEST: Duration = Duration::from_secs(1);

/// How often the recorder states what a replayer must agree with.
pub fn check_plan(args: &RunArgs) -> CheckPlan {
    CheckPlan {
        every_exits: args.check_every,
        memory_every_exits: args.check_memory_every,
        from: Ordinal(1),
        memory: MemoryCheckMode::Renew,
    }
}

/// How long inputs wait for an exit of a recorded guest.
pub fn input_delays(args: &RunArgs) -> InputDelays {
    args.max_input_delay
        .map(Duration::from_millis)
        .map_or_else(InputDelays::default, InputDelays::all)
}

/// The input queue, and the timer for inputs that have waited long enough.
pub fn input_queue(args: &RunArgs) -> Result<(Arc<InputQueue>, Subscriber), CommandError> {
    let timer = resting_timer()?;
    let queue = Arc::new(InputQueue::new(timer.clone(), input_delays(args).first_wait()));
    queue.give_grace(Duration::from_secs(args.stop_grace));
    let waited = queue.clone();
    Ok((queue, Box::new(Ticker::on(timer, move || waited.deadline_passed()))))
}

/// The timer for the guest's next timer event.
pub fn guest_timer(queue: &Arc<InputQueue>) -> Result<(GuestTimer, Subscriber), CommandError> {
    let kicked = queue.clone();
    let ticker = Ticker::new(move || kicked.timer_due())?;
    Ok((GuestTimer::new(ticker.timer()), Box::new(ticker)))
}

/// A guest that is switched on.
pub struct SwitchedOn {
    /// The machine.
    pub machine: Machine,
    /// The header that identifies the guest, for a snapshot.
    pub header: FileHeader,
    /// Its recording, if there is to be one.
    pub recording: Option<Recording>,
}

/// Switches `guest` on; `queue` wakes its vCPU thread. Fails before that if the recording cannot be
/// written.
pub fn switch_on(
    args: &RunArgs,
    guest: Guest,
    config: &GuestConfig,
    start: Option<Start>,
    queue: &InputQueue,
) -> Result<SwitchedOn, CommandError> {
    let header = guest.log_header(config);
    let log_header = LogHeader { start, ..header.clone() };
    let create = |path: &PathBuf| {
        create_log(path, args.written.overwrite, args.record_error.into(), &log_header)
    };
    let recording = args.record.as_ref().map(create).transpose()?;
    let mut machine = guest.power_on(config)?;
    tracing::info!("the guest is switched on");
    if let Some(fault) = args.inject_fault {
        machine.schedule(fault, sleep_ms);
    }
    machine.show_network(queue.network().clone());
    queue.kick_with(Box::new(machine.vcpu().kicker()));
    Ok(SwitchedOn { machine, header, recording })
}

/// Reports, in the log and in `status`, when the host has not run the vCPU thread for `longest`. In
/// a pair the session does this, and the backup takes over.
pub fn watch_processor(
    queue: Arc<InputQueue>,
    clock: HostClock,
    longest: Duration,
) -> Result<Subscriber, HostEventsError> {
    let every = longest / 8;
    let mut watch = PulseWatch::new(longest.as_nanos() as u64);
    Ok(Box::new(repeating(every, move || {
        if watch.look(clock.host_now_ns(), queue.pulse()) == VcpuHealth::Interrupt {
            queue.kick_vcpu();
        }
        every
    })?))
}

/// Calls `stop` when a signal asks the run to end, and ends the process when that takes too long.
/// Must be called before the first thread starts.
pub fn stop_on_signals(
    queue: &InputQueue,
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

/// Starts the control socket, if the user asked for one, with the folder for snapshots, which is
/// held from now on. Must be called after the signals are blocked, and kept to the end of the run.
pub fn control<O: Operator + 'static>(
    args: &RunArgs,
    operator: impl FnOnce(Folder) -> O,
) -> Result<Option<ControlServer>, CommandError> {
    let Some(path) = &args.control else { return Ok(None) };
    let snapshots = match &args.contain.snapshot_dir {
        Some(folder) => Folder::open(folder).map_err(|cause| CommandError::File {
            what: "--snapshot-dir",
            path: folder.clone(),
            cause,
        })?,
        None => Folder::of(path)
            .map_err(|cause| ControlError::Socket { path: path.clone(), cause: cause.into() })?,
    };
    Ok(Some(ControlServer::start(path, Arc::new(operator(snapshots)))?))
}

/// The folder for incident reports, which is held from now on. A guest starts without one too: a
/// report that has no folder is logged as a whole.
pub fn incidents(args: &RunArgs) -> Option<Folder> {
    let path = &args.incident_dir;
    let warn = |error: &std::io::Error| {
        tracing::warn!(
            %error, path = %path.display(),
            "--incident-dir cannot be used; what is found to differ will be logged only"
        );
    };
    Folder::open(path).inspect_err(warn).ok()
}

#[cfg(test)]
mod tests {
    use ftvmm_host::EventLoop;
    use ftvmm_runtime::control::SoloOperator;

    use super::super::args::tests::run_args;
    use super::*;

    #[test]
    fn a_folder_that_is_missing_is_found_at_the_start() {
        for (line, says) in [
            ("--control /tmp/c --snapshot-dir /nowhere/at/all", "--snapshot-dir '/nowhere/at/all'"),
            ("--control /nowhere/at/all", "control socket '/nowhere/at/all'"),
        ] {
            let args = run_args(&format!("--kernel k {line}"));
            let made = |_| -> SoloOperator { panic!("there is no folder") };
            let error = control(&args, made).err().unwrap();
            assert_eq!(error.status(), 2);
            assert_eq!(
                error.to_string(),
                format!("{says}: No such file or directory (os error 2)")
            );
        }
        let pair = "--kernel k --role primary --listen 1.2.3.4:5 --witness file:/w --incident-dir";
        assert!(incidents(&run_args(&format!("{pair} /nowhere/at/all"))).is_none());
        assert!(incidents(&run_args(&format!("{pair} /"))).unwrap().is_at("/".as_ref()));
    }

    #[test]
    fn a_processor_that_the_host_holds_is_told_of_until_it_is_back() {
        let queue = Arc::new(InputQueue::new(resting_timer().unwrap(), Duration::from_millis(5)));
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
