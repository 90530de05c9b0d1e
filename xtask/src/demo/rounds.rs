//! `cargo xtask demo --rounds N`: the active host dies N times under one
//! download, and each time a fresh host takes its place and is attached before the next one dies.

use std::error::Error;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ftvmm_tests::Program;
use ftvmm_tests::clock;
use ftvmm_tests::download::{Download, Downloaded};
use ftvmm_tests::group::{Group, Member, Status};
use ftvmm_tests::guest_run::GUEST_ADDRESS;
use ftvmm_tests::lab::{Lab, LabError};
use ftvmm_tests::pair::{GuestFiles, RunOptions};
use ftvmm_tests::progress::Step;
use indicatif::ProgressBar;
use nix::libc::SIGTERM;

use super::{booted, download_bar, print_download};

/// Size of the download for each round, and how fast the client takes it until the last host has
/// died: twenty seconds, in which a fresh emulated host boots and is attached.
pub const SIZE_MIB: u64 = 40;
const RATE_BYTES_PER_S: f64 = (2 << 20) as f64;
/// A client that takes its time must not have a stall's worth of bytes in its socket: it would see
/// none of it.
const SMALL_BUFFERS: &str = "echo 4096 65536 131072 > /proc/sys/net/ipv4/tcp_rmem";
/// The client must have got so much before a host dies.
const BEFORE_DEATH_BYTES: u64 = 1 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What came of one round.
struct Round {
    stall: Duration,
    takeover_us: Option<u64>,
    /// From the start of the fresh host to protection, without the boot of the host itself.
    attach: Duration,
    status: Status,
}

/// What the client's thread tells of the download.
struct Progress {
    bytes: u64,
    last: Instant,
    longest_stall: Duration,
    /// Nobody dies any more.
    hurries: bool,
}

/// The client, which reads all the while on a thread of its own.
struct Client {
    progress: Arc<Mutex<Progress>>,
    thread: JoinHandle<Result<Downloaded, LabError>>,
}

/// Shows the rounds and prints their report; fails when the download did.
pub fn run(
    lab: &Lab,
    files: &GuestFiles,
    options: RunOptions,
    rounds: u64,
    bytes: u64,
) -> Result<ExitCode, Box<dyn Error>> {
    let group = Group::new(lab, files, options)?;
    let step = Step::start("booting the guest in lockstep");
    let mut primary = group.start_primary(0, &[])?;
    let mut backup = group.join(1, 0, &[])?;
    booted(lab, &primary.process)?;
    primary.wait_protected()?;
    drop(step);

    let url = format!("http://{GUEST_ADDRESS}/bytes/{bytes}");
    println!("curl:  {url}");
    let bar = download_bar(bytes);
    lab.run_client(Program::Sh, &["-c", SMALL_BUFFERS])?;
    let client = Client::start(Download::start(lab, &url)?, bar.clone());
    for number in 1..=rounds {
        let round;
        (round, primary, backup) = play(lab, &group, &client, &bar, [primary, backup])?;
        bar.suspend(|| round.print(number));
    }
    client.progress().hurries = true;
    let downloaded = client.thread.join().map_err(|_| "the client's thread panicked")??;
    bar.finish_and_clear();
    let divergences = primary.wait_protected()?.divergences;
    primary.process.signal(SIGTERM);
    let ended = [primary.process.wait()?, backup.process.wait()?];

    let complete = print_download(&downloaded, bytes);
    println!(
        "stall      {:.2} s, the longest the client saw",
        downloaded.longest_stall.as_secs_f64()
    );
    println!("diverged   {divergences} times");
    let good = complete && divergences == 0 && ended.iter().all(|end| end.success());
    let said = format!("{rounds} hosts died, the guest did not.");
    println!("\n{}", if good { &said } else { "FAILED" });
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One host dies, the other takes over, a fresh one joins.
fn play<'a>(
    lab: &Lab,
    group: &Group<'a>,
    client: &Client,
    bar: &ProgressBar,
    [primary, survivor]: [Member<'a>; 2],
) -> Result<(Round, Member<'a>, Member<'a>), Box<dyn Error>> {
    let at_bytes = client.goes_on(lab)?;
    let victim = primary.host;
    let host = lab.host(victim);
    host.kill();
    bar.suspend(|| println!("kill:  host {} died after {at_bytes} bytes", host.letter()));
    let survived = survivor.wait_until("waiting for the take-over", |status| {
        status.role == "primary" && status.takeovers > 0 && status.takeover_us.is_some()
    })?;
    // It serves again, and the longest stall of this round is over.
    client.goes_on(lab)?;
    bar.set_message(format!("starting a fresh host {}", host.letter()));
    host.restart()?;
    let began = clock::now();
    let fresh = group.join(victim, survivor.host, &[])?;
    let status = survivor.wait_followed_by(&fresh, |status| {
        if let Some(attach) = &status.attach {
            let [done, all] = [attach.bytes, attach.total_bytes].map(|bytes| bytes >> 20);
            bar.set_message(format!("attaching: {}, {done} of {all} MiB", attach.phase));
        }
    })?;
    let attach = began.elapsed();
    bar.set_message("protected");
    fresh.wait_protected()?;
    let (takeover_us, stall) = (survived.takeover_us, client.take_stall());
    let round = Round { stall, takeover_us, attach, status };
    Ok((round, survivor, fresh))
}

impl Client {
    fn start(download: Download, bar: ProgressBar) -> Self {
        let last = clock::now();
        let progress = Progress { bytes: 0, last, longest_stall: Duration::ZERO, hurries: false };
        let progress = Arc::new(Mutex::new(progress));
        let told = Arc::clone(&progress);
        let thread = thread::spawn(move || {
            download.finish(|bytes| {
                let now = clock::now();
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                // Before the first byte the client waits for the connection.
                if told.bytes > 0 {
                    told.longest_stall = told.longest_stall.max(now - told.last);
                }
                let took = (bytes - told.bytes) as f64 / RATE_BYTES_PER_S;
                (told.bytes, told.last) = (bytes, now);
                let hurries = told.hurries;
                drop(told);
                bar.set_position(bytes);
                if !hurries {
                    thread::sleep(Duration::from_secs_f64(took));
                }
            })
        });
        Self { progress, thread }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes(&self) -> u64 {
        self.progress().bytes
    }

    /// Waits until the client has got some more; what it has then.
    fn goes_on(&self, lab: &Lab) -> Result<u64, Box<dyn Error>> {
        let enough = self.bytes() + BEFORE_DEATH_BYTES;
        loop {
            let bytes = self.bytes();
            if self.thread.is_finished() {
                let why = "the download ended before the last round; give it more with --size";
                return Err(format!("{why} (after {bytes} bytes)\n{}", lab.tails()).into());
            }
            if bytes >= enough {
                return Ok(bytes);
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// The longest stall since the last question.
    fn take_stall(&self) -> Duration {
        std::mem::take(&mut self.progress().longest_stall)
    }
}

impl Round {
    fn print(&self, number: u64) {
        let last = self.status.last_attach.unwrap_or_default();
        println!(
            "round {number}: stall {:.2} s, take-over {:.3} s; fresh host attached in {:.1} s \
             ({:.1} s of transfer, \
             {} MiB in {} rounds), guest stopped {:.1} ms",
            self.stall.as_secs_f64(),
            self.takeover_us.map_or(f64::NAN, |us| us as f64 / 1e6),
            self.attach.as_secs_f64(),
            last.duration_ms as f64 / 1e3,
            last.bytes >> 20,
            last.rounds,
            last.stopped_us as f64 / 1e3
        );
    }
}
