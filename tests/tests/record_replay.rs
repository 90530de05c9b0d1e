//! Fifty guests boot and work while the network and somebody at the console disturb them at random
//! moments. Each is recorded, and its replay must end in the same state, after the same number of
//! exits, inputs and outputs, having printed the same.
//!
//! A seed decides what is done to the guests; at which of its exits a guest sees it is up to the
//! machine, which is the point. `FTVMM_SEED` sets the seed, `FTVMM_PAIRS` the number of pairs. What
//! failed is kept with all it takes to replay it elsewhere.
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::error::Error;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use ftvmm_guest_programs::stream;
use ftvmm_tests::guest_run::{
    GUEST_ADDRESS, GuestLab, GuestRun, LabPool, PROMPT, READY, TAP, cmdline,
};
use ftvmm_tests::lab::Ended;
use ftvmm_tests::measure::SWITCHED_ON;
use ftvmm_tests::replayed::{Replayed, keep};
use ftvmm_tests::{clients, clock};
use libtest_mimic::{Arguments, Failed, Trial};

const PAIRS: usize = 8;
/// Labs at work side by side.
const LABS: usize = 2;

type Failure = Box<dyn Error + Send + Sync>;

/// Work for the guest's script; each is done when it returns.
const WORK: &[&str] = &[
    "selfcheck 1",
    "head -c 20000 /dev/urandom | sha256sum",
    "sleep 0.37",
    "compute 8",
    "cat /proc/interrupts /proc/uptime /proc/meminfo",
    "for i in 1 2 3 4 5 6; do echo $i | md5sum; done",
    "usleep 1500; date",
    "ls -lR /sys/class | tail -n 3",
    "dd if=/dev/zero of=/tmp/z bs=4k count=200; sync; rm /tmp/z",
];

/// What is typed at the shell, whole.
const COMMANDS: &[&str] = &[
    "date\n",
    "cat /proc/interrupts\n",
    "head -c 300 /dev/urandom | md5sum\n",
    "ps\n",
    "ls /bin | wc -l\n",
    "sleep 0.1; uptime\n",
    "wc -c < /proc/kallsyms\n",
];

/// Letters to type at random; a word begins with an x, so that it is no program's name.
const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789 ";
const INTERRUPT: &str = "\x03";
const BACKSPACE: &str = "\x7f";

/// Something done after a pause.
struct After<T> {
    pause: Duration,
    what: T,
}

/// What a client does, and checks.
enum Call {
    EchoDatagram(Vec<u8>),
    EchoStream(Vec<u8>),
    Fetch { length_bytes: u64 },
}

/// How a recorded run ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The guest reboots itself when all is done.
    Reboot,
    /// `ftvmm` is asked to stop when all is done.
    StopAtRest,
    /// `ftvmm` is asked to stop in the middle of something.
    StopAfter(Duration),
}

struct Plan {
    script: String,
    typing: Vec<After<String>>,
    datagrams: Vec<After<Vec<u8>>>,
    calls: Vec<After<Call>>,
    end: End,
}

fn up_to(rng: &mut Rng, ms: u64) -> Duration {
    Duration::from_micros(rng.u64(0..ms * 1000))
}

fn several<T>(
    rng: &mut Rng,
    count: std::ops::Range<usize>,
    pause_ms: u64,
    mut make: impl FnMut(&mut Rng) -> T,
) -> Vec<After<T>> {
    let count = rng.usize(count);
    let mut one = || After { pause: up_to(rng, pause_ms), what: make(rng) };
    (0..count).map(|_| one()).collect()
}

fn bytes(rng: &mut Rng, count_max: usize) -> Vec<u8> {
    (0..rng.usize(1..=count_max)).map(|_| rng.u8(..)).collect()
}

fn keystrokes(rng: &mut Rng) -> String {
    match rng.u8(0..10) {
        0 => INTERRUPT.to_owned(),
        1 => BACKSPACE.to_owned(),
        2..=4 => COMMANDS[rng.usize(0..COMMANDS.len())].to_owned(),
        _ => {
            let letter = |_| char::from(LETTERS[rng.usize(0..LETTERS.len())]);
            let word: String = (0..12).map(letter).collect();
            format!("x{}{}", &word[..rng.usize(0..12)], ["", "\n"][rng.usize(0..2)])
        }
    }
}

impl Plan {
    fn new(mut rng: Rng) -> Self {
        let rng = &mut rng;
        let end = match rng.u8(0..10) {
            0 => End::StopAfter(Duration::from_millis(400) + up_to(rng, 4000)),
            1 | 2 => End::StopAtRest,
            _ => End::Reboot,
        };
        let work = several(rng, 2..5, 1, |rng| WORK[rng.usize(0..WORK.len())]);
        let work: Vec<&str> = work.into_iter().map(|work| work.what).collect();
        let calls = match end {
            // Whoever needs an answer would wait for a guest that is gone.
            End::StopAfter(_) => 0..1,
            _ => 2..6,
        };
        Self {
            script: work.join("; "),
            typing: several(rng, 3..12, 700, keystrokes),
            datagrams: several(rng, 5..30, 250, |rng| bytes(rng, 1200)),
            calls: several(rng, calls, 300, |rng| match rng.u8(0..3) {
                0 => Call::EchoDatagram(bytes(rng, 1400)),
                1 => Call::EchoStream(bytes(rng, 3000)),
                _ => Call::Fetch { length_bytes: rng.u64(1..40_000) },
            }),
            end,
        }
    }
}

fn guest_port(port: u16) -> SocketAddr {
    SocketAddr::new(GUEST_ADDRESS.parse().unwrap(), port)
}

/// Datagrams from the guest's first moment on; most find nobody.
fn send_noise(site: &GuestLab, plan: &Plan) -> Result<(), Failure> {
    clients::enter_network(&site.lab)?;
    for (number, datagram) in plan.datagrams.iter().enumerate() {
        thread::sleep(datagram.pause);
        let port = [7, 9, 80][number % 3];
        clients::send_datagram(guest_port(port), &datagram.what)?;
    }
    Ok(())
}

fn make_calls(site: &GuestLab, run: &GuestRun, plan: &Plan) -> Result<(), Failure> {
    if plan.calls.is_empty() {
        return Ok(());
    }
    clients::enter_network(&site.lab)?;
    run.wait_for(READY)?;
    for call in &plan.calls {
        thread::sleep(call.pause);
        if !clients::reaching(|| is_answered_well(site, &call.what))? {
            return Err("the guest answered a client with other bytes".into());
        }
    }
    Ok(())
}

fn is_answered_well(site: &GuestLab, call: &Call) -> io::Result<bool> {
    match call {
        Call::EchoDatagram(payload) => clients::echo_datagram(guest_port(7), payload),
        Call::EchoStream(payload) => clients::echo_stream(guest_port(7), payload),
        Call::Fetch { length_bytes } => {
            let url = format!("http://{GUEST_ADDRESS}/bytes/{length_bytes}");
            let body = clients::fetch(&site.lab, &url)?;
            let wanted = stream::stream_sha256(stream::DEFAULT_SEED, *length_bytes);
            Ok(stream::reader_sha256(&body[..])? == wanted)
        }
    }
}

fn type_all(run: &GuestRun, plan: &Plan) {
    for keys in &plan.typing {
        thread::sleep(keys.pause);
        run.type_text(&keys.what);
    }
}

fn disturb_and_end(site: &GuestLab, run: &GuestRun, plan: &Plan) -> Result<(), Failure> {
    let stop = || run.process().signal(nix::libc::SIGTERM);
    thread::scope(|scope| {
        let typist = scope.spawn(|| type_all(run, plan));
        let noise = scope.spawn(|| send_noise(site, plan));
        let calls = scope.spawn(|| make_calls(site, run, plan));
        if let End::StopAfter(pause) = plan.end {
            // Before, nothing heeds the signal but the kernel.
            run.process().wait_for_stderr(SWITCHED_ON)?;
            thread::sleep(pause);
            stop();
            return Ok(());
        }
        run.wait_for("FTGUEST RAN 0")?;
        // What is typed before the shell has the terminal may be thrown away with the script's
        // session.
        run.wait_for(PROMPT)?;
        noise.join().unwrap()?;
        calls.join().unwrap()?;
        typist.join().unwrap();
        match plan.end {
            End::Reboot => run.type_text(&format!("{INTERRUPT}\nreboot -f\n")),
            _ => stop(),
        }
        Ok(())
    })
}

fn run_pair(site: &GuestLab, plan: &Plan, name: &str) -> Result<Replayed, Failure> {
    let command = site.boot(&[
        "--net",
        &format!("tap={TAP}"),
        "--cmdline",
        &cmdline(&plan.script),
        "--record",
        &site.inside(format!("{name}.log")),
    ]);
    let run = site.run(&format!("{name}-recorded"), command)?;
    let disturbed = disturb_and_end(site, &run, plan);
    if disturbed.is_err() {
        run.process().signal(nix::libc::SIGTERM);
    }
    let replayed = Replayed::after(site, name, run.finish()?)?;
    disturbed.map(|()| replayed)
}

/// Runs a pair and says how it went; keeps what failed.
fn check_pair(site: &GuestLab, seed: u64, number: usize, kept: &Path) -> Result<(), Failed> {
    let name = format!("pair-{number:02}");
    let plan = Plan::new(Rng::with_seed(seed.wrapping_add(number as u64)));
    let began = clock::now();
    let outcome = run_pair(site, &plan, &name);
    let Plan { end, calls, .. } = &plan;
    let seconds = began.elapsed().as_secs_f32();
    let why = match outcome {
        Ok(pair) => {
            println!("{name}: {end:?}, {} calls, {seconds:.1} s: {pair}", calls.len());
            match pair.difference() {
                None => return Ok(()),
                Some(difference) => difference,
            }
        }
        Err(error) => error.to_string(),
    };
    println!("{name}: {end:?}, {seconds:.1} s: {why}");
    let again = keep(site, kept, &name).unwrap_or_else(|error| error.to_string());
    Err(Failed::from(format!(
        "{why}\nreplay it with:\n  {again}\ntry anew with:\n  FTVMM_SEED={seed} cargo test \
         --release -p ftvmm-tests --test record_replay -- {name}"
    )))
}

/// A disk that is full in the middle of a recording costs the guest nothing, or ends it, as the
/// user wants; the file and the cause are named, and what was recorded can be replayed.
fn a_full_disk_is_named(site: &GuestLab) -> Result<(), Failed> {
    const FULL: &str = "mkdir /tmp/full && mount -t tmpfs -o size=256k none /tmp/full";
    const LOG: &str = "/tmp/full/r.log";
    let host = site.lab.host(0);
    assert!(host.run(&["sh", "-c", FULL])?.ended.success());
    let line = cmdline("selfcheck 1; echo DONE; poweroff -f");
    let more = ["--cmdline", &line, "--record", LOG, "--overwrite", "--record-error"];
    for (on_error, goes_on) in [("continue", true), ("stop", false)] {
        let command = site.boot(&[&more[..], &[on_error]].concat());
        let finished = site.run(&format!("full-{on_error}"), command)?.finish()?;
        let console = String::from_utf8_lossy(&finished.console).into_owned();
        println!("{on_error}: {}", finished.errors);
        assert_eq!(finished.ended, Ended::Status(1), "{}", finished.errors);
        assert!(finished.errors.contains(LOG) && finished.errors.contains("No space left"));
        assert_eq!(console.lines().any(|line| line == "DONE"), goes_on, "{console}");
        let replayed = host.run(&["ftvmm", "replay", LOG])?;
        assert_eq!(
            replayed.ended,
            Ended::Status(1),
            "{}",
            String::from_utf8_lossy(&replayed.stderr)
        );
    }
    Ok(())
}

fn setting<T: FromStr<Err: fmt::Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error:?}")))
}

fn main() -> ExitCode {
    let seed = setting("FTVMM_SEED").unwrap_or_else(|| clock::since_epoch().as_millis() as u64);
    let pairs = setting("FTVMM_PAIRS").unwrap_or(PAIRS);
    let mut arguments = Arguments::from_args();
    // Each lab has one emulated CPU.
    arguments.test_threads.get_or_insert(LABS);
    println!("record_replay: {pairs} pairs, FTVMM_SEED={seed}");

    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("record_replay");
    let kept = folder.join("failed");
    let _ = fs::remove_dir_all(&kept);
    let pool = Arc::new(LabPool::new(folder));
    let trial = |number| {
        let (pool, kept) = (Arc::clone(&pool), kept.clone());
        Trial::test(format!("pair-{number:02}"), move || {
            pool.with(|site| check_pair(site, seed, number, &kept))?
        })
    };
    let other = Arc::clone(&pool);
    let full = Trial::test("a_full_disk_is_named", move || other.with(a_full_disk_is_named)?);
    let trials = (1..=pairs).map(trial).chain([full]).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(pool);
    conclusion.exit_code()
}
