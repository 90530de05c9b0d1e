//! `--role primary|backup`: two hosts in lockstep.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use ftvmm_replication::session::policy::{
    DivergencePolicy, LinkPolicy, Refusal, ReleasePolicy, Role as SessionRole, SessionConfig,
    StopReason,
};
use ftvmm_replication::witness::Witness;
use ftvmm_replication::{End, LogHeader, SessionEvent};

use super::args::{Believe, OnDiskError, OnDivergence, OnLinkDown, Release, Role, RunArgs};
use super::origin::Origin;
use super::run::{
    END, check_plan, complete, control, create_log, end_at, end_longest, heed_signals,
    input_delays, live_queue, recording_error, report, verdict,
};
use super::{CommandError, host, write_report};
use crate::build;
use crate::disk::{Disk, Telling};
use crate::guest::{Guest, GuestConfig};
use crate::host::clock::host_unix_seconds;
use crate::host::{
    Console, EventLoop, FileWitness, RawTerminal, StopLimit, Subscriber, Tap, TapReader, Ticker,
    read_console,
};
use crate::input::{Alarm, FileLog, GuestClock, LiveInputs, LiveQueue, Recorded, Restored};
use crate::machine::Machine;
use crate::peer::{
    Channel, ChannelError, ChannelEvents, PairInputs, Peer, PeerConfig, PeerLog, PeerOperator,
    PeerOutputs,
};
use crate::report::Report;
use crate::run_loop::{self, Ending, RunError, StopCause};
use crate::shipment::{Shipment, ShippedInputs};

/// A peer that is alive says so this many times within the failure limit.
const HEARTBEATS_PER_FAILURE: u64 = 10;

/// Runs one half of a pair.
///
/// # Errors
/// Anything that ends the run badly.
pub fn pair(args: &RunArgs) -> Result<(), CommandError> {
    if args.role == Role::Backup && args.record.is_some() {
        return Err(CommandError::Configuration(
            "--record is for the primary or a guest alone: a backup follows the log it is sent"
                .into(),
        ));
    }
    let (queue, patience) = live_queue(args)?;
    let made: Arc<OnceLock<Arc<Peer>>> = Arc::default();
    let (asked, early) = (made.clone(), queue.clone());
    let stop_limit = heed_signals(&queue, args, move || match asked.get() {
        Some(peer) => peer.host_stop(),
        None => early.stop(StopCause::Requested),
    })?;
    let console = Console::start().map_err(host("thread for the console"))?;
    let tap = args.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?;
    let reader = tap.clone();
    let (origin, disk) = Origin::of(args, host_unix_seconds(), Telling::WhenAllowed)?;
    let config = origin.config.clone();
    let guest = Guest::assemble(&config)?;
    origin.check(&guest)?;

    let peer = make_peer(args, &guest, &config, tap, disk.clone(), queue.clone())?;
    if let Some(disk) = disk {
        queue.take_from_disk(disk);
        peer.watch_disk();
    }
    let _ = made.set(peer.clone());
    if queue.is_stopped() {
        peer.host_stop();
    }
    let _control = control(args, || PeerOperator::new(peer.clone(), console.clone()))?;
    let (connection, role) = (meet(args, &peer)?, session_role(args).name());
    let (tail, kicked) = (peer.tail_ticker()?, queue.clone());
    let alarm = Ticker::new(move || kicked.alarm())?;
    let parts = Parts {
        peer: peer.clone(),
        queue: queue.clone(),
        alarm: Alarm::new(alarm.timer()),
        tail: tail.timer(),
        console,
        stop_limit,
        role,
    };
    let mut waited: Vec<Subscriber> = vec![
        Box::new(connection),
        Box::new(peer.ticker()?),
        Box::new(tail),
        Box::new(alarm),
        patience,
    ];
    if let Some(tap) = reader {
        let strayed = peer.clone();
        let strays = Box::new(move |frame| strayed.stray(frame));
        let uplink = args.net.as_ref().and_then(|net| net.uplink.clone());
        let linked = peer.clone();
        let on_link = Box::new(move |up| linked.client_link(up));
        waited.push(Box::new(TapReader::new(tap, queue.clone(), uplink, strays, on_link)));
    }
    let _events = EventLoop::start(waited)?;
    if args.start_alone {
        peer.step(SessionEvent::StartAlone);
    }
    let begin = match peer.wait_for_begin(session_role(args)) {
        Ok(Some(begin)) => begin,
        Ok(None) => {
            let address = args.connect.map(|a| a.to_string()).unwrap_or_default();
            return Err(CommandError::Configuration(format!(
                "the peer at {address} was lost before it welcomed this backup; is the address an ftvmm \
                 primary's?"
            )));
        }
        Err(reason) => return stopped_by(&reason),
    };
    let config = GuestConfig { rtc_epoch_s: begin.rtc_epoch_s, ..config };
    let result = parts.run(args, guest, &config, origin);
    peer.finish_reports();
    result
}

/// The connection to the primary, and where a backup may knock: on a primary at once, on a backup when it has
/// taken over.
fn meet(args: &RunArgs, peer: &Arc<Peer>) -> Result<ChannelEvents, CommandError> {
    let listener = args.listen.map(Channel::listen).transpose()?;
    let (listener, connection) = match (args.role, args.connect) {
        (Role::Backup, Some(address)) => {
            let channel = Channel::connect(address)?;
            let listener = match listener {
                None => {
                    let mut own = channel.local_address().map_err(host("own address"))?;
                    own.set_port(address.port());
                    let free = Channel::listen(own);
                    free.inspect_err(|error| tracing::warn!(%error, "no next backup can attach"))
                        .ok()
                }
                listener => listener,
            };
            (listener, Some(channel))
        }
        _ => {
            tracing::info!(address = ?args.listen, "waiting for a backup");
            (listener, None)
        }
    };
    ChannelEvents::new(peer.clone(), listener, connection).map_err(host("second channel handle"))
}

fn session_role(args: &RunArgs) -> SessionRole {
    match args.role {
        Role::Backup => SessionRole::Backup,
        _ => SessionRole::Primary,
    }
}

fn make_peer(
    args: &RunArgs,
    guest: &Guest,
    config: &GuestConfig,
    tap: Option<Tap>,
    disk: Option<Arc<Disk>>,
    queue: Arc<LiveQueue>,
) -> Result<Arc<Peer>, CommandError> {
    let witness = args.witness.clone().ok_or_else(|| {
        CommandError::Configuration("--witness is missing; use --witness file:PATH".into())
    })?;
    let mut witness = FileWitness::new(witness.0);
    let unusable = |e: &dyn std::error::Error| {
        let cause = e.source().map(|c| format!(": {c}")).unwrap_or_default();
        CommandError::Configuration(format!("{e}{cause}"))
    };
    let highest_term = witness.highest().map_err(|e| unusable(&e))?;
    let session_role = session_role(args);
    let mut session = SessionConfig::new(
        session_role,
        build::own(),
        guest.fingerprint.clone(),
        highest_term,
        config.rtc_epoch_s,
    );
    session.release = match args.release {
        Release::Compare => ReleasePolicy::Compare,
        Release::Ack => ReleasePolicy::Ack,
    };
    session.on_divergence = match args.on_divergence {
        OnDivergence::Failover => DivergencePolicy::Failover,
        OnDivergence::Halt => DivergencePolicy::Halt,
        OnDivergence::Resync => DivergencePolicy::Resync,
    };
    session.believe = match args.believe {
        Believe::Primary => SessionRole::Primary,
        Believe::Backup => SessionRole::Backup,
    };
    session.on_link_down = match args.on_link_down {
        OnLinkDown::Switch => LinkPolicy::Switch,
        OnLinkDown::Ignore => LinkPolicy::Ignore,
    };
    session.failure_ns = args.failure_timeout_ms * 1_000_000;
    session.heartbeat_ns = session.failure_ns / HEARTBEATS_PER_FAILURE;
    let unique = std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map_err(host("random name for the witness"))?;
    Peer::new(PeerConfig {
        session,
        witness: Box::new(witness),
        holder: format!("{session_role} {}", unique.trim()),
        tap,
        net_mac: config.net.map(|net| net.mac),
        queue,
        disk,
        disk_failover: args.disk_error == OnDiskError::Failover,
        horizon_ns: args.horizon_us * 1000,
        incident_dir: args.incident_dir.clone(),
        unrecorded_when_alone: args.record.is_none(),
    })
    .map_err(|e| CommandError::Configuration(format!("--failure-timeout-ms: {e}")))
}

/// What the run needs besides the guest.
struct Parts {
    peer: Arc<Peer>,
    queue: Arc<LiveQueue>,
    alarm: Alarm,
    tail: Arc<nix::sys::timerfd::TimerFd>,
    console: Arc<Console>,
    stop_limit: Arc<StopLimit>,
    role: &'static str,
}

impl Parts {
    fn run(
        self,
        args: &RunArgs,
        guest: Guest,
        config: &GuestConfig,
        origin: Origin,
    ) -> Result<(), CommandError> {
        let header = guest.log_header(config);
        let log_header = LogHeader { start: origin.start(), ..header.clone() };
        let create = |path: &PathBuf| {
            create_log(path, args.overwrite, args.record_error.into(), &log_header)
        };
        let recording = args.record.as_ref().map(create).transpose()?;
        let mut machine = guest.power_on(config)?;
        tracing::info!("the guest is switched on");
        if let Some(fault) = args.inject_fault {
            machine.schedule(fault);
        }
        machine.show_network(self.queue.network().clone());
        let kicker = machine.vcpu().kicker();
        self.queue.kick_with(kicker.clone());
        let terminal = RawTerminal::enter();
        read_console(self.queue.clone(), &terminal).map_err(host("console thread"))?;
        let Self { peer, queue, alarm, tail, console, stop_limit, role } = self;
        let clock = GuestClock::anchored(peer.clock(), peer.clock().host_now_ns(), 0);
        let started_ns = peer.clock().host_now_ns();
        let shipment = machine.pages();
        let ship = |pages| {
            Arc::new(Shipment::new(pages, peer.disk(), queue.clone(), peer.clock(), header))
        };
        let shipment = shipment.map(ship);
        if let Some(shipment) = &shipment {
            peer.ship_with(shipment.clone());
        }
        let pulsing = queue.clone();
        let network = queue.network().clone();
        let mut live = LiveInputs::new(queue, clock, 0, alarm, input_delays(args));
        if origin.start().is_some() {
            live.renew_identity();
        }
        let mut outputs = PeerOutputs::new(peer.clone(), console.clone());
        let mut log = PeerLog::new(peer.clone(), tail, recording);
        let recorded = Recorded::new(live, &mut log, check_plan(args));
        let shipped = ShippedInputs::new(recorded, shipment.clone());
        let inputs = PairInputs::new(peer.clone(), shipped);
        let mut inputs = Restored::new(inputs, origin.into_parts(), peer.disk());
        pulsing.pulse().begin();
        let result = run_loop::run(&mut machine, &mut inputs, &mut outputs);
        pulsing.pulse().end();
        if let Some(shipment) = shipment {
            shipment.end();
        }
        let mut inputs = inputs.into_source();
        let went_on = match &result {
            Ok(ending) if ending.by_guest() => inputs.primary_went_on(ending.first_incomplete()),
            _ => None,
        };
        kicker.retire();
        stop_limit.goes_on(end_longest(config.memory_mib), END);
        drop(terminal);
        let seconds = (peer.clock().host_now_ns() - started_ns) as f64 / 1e9;
        let (ending, end, reason) = conclude(&peer, &machine, result, went_on)?;
        // The other host's word may have ordered a stop only now.
        stop_limit.goes_on(end_longest(config.memory_mib), END);
        let finish = |recording: FileLog<_>| recording.finish(ending.first_incomplete(), end);
        let recording = log.into_recording().map(finish);
        console.finish();
        machine.tsc().warn_of_late_sites();
        let counters = peer.counters();
        let report = Report {
            outputs: counters.outputs,
            log_bytes: counters.log_bytes,
            recording_error: recording_error(recording.as_ref()),
            divergences: counters.divergences,
            takeovers: counters.takeovers,
            attaches: counters.attaches,
            attach_stopped_seconds: counters.attach_stopped_ns.map(|ns| ns as f64 / 1e9),
            switches: counters.switches,
            takeover_seconds: counters.takeover_ns.map(|ns| ns as f64 / 1e9),
            frames_compared: counters.digests,
            console_dropped_bytes: console.dropped_bytes(),
            network: network.report(),
            ..report(role, &machine, &ending, end, seconds)
        };
        write_report(args.report.as_deref(), &report)?;
        stopped_by(&reason)?;
        verdict(&machine, &ending)?;
        complete(recording)
    }
}

/// Tells the other host how the run ended here, and learns how the pair ends.
fn conclude(
    peer: &Arc<Peer>,
    machine: &Machine,
    result: Result<Ending, RunError>,
    went_on: Option<String>,
) -> Result<(Ending, Option<End>, StopReason), CommandError> {
    let ending = match result {
        Ok(ending) => ending,
        // A backup whose CPU or inputs fail has left the path of the primary.
        Err(error) if peer.follows() => {
            let reason = peer.fault(error.to_string());
            stopped_by(&reason)?;
            return Err(error.into());
        }
        Err(error) => return Err(error.into()),
    };
    let end = end_at(machine, &ending)?;
    let reason = match (went_on, end, ending.cause) {
        (Some(description), ..) => peer.fault(description),
        (None, _, StopCause::Protocol) => peer.stopped().unwrap_or(StopReason::HostRequest),
        (None, Some(end), _) => peer.guest_ended(ending.first_incomplete(), end),
        (None, None, _) => peer.stop_now(),
    };
    Ok((ending, end, reason))
}

/// The exit status of the protocol's reason to stop.
fn stopped_by(reason: &StopReason) -> Result<(), CommandError> {
    match reason {
        StopReason::Clean | StopReason::HostRequest => Ok(()),
        StopReason::BadConfiguration(Refusal::Wire(error)) => {
            Err(CommandError::Configuration(format!("{error}; is the address an ftvmm's?")))
        }
        StopReason::BadConfiguration(refusal) => {
            Err(CommandError::Configuration(format!("the two hosts do not fit: {refusal}")))
        }
        StopReason::Incomplete | StopReason::DiskFailed { .. } => {
            Err(CommandError::Peer(reason.to_string()))
        }
        StopReason::Divergence => Err(CommandError::Divergence(reason.to_string())),
        StopReason::LostWitness { .. } => Err(CommandError::LostWitness(reason.to_string())),
    }
}

impl From<ChannelError> for CommandError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Listen { .. } => Self::Configuration(error.to_string()),
            ChannelError::Connect { .. } | ChannelError::SetUp(_) => Self::Peer(error.to_string()),
        }
    }
}
