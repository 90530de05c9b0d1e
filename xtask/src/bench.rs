//! `cargo xtask bench`: what lockstep costs a client, against the same guest alone.
//!
//! All modes are measured in turn on the same two hosts, round after round, so that whatever else
//! the machine does falls on all of them. Absolute numbers belong to the machine; the ratios to
//! solo are what carries over.

mod against;
mod computing;
mod plot;
mod summary;

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use ftvmm_guest_images::GuestKernel;
use ftvmm_guest_programs::stream::{DEFAULT_SEED, stream_sha256};
use ftvmm_tests::clients::enter_network;
use ftvmm_tests::clock;
use ftvmm_tests::download::Download;
use ftvmm_tests::lab::{Backend, Lab, LabProcess};
use ftvmm_tests::measure::{Times, boot_time, http_requests, udp_echoes};
use ftvmm_tests::pair::{
    ChannelWay, GUEST_ADDRESS, GuestFiles, Pair, Report, RunOptions, read_report, start_solo,
};
use ftvmm_tests::progress::Step;

use self::against::Build;
pub use self::summary::Summary;
use self::summary::{Conditions, Sample};
use crate::cargo;
use crate::hosts::Hosts;
use crate::report::{self, MachineReport};

const MIB: u64 = 1 << 20;
/// Where the guest echoes (RFC 862) and serves.
const ECHO_PORT: u16 = 7;
const HTTP_PORT: u16 = 80;
/// Where host b echoes for the round trip of the channel.
const CHANNEL_PORT: u16 = 7007;
/// Body of the small HTTP request.
const SMALL_BYTES: usize = 1000;
/// The `ftvmm` that was built.
const BUILT: Build = Build { program: "ftvmm", knows_resets: true, knows_tls: true };
const ADVICE: &str = "on a busy machine raise --failure-timeout-ms";
/// Where `--save` puts its files.
const SAVED: &str = "docs/bench";

/// One way to run the guest.
#[derive(Debug)]
struct Mode {
    /// Its name in tables.
    title: &'static str,
    /// `--release` of the pair; none is a guest alone.
    release: Option<&'static str>,
    /// What is said on the channel can be read by anybody.
    in_clear: bool,
}

/// Solo first: it is what the others are divided by.
const MODES: [Mode; 4] = [
    Mode { title: "solo", release: None, in_clear: false },
    Mode { title: "lockstep ack", release: Some("ack"), in_clear: false },
    Mode { title: "lockstep compare", release: Some("compare"), in_clear: false },
    Mode { title: "compare in clear", release: Some("compare"), in_clear: true },
];

/// How much is measured in each round.
#[derive(Clone, Copy, Debug)]
struct Amounts {
    rounds: u32,
    download_bytes: u64,
    echoes: usize,
    requests: usize,
}

const FULL: Amounts = Amounts { rounds: 4, download_bytes: 16 * MIB, echoes: 200, requests: 30 };
const QUICK: Amounts = Amounts { rounds: 1, download_bytes: 2 * MIB, echoes: 50, requests: 10 };

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct BenchArguments {
    /// How often every mode is measured [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Size of the long download in MiB [default: 16]
    #[arg(long, value_name = "MiB", value_parser = clap::value_parser!(u64).range(1..))]
    size: Option<u64>,
    /// One round of little, to see that everything works
    #[arg(long)]
    quick: bool,
    /// `--failure-timeout-ms` of every pair, for a machine too busy for the default
    #[arg(long, value_name = "MS")]
    failure_timeout_ms: Option<u64>,
    /// Measure a guest that computes instead
    #[arg(long)]
    computing: bool,
    /// Measure this `ftvmm` too, in turn with the built one, and print how the two compare
    #[arg(long, value_name = "FILE", conflicts_with = "computing")]
    against: Option<PathBuf>,
    /// Also write the result to docs/bench/lockstep.{json,svg,md}
    #[arg(long)]
    save: bool,
    /// Folder for the result, consoles and logs [default: out/bench/<time>]
    #[arg(long, value_name = "D")]
    log_dir: Option<PathBuf>,
}

impl BenchArguments {
    fn amounts(&self) -> Amounts {
        let usual = if self.quick { QUICK } else { FULL };
        Amounts {
            rounds: self.rounds.unwrap_or(usual.rounds),
            download_bytes: self.size.map_or(usual.download_bytes, |mib| mib * MIB),
            ..usual
        }
    }
}

/// Measures, prints the table and writes the result.
pub fn run(arguments: &BenchArguments) -> Result<ExitCode, Box<dyn Error>> {
    if arguments.computing {
        return computing::run(arguments);
    }
    let amounts = arguments.amounts();
    let round_trips = cargo::build("ftvmm-tests", "round-trips")?;
    let Hosts { lab, backend, files } =
        Hosts::start("bench", GuestKernel::Tiny, arguments.log_dir.as_deref(), &[round_trips])?;
    let conditions = conditions(backend, arguments.failure_timeout_ms, amounts);
    start_channel_echo(&lab)?;

    let earlier =
        arguments.against.as_deref().map(|file| against::install(&lab, file)).transpose()?;
    let mut channel = Vec::new();
    let (mut samples, mut samples_of_earlier) = (Vec::new(), Vec::new());
    for round in 1..=amounts.rounds {
        let of_all = format!("round {round} of {}", amounts.rounds);
        let step = Step::start(format!("{of_all}: the channel alone"));
        channel.push(channel_round_trips(&lab, amounts.echoes)?);
        drop(step);
        for mode in &MODES {
            let what = format!("{of_all}: {}", mode.title);
            let bench = Bench { lab: &lab, files: &files, amounts, what };
            let measure = |build: Build| {
                let sample = bench.measure(mode, build, arguments.failure_timeout_ms);
                sample.map_err(|error| format!("{}, {}: {error}", bench.what, build.program))
            };
            // What is measured second in a lab is slower, so they take turns.
            let built_first = round % 2 == 0;
            if built_first {
                samples.push(measure(BUILT)?);
            }
            if let Some(earlier) = earlier {
                samples_of_earlier.push(measure(earlier)?);
            }
            if !built_first {
                samples.push(measure(BUILT)?);
            }
        }
    }
    let result = Summary::new(conditions, &channel, &samples);
    println!("\n{}", result.table());
    if let Some(file) = &arguments.against {
        let table = against::table(
            &result,
            &Summary::new(result.conditions.clone(), &channel, &samples_of_earlier),
        );
        println!("The built ftvmm beside {}:\n\n{table}", file.display());
        fs::write(lab.folder().join("against.md"), table)?;
    }
    write_result(&result, lab.folder(), "bench")?;
    if arguments.save {
        write_result(&result, Path::new(SAVED), "lockstep")?;
        println!("saved: {SAVED}");
    }
    println!("result: {}", lab.folder().display());
    let figures = report::Bench {
        figures: serde_json::to_value(&result)?,
        table: result.table(),
        subtitle: result.subtitle(),
    };
    MachineReport::new("bench", &cargo::build("ftvmm", "ftvmm")?)?.with_bench(figures).write()?;
    Ok(ExitCode::SUCCESS)
}

fn write_result(result: &Summary, folder: &Path, name: &str) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    let path = |extension: &str| folder.join(name).with_extension(extension);
    fs::write(path("json"), serde_json::to_string_pretty(result)? + "\n")?;
    fs::write(path("md"), result.markdown(&format!("{name}.svg")))?;
    plot::draw(result, &path("svg"))
}

/// What a reader must know to judge the numbers.
fn conditions(backend: Backend, failure_timeout_ms: Option<u64>, amounts: Amounts) -> Conditions {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = file("/proc/cpuinfo");
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let load = file("/proc/loadavg");
    Conditions {
        unix_seconds: clock::since_epoch().as_secs(),
        commit: report::commit(),
        hosts: match backend {
            Backend::Lab => "emulated machines",
            Backend::Local => "network namespaces on KVM",
        },
        cpu: cpu.map_or_else(String::new, |(_, model)| model.to_owned()),
        cpus: thread::available_parallelism().map_or(0, usize::from),
        load_before: load.split(' ').next().and_then(|n| n.parse().ok()),
        rounds: amounts.rounds,
        echoes: amounts.echoes,
        requests: amounts.requests,
        request_bytes: SMALL_BYTES,
        download_bytes: amounts.download_bytes,
        failure_timeout_ms,
    }
}

/// Host b echoes until the lab ends.
fn start_channel_echo(lab: &Lab) -> Result<(), Box<dyn Error>> {
    let host = lab.host(1);
    let program = host.share().join("bin/ftguest");
    // A command has ended when nobody holds its output any more.
    let line =
        format!("{} echod --port {CHANNEL_PORT} --detach >/dev/null 2>&1", program.display());
    let said = host.run(&["sh", "-c", &line])?;
    if said.ended.success() { Ok(()) } else { Err(format!("{line}: {:?}", said.ended).into()) }
}

/// Round trips from host a to host b and back, by the clock of host a.
fn channel_round_trips(lab: &Lab, count: usize) -> Result<Times, Box<dyn Error>> {
    let host = lab.host(0);
    let program = host.share().join("bin/round-trips").display().to_string();
    let server = format!("{}:{CHANNEL_PORT}", lab.host(1).link_address());
    let said = host.run(&[program, server, count.to_string()])?;
    if !said.ended.success() {
        return Err(format!("round-trips: {}", String::from_utf8_lossy(&said.stderr)).into());
    }
    let nanoseconds = |line: &str| line.parse().map(Duration::from_nanos);
    let answered = said.text().lines().map(nanoseconds).collect::<Result<_, _>>()?;
    Ok(Times { answered, lost: 0 })
}

/// A guest that serves, alone or in lockstep.
enum Running {
    Solo(LabProcess),
    Pair(Pair),
}

const SOLO_REPORT: &str = "solo.json";

impl Running {
    /// What talks to the clients.
    fn primary(&self) -> &LabProcess {
        match self {
            Self::Solo(process) => process,
            Self::Pair(pair) => &pair.primary,
        }
    }

    /// Ends the guest. A pair of which one half was lost on the way was not measured in lockstep.
    fn stop(&self, lab: &Lab) -> Result<Report, Box<dyn Error>> {
        let lost_backup = matches!(self, Self::Pair(pair) if pair.backup.ended().is_some());
        self.primary().signal(nix::libc::SIGTERM);
        self.primary().wait()?;
        let Self::Pair(pair) = self else {
            return Ok(read_report(lab, SOLO_REPORT)?);
        };
        pair.backup.wait()?;
        let report = read_report(lab, &pair.primary_report)?;
        let backup = read_report(lab, &pair.backup_report)?;
        if lost_backup || report.takeovers + backup.takeovers + report.divergences > 0 {
            return Err(format!("the pair broke up; {ADVICE}\n{report:?}\n{backup:?}").into());
        }
        Ok(report)
    }
}

/// Starts a guest in `mode`, with further options for all modes.
fn start(
    lab: &Lab,
    files: &GuestFiles,
    mode: &Mode,
    failure_timeout_ms: Option<u64>,
    mut options: RunOptions,
) -> Result<Running, Box<dyn Error>> {
    let Some(release) = mode.release else {
        return Ok(Running::Solo(start_solo(lab, 0, files, &options, SOLO_REPORT)?));
    };
    options.arguments.extend(["--release".into(), release.into()]);
    if let Some(limit) = failure_timeout_ms {
        options.arguments.extend(["--failure-timeout-ms".into(), limit.to_string()]);
    }
    Ok(Running::Pair(Pair::start(lab, files, &options)?))
}

/// One mode in one round.
struct Bench<'a> {
    lab: &'a Lab,
    files: &'a GuestFiles,
    amounts: Amounts,
    what: String,
}

impl Bench<'_> {
    fn step(&self, doing: &str) -> Step {
        Step::start(format!("{}, {doing}", self.what))
    }

    fn measure(
        &self,
        mode: &'static Mode,
        build: Build,
        failure_timeout_ms: Option<u64>,
    ) -> Result<Sample, Box<dyn Error>> {
        let step = self.step("boot");
        let Build { program, knows_resets: ends_at_once, knows_tls } = build;
        let channel = match (knows_tls, mode.in_clear) {
            (false, _) => ChannelWay::Unsaid,
            (true, true) => ChannelWay::InClear,
            (true, false) => ChannelWay::Proved,
        };
        let options = RunOptions { program, ends_at_once, channel, ..RunOptions::default() };
        let running = start(self.lab, self.files, mode, failure_timeout_ms, options)?;
        let Some(boot) = boot_time(running.primary())? else {
            let ended = running.primary().ended();
            let tails = self.lab.tails();
            return Err(format!("ended while booting: {ended:?}; {ADVICE}\n{tails}").into());
        };
        drop(step);
        let step = self.step("UDP echoes");
        let echoes = self.as_client(ECHO_PORT, |s| udp_echoes(s, self.amounts.echoes))?;
        drop(step);
        let step = self.step("HTTP requests");
        let path = format!("/bytes/{SMALL_BYTES}");
        let requests = self.as_client(HTTP_PORT, |server| {
            http_requests(server, &path, SMALL_BYTES, self.amounts.requests)
        })?;
        drop(step);
        let download_seconds = self.download()?;
        let _step = self.step("stop");
        Ok(Sample {
            mode: mode.title,
            boot_seconds: boot.as_secs_f64(),
            echoes,
            requests,
            download_seconds,
            download_bytes: self.amounts.download_bytes,
            report: running.stop(self.lab)?,
        })
    }

    /// Runs `client` on a thread in the clients' network, against a port of the guest.
    fn as_client(
        &self,
        port: u16,
        client: impl FnOnce(std::net::SocketAddr) -> io::Result<Times> + Send,
    ) -> Result<Times, Box<dyn Error>> {
        let server = format!("{GUEST_ADDRESS}:{port}").parse()?;
        let lab = self.lab;
        let outcome = thread::scope(|scope| {
            scope.spawn(move || enter_network(lab).and_then(|()| client(server))).join()
        });
        let times = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        times.map_err(|error| format!("{error}\n{}", self.lab.tails()).into())
    }

    /// Seconds of the long download.
    fn download(&self) -> Result<f64, Box<dyn Error>> {
        let _step = self.step("download");
        let bytes = self.amounts.download_bytes;
        let url = format!("http://{GUEST_ADDRESS}/bytes/{bytes}");
        let downloaded = Download::start(self.lab, &url)?.finish(|_| ())?;
        let right = downloaded.sha256 == stream_sha256(DEFAULT_SEED, bytes);
        if downloaded.status != 0 || !right {
            let got = downloaded.bytes;
            return Err(format!("{got} bytes, curl ended with {}", downloaded.status).into());
        }
        Ok(downloaded.total.as_secs_f64())
    }
}
