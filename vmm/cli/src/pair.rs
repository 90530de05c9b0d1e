//! `--role primary|backup`: two hosts in lockstep.

use std::sync::{Arc, OnceLock};

use ftvmm_host::channel::{Channel, ChannelError, Security};
use ftvmm_host::clock::host_unix_seconds;
use ftvmm_host::disk::{CompletionPolicy, Disk};
use ftvmm_host::{Console, Subscriber, Tap, TapReader};
use ftvmm_machine::situation::StopCause;
use ftvmm_replication::peer::Begin;
use ftvmm_replication::policy::{
    DivergencePolicy, LinkPolicy, ReleasePolicy, Role as SessionRole, SessionConfig, StopReason,
};
use ftvmm_replication::{DiskPurpose, Fingerprint, LastRun, SessionEvent, Term};
use ftvmm_runtime::build;
use ftvmm_runtime::input::{GuestTimer, InputQueue, LiveInputs, Recorder, Urgency};
use ftvmm_runtime::peer::{
    ChannelEvents, PairPort, Peer, PeerConfig, PeerLog, PeerOperator, PeerOutputs, WitnessAccess,
};
use ftvmm_runtime::sources::{Inputs, Source};
use ftvmm_runtime::step::{Ending, OutputSink};
use ftvmm_runtime::transfer::{Restore, Transfer, TransferPort};

use super::again::Again;
use super::args::{Believe, OnDiskError, OnDivergence, OnLinkDown, Release, RoleArg, RunArgs};
use super::disk::admit;
use super::guest_source::GuestSource;
use super::live_host::{
    SwitchedOn, check_plan, control, guest_timer, incidents, input_delays, input_queue,
    stop_on_signals, switch_on,
};
use super::outcome::{end_at, stopped_by};
use super::progress_bar::TransferBar;
use super::run::{Conclusion, HostSide, Run, RunRole};
use super::witness::{self, Beginning};
use super::written::Written;
use super::{CommandError, host};
use crate::guest::{Guest, GuestConfig, Machine};
use crate::report::Report;

/// A peer that is alive sends this many heartbeats within the failure limit.
const HEARTBEATS_PER_FAILURE: u64 = 10;

/// One half of a pair.
struct Half {
    peer: Arc<Peer>,
    outputs: PeerOutputs,
}

impl Drop for Half {
    fn drop(&mut self) {
        self.peer.finish_reports();
    }
}

impl RunRole<Machine> for Half {
    fn outputs(&mut self) -> &mut dyn OutputSink {
        &mut self.outputs
    }

    /// Tells the other host how the run ended here, and learns how the pair ends.
    fn conclude(
        &mut self,
        machine: &Machine,
        inputs: &mut Inputs,
        result: Result<Ending, CommandError>,
    ) -> Result<Conclusion, CommandError> {
        let peer = &self.peer;
        let ending = match result {
            Ok(ending) => ending,
            // When a backup's CPU or inputs fail, it cannot follow the primary any more.
            Err(error) if peer.follows() => {
                let reason = peer.fault(error.to_string());
                stopped_by(&reason)?;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let went_on = inputs.pair().filter(|_| ending.by_guest());
        let went_on = went_on.and_then(|pair| pair.primary_went_on(ending.first_incomplete()));
        machine.tsc().warn_of_late_sites();
        let end = end_at(machine, &ending)?;
        let reason = match (went_on, end, ending.cause) {
            (Some(description), ..) => peer.fault(description),
            (None, _, StopCause::Protocol) => peer.stopped().unwrap_or(StopReason::HostRequest),
            (None, Some(end), _) => peer.guest_ended(ending.first_incomplete(), end),
            (None, None, _) => peer.stop_now(),
        };
        peer.close_disk();
        if matches!(reason, StopReason::Clean | StopReason::HostRequest) {
            peer.tell_witness_of_the_end();
        }
        Ok(Conclusion { verdict: stopped_by(&reason), ..Conclusion::new(ending, end) })
    }

    fn report(&self, _: &mut Inputs, report: Report) -> Report {
        let counters = self.peer.counters();
        let seconds = |ns| ns as f64 / 1e9;
        Report {
            outputs: counters.outputs,
            log_bytes: counters.log_bytes,
            divergences: counters.divergences,
            takeovers: counters.takeovers,
            attaches: counters.attaches,
            attach_stopped_seconds: counters.attach_stopped_ns.map(seconds),
            switches: counters.switches,
            takeover_seconds: counters.takeover_ns.map(seconds),
            frames_compared: counters.digests,
            ..report
        }
    }
}

/// Runs one half of a pair; what it writes at its end goes where `written` says.
///
/// # Errors
/// Anything that ends the run badly.
pub fn pair(args: &RunArgs, written: Written) -> Result<(), CommandError> {
    records_as_primary(args)?;
    let security = security(args)?;
    let (queue, input_timer) = input_queue(args)?;
    let made: Arc<OnceLock<Arc<Peer>>> = Arc::default();
    let (asked, early) = (made.clone(), queue.clone());
    let stop_limit = stop_on_signals(&queue, args, move || match asked.get() {
        Some(peer) => peer.stop_requested(),
        None => early.stop(StopCause::Requested, Urgency::NextExit),
    })?;
    let Some(beginning) = witness::begin(args, &security, || queue.is_stopped())? else {
        return Ok(());
    };
    let Beginning { role, highest_term, last_run, access, channel } = beginning;
    // `--role auto` is one of the two from here on.
    let args = &RunArgs { role, ..args.clone() };
    let console = Console::start().map_err(host("thread for the console"))?;
    let tap = args.net.as_ref().map(|net| Tap::open(&net.tap)).transpose()?;
    let reader = tap.clone();
    let (source, disk) = GuestSource::of(args, host_unix_seconds(), CompletionPolicy::Gated)?;
    let config = source.config.clone();
    let guest = Guest::assemble(&config)?;
    source.check(&guest)?;
    if let (RoleArg::Primary, Some(disk)) = (role, &disk) {
        // A witness that knows no guest yet: this one is new, and another's disk is not its own.
        let known = last_run.or_new(access.guest);
        admit(args, disk, DiskPurpose::Run, known, Some(access.guest))?;
    }

    let shared = Shared { tap, disk: disk.clone(), queue: queue.clone(), security };
    let peer = make_peer(args, &guest, &config, shared, highest_term, access)?;
    if let Some(disk) = disk.clone() {
        queue.take_from_disk(disk);
        peer.watch_disk();
    }
    let _ = made.set(peer.clone());
    if queue.is_stopped() {
        peer.stop_requested();
    }
    let mut host = HostSide {
        queue: Some(queue.clone()),
        console: Some(console.clone()),
        stop_limit: Some(stop_limit),
        control: control(args, |to| PeerOperator::new(peer.clone(), console.clone(), to))?,
        ..HostSide::default()
    };
    let half = Half { peer: peer.clone(), outputs: PeerOutputs::new(peer.clone(), console) };
    let (timer, ticker) = guest_timer(&queue)?;
    let mut events = subscribers(args, &peer, &queue, channel, reader)?;
    events.extend([input_timer, ticker]);
    // The guest starts when the other host says so.
    host.wait_for(events)?;
    if args.start_alone {
        peer.step(SessionEvent::StartAlone);
    }
    let begin = match wait_for_begin(args, &peer)? {
        Ok(begin) => begin,
        Err(reason) => {
            // Nothing ran here in a term that this host may hold.
            peer.tell_witness_of_the_end();
            return stopped_by(&reason);
        }
    };
    admit_to_follow(args, disk.as_ref(), &peer)?;
    let config = GuestConfig { rtc_epoch_s: begin.rtc_epoch_s, ..config };
    let parts = PairRun { half, host, queue, timer };
    let run = parts.switch_on(args, source, guest, &config)?;
    run.go(session_role(args).name(), written, HostSide::enter_terminal)
}

/// Waits until the guest may start; a backup that is not taken yet asks again.
fn wait_for_begin(
    args: &RunArgs,
    peer: &Arc<Peer>,
) -> Result<Result<Begin, StopReason>, CommandError> {
    let address = args.connect.or(args.peer);
    let mut again = Again::default();
    loop {
        match peer.wait_for_begin(session_role(args)) {
            Ok(Some(begin)) => return Ok(Ok(begin)),
            Err(reason) => return Ok(Err(reason)),
            Ok(None) => match (peer.turned_away(), address) {
                (Some(reason), Some(address)) => again.ask(peer, address, &reason)?,
                _ => return Err(not_welcomed(args)),
            },
        }
    }
}

/// Refuses a backup's disk that is another guest's.
fn admit_to_follow(
    args: &RunArgs,
    disk: Option<&Arc<Disk>>,
    peer: &Peer,
) -> Result<(), CommandError> {
    let (RoleArg::Backup, Some(disk)) = (args.role, disk) else { return Ok(()) };
    // Which guest it is, the witness knows since the primary has claimed its term.
    let known = LastRun::of(peer.read_witness().as_ref());
    admit(args, disk, DiskPurpose::Follow, known, known.guest)
}

fn records_as_primary(args: &RunArgs) -> Result<(), CommandError> {
    match args.role == RoleArg::Backup && args.record.is_some() {
        true => Err(CommandError::Configuration(
            "--record is for the primary or a guest alone: a backup follows the log it is sent"
                .into(),
        )),
        false => Ok(()),
    }
}

/// The events that this half waits for, from the start on.
fn subscribers(
    args: &RunArgs,
    peer: &Arc<Peer>,
    queue: &Arc<InputQueue>,
    made: Option<Channel>,
    tap: Option<Tap>,
) -> Result<Vec<Subscriber>, CommandError> {
    let mut events: Vec<Subscriber> = vec![
        Box::new(connect_or_listen(args, peer, made)?),
        Box::new(peer.ticker()?),
        Box::new(peer.log_ticker()),
    ];
    if let Some(tap) = tap {
        events.push(Box::new(read_tap(args, tap, queue, peer)));
    }
    Ok(events)
}

/// What the other host has to prove; before a guest is made for nothing.
fn security(args: &RunArgs) -> Result<Security, CommandError> {
    let security = args.channel.security();
    let security = security.map_err(|error| CommandError::Configuration(error.to_string()))?;
    let named = args.listen.into_iter().chain(args.connect).chain(args.peer);
    match named.into_iter().find(|address| !security.allows(*address)) {
        Some(address) => Err(ChannelError::Open(address).into()),
        None => Ok(security),
    }
}

/// What reads the guest's frames from `tap`: those the queue takes go to the guest, others to the
/// host that has it.
fn read_tap(args: &RunArgs, tap: Tap, queue: &Arc<InputQueue>, peer: &Arc<Peer>) -> TapReader {
    let (to_guest, strayed, linked) = (queue.clone(), peer.clone(), peer.clone());
    let on_frame = Box::new(move |frame: Vec<u8>| {
        let from_guest = strayed.is_from_the_guest(&frame);
        match to_guest.push_frame(frame) {
            Some(stray) => strayed.stray(stray),
            None if from_guest => strayed.guest_is_elsewhere(),
            None => {}
        }
    });
    let uplink = args.net.as_ref().and_then(|net| net.uplink.clone());
    TapReader::new(tap, uplink, on_frame, Box::new(move |up| linked.client_link(up)))
}

fn not_welcomed(args: &RunArgs) -> CommandError {
    let address = args.connect.or(args.peer).map(|a| a.to_string()).unwrap_or_default();
    CommandError::Configuration(format!(
        "the peer at {address} was lost before it accepted this backup; is an ftvmm primary \
         listening there? If so, it says why"
    ))
}

/// The connection to the primary, and the port where a backup may connect: on a primary at once, on
/// a backup after it has taken over.
fn connect_or_listen(
    args: &RunArgs,
    peer: &Arc<Peer>,
    made: Option<Channel>,
) -> Result<ChannelEvents, CommandError> {
    let security = peer.security();
    let listener = args.listen.map(|address| Channel::listen(address, security)).transpose()?;
    let (listener, connection) = match (made, args.role, args.connect) {
        (Some(channel), ..) => (listener, Some(channel)),
        (None, RoleArg::Backup, Some(address)) => {
            let channel = Channel::connect(address, security)?;
            let listener = match listener {
                None => {
                    let mut own = channel.local_address().map_err(host("own address"))?;
                    own.set_port(address.port());
                    let free = Channel::listen(own, security);
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
        RoleArg::Backup => SessionRole::Backup,
        _ => SessionRole::Primary,
    }
}

/// What the two threads and the peer have in common.
struct Shared {
    tap: Option<Tap>,
    disk: Option<Arc<Disk>>,
    queue: Arc<InputQueue>,
    security: Security,
}

fn make_peer(
    args: &RunArgs,
    guest: &Guest,
    config: &GuestConfig,
    shared: Shared,
    highest_term: Term,
    witness: WitnessAccess,
) -> Result<Arc<Peer>, CommandError> {
    let Shared { tap, disk, queue, security } = shared;
    let fingerprint = guest.fingerprint.clone();
    let session = SessionConfig {
        peer_is_proved: security.is_proved(),
        ..session_config(args, fingerprint, highest_term, config.rtc_epoch_s)
    };
    Peer::new(PeerConfig {
        session,
        security,
        witness,
        tap,
        net_mac: config.net.map(|net| net.mac),
        queue,
        disk,
        disk_failover: args.disk_error == OnDiskError::Failover,
        horizon_ns: args.horizon_us * 1000,
        incidents: incidents(args),
        unrecorded_when_alone: args.record.is_none(),
        progress: Box::new(TransferBar::hidden()),
    })
    .map_err(|e| CommandError::Configuration(format!("--failure-timeout-ms: {e}")))
}

/// What the arguments say of the session.
fn session_config(
    args: &RunArgs,
    fingerprint: Fingerprint,
    highest_term: Term,
    rtc_epoch_s: u64,
) -> SessionConfig {
    let role = session_role(args);
    let mut session =
        SessionConfig::new(role, build::own(), fingerprint, highest_term, rtc_epoch_s);
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
    session
}

/// What the run needs besides the guest.
struct PairRun {
    half: Half,
    host: HostSide,
    queue: Arc<InputQueue>,
    timer: GuestTimer,
}

impl PairRun {
    fn switch_on(
        self,
        args: &RunArgs,
        source: GuestSource,
        guest: Guest,
        config: &GuestConfig,
    ) -> Result<Run<Machine, Half>, CommandError> {
        let Self { mut host, half, queue, timer } = self;
        let (peer, clock) = (half.peer.clone(), half.peer.clock());
        let SwitchedOn { machine, header, recording } =
            switch_on(args, guest, config, source.start(), &queue)?;
        host.memory_mib = config.memory_mib;
        let transfer =
            |copy| Arc::new(Transfer::new(copy, peer.disk(), queue.clone(), clock, header));
        host.transfer = machine.memory_copy().map(transfer);
        if let Some(transfer) = &host.transfer {
            peer.transfer_with(transfer.clone());
        }
        let mut live = LiveInputs::new(queue, clock, timer, input_delays(args));
        if source.start().is_some() {
            live.renew_identity();
        }
        let log = PeerLog::new(peer.clone());
        let recorder = Recorder::new(recording, Some(Box::new(log)), check_plan(args));
        let inputs = Inputs::new(Source::Live(Box::new(live)))
            .recorded(Some(recorder))
            .transferable(host.transfer.clone().map(TransferPort::new))
            .paired(PairPort::new(peer.clone()))
            .restored(source.into_parts().map(|parts| Restore::new(parts, peer.disk())));
        Ok(Run::new(machine, half, inputs, host, clock))
    }
}

impl From<ChannelError> for CommandError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Listen { .. }
            | ChannelError::Open(_)
            | ChannelError::NoPrimary { .. }
            | ChannelError::Handshake { .. } => Self::Configuration(error.to_string()),
            ChannelError::Connect { .. } | ChannelError::SetUp(_) => Self::Peer(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_runtime::testing::header;

    use super::super::args::tests::run_args;
    use super::*;

    fn config(line: &str) -> SessionConfig {
        let fingerprint = header().fingerprint;
        let config = session_config(&run_args(line), fingerprint.clone(), Term(4), 99);
        assert_eq!(config.fingerprint, fingerprint);
        assert_eq!((config.highest_term, config.rtc_epoch_s), (Term(4), 99));
        config
    }

    #[test]
    fn the_session_is_as_the_arguments_say() {
        let primary = "--kernel k --role primary --listen 1.2.3.4:5 --witness file:/w";
        let plain = config(primary);
        assert_eq!(plain.role, SessionRole::Primary);
        assert_eq!(plain.release, ReleasePolicy::Compare);
        assert_eq!(plain.on_divergence, DivergencePolicy::Failover);
        assert_eq!(plain.on_link_down, LinkPolicy::Switch);
        assert_eq!(plain.failure_ns, 500_000_000);
        let other = config(&format!(
            "{primary} --release ack --on-divergence resync --believe backup \
             --on-link-down ignore --failure-timeout-ms 30"
        ));
        assert_eq!(other.release, ReleasePolicy::Ack);
        assert_eq!(other.on_divergence, DivergencePolicy::Resync);
        assert_eq!(other.believe, SessionRole::Backup);
        assert_eq!(other.on_link_down, LinkPolicy::Ignore);
        assert_eq!((other.failure_ns, other.heartbeat_ns), (30_000_000, 3_000_000));
        let halt = config(&format!("{primary} --on-divergence halt"));
        assert_eq!(halt.on_divergence, DivergencePolicy::Halt);
        let backup = "--kernel k --role backup --connect 1.2.3.4:5 --witness file:/w";
        assert_eq!(config(backup).role, SessionRole::Backup);
    }

    #[test]
    fn who_was_not_taken_is_sent_to_what_the_primary_says() {
        let line = "--kernel k --role backup --connect 1.2.3.4:5 --witness file:/w";
        let error = not_welcomed(&run_args(line)).to_string();
        assert!(error.contains("1.2.3.4:5") && error.contains("it says why"), "{error}");
    }

    #[test]
    fn a_backup_records_nothing() {
        let line = "--kernel k --role backup --connect 1.2.3.4:5 --witness file:/w --record r";
        let error = pair(&run_args(line), Written::default()).unwrap_err();
        assert!(matches!(error, CommandError::Configuration(_)), "{error}");
    }
}
