//! The work itself: one function for each kernel facility.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write, pipe};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use memmap2::MmapMut;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{
    ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags,
};
use nix::time::ClockId;
use nix::unistd::{Pid, alarm};

use super::Findings;
use crate::compute::{clock, line_after, monotonic};
use crate::stream::{self, hex, reader_sha256, stream_sha256};

type Outcome = Result<(), Box<dyn Error>>;
type Check = fn(&mut Findings, u64) -> Outcome;

/// Every check by name, in the order they run.
pub(super) const ALL: &[(&str, Check)] = &[
    ("compute", compute),
    ("processes", processes),
    ("pipes", pipes),
    ("files", files),
    ("mappings", mappings),
    ("random", random),
    ("clocks", clocks),
    ("sleep", sleep),
    ("timers", timers),
    ("signals", signals),
    ("tcp", tcp),
    ("udp", udp),
    ("unix", unix),
];

const PIPE_BYTES: u64 = 256 << 10;
const TCP_BYTES: u64 = 300_000;
const MAPPED_BYTES: usize = 2 << 20;
const FILES: u64 = 24;
const NAP: Duration = Duration::from_millis(15);
const TICK: Duration = Duration::from_millis(10);
const TICKS: u64 = 3;

/// Fails with a reason unless the condition holds. A macro, so that the reason is made only when
/// needed.
macro_rules! require {
    ($holds:expr, $($reason:tt)+) => {
        if !$holds {
            return Err(format!($($reason)+).into());
        }
    };
}

fn compute(findings: &mut Findings, round: u64) -> Outcome {
    let (first, second) = (line_after(1 + round % 2), line_after(1 + round % 2));
    require!(first == second, "{first} is not {second}");
    findings.fixed(first);
    Ok(())
}

/// Starts an applet of this very program.
fn applet(arguments: &[&str], input: Stdio) -> std::io::Result<Child> {
    #[allow(clippy::disallowed_methods, reason = "it starts itself, inside a guest")]
    let mut command = Command::new("/proc/self/exe");
    command.arg0("ftguest").args(arguments).stdin(input).stdout(Stdio::piped());
    command.stderr(Stdio::null()).spawn()
}

fn processes(findings: &mut Findings, _: u64) -> Outcome {
    let children = ["1", "2", "3"].map(|rounds| applet(&["compute", rounds], Stdio::null()));
    for (rounds, child) in (1..).zip(children) {
        let child = child?;
        let id = child.id();
        let output = child.wait_with_output()?;
        require!(output.status.success(), "child ended with {}", output.status);
        let (said, wanted) = (String::from_utf8_lossy(&output.stdout), line_after(rounds));
        require!(said.trim_end() == wanted, "child said {said:?}, not {wanted:?}");
        findings.fixed(wanted);
        findings.varying(id.to_le_bytes());
    }
    let failing = applet(&["compute", "no number"], Stdio::null())?;
    let status = failing.wait_with_output()?.status;
    require!(status.code() == Some(2), "a child that should exit with 2: {status}");
    Ok(())
}

/// Writes `length_bytes` of stream `seed` and closes.
fn pour(mut into: impl Write, seed: u64, length_bytes: u64) -> std::io::Result<()> {
    let mut buffer = [0; 4000];
    let mut offset_bytes = 0;
    while offset_bytes < length_bytes {
        let count = (length_bytes - offset_bytes).min(buffer.len() as u64) as usize;
        stream::fill(seed, offset_bytes, &mut buffer[..count]);
        into.write_all(&buffer[..count])?;
        offset_bytes += count as u64;
    }
    Ok(())
}

/// Joins a thread that writes.
fn joined(writer: thread::JoinHandle<std::io::Result<()>>) -> Outcome {
    writer.join().map_err(|_| "a thread panicked")??;
    Ok(())
}

fn pipes(findings: &mut Findings, round: u64) -> Outcome {
    let wanted = stream_sha256(round, PIPE_BYTES);
    let (reader, writer) = pipe()?;
    let thread = thread::spawn(move || pour(writer, round, PIPE_BYTES));
    let got = reader_sha256(reader)?;
    joined(thread)?;
    require!(got == wanted, "a thread's bytes changed on their way through a pipe");

    let mut child = applet(&["streamsum"], Stdio::piped())?;
    pour(child.stdin.take().ok_or("no pipe to the child")?, round, PIPE_BYTES)?;
    let said = child.wait_with_output()?.stdout;
    let said = String::from_utf8_lossy(&said);
    require!(said.trim_end() == hex(&wanted), "a child got other bytes through a pipe: {said}");
    findings.fixed(wanted);
    Ok(())
}

fn files(findings: &mut Findings, round: u64) -> Outcome {
    let directory = std::env::temp_dir().join(format!("selfcheck-{}", Pid::this()));
    fs::create_dir(&directory)?;
    let done = files_in(&directory, findings, round);
    fs::remove_dir_all(&directory)?;
    done?;
    require!(!directory.exists(), "a removed directory is there");
    Ok(())
}

fn files_in(directory: &Path, findings: &mut Findings, round: u64) -> Outcome {
    for number in 0..FILES {
        let temporary = directory.join("new");
        pour(File::create(&temporary)?, round ^ number, number * 997)?;
        fs::rename(&temporary, directory.join(format!("file-{number:02}")))?;
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.path());
    }
    names.sort();
    require!(names.len() as u64 == FILES, "{} files, not {FILES}", names.len());
    for (number, path) in (0..).zip(&names) {
        let got = reader_sha256(File::open(path)?)?;
        let wanted = stream_sha256(round ^ number, number * 997);
        require!(got == wanted, "{} holds something else", path.display());
        findings.fixed(got);
    }
    Ok(())
}

fn mappings(findings: &mut Findings, round: u64) -> Outcome {
    let mut memory = MmapMut::map_anon(MAPPED_BYTES)?;
    require!(memory.iter().all(|&byte| byte == 0), "fresh memory is not zero");
    stream::fill(round, 0, &mut memory);

    let digest = reader_sha256(&memory[..])?;
    require!(digest == stream_sha256(round, MAPPED_BYTES as u64), "memory holds something else");
    findings.fixed(digest);
    Ok(())
}

fn random(findings: &mut Findings, _: u64) -> Outcome {
    let mut pair = [[0; 256]; 2];
    for bytes in &mut pair {
        File::open("/dev/urandom")?.read_exact(bytes)?;
        findings.varying(&bytes);
    }
    require!(pair[0] != pair[1], "/dev/urandom repeats itself");
    Ok(())
}

fn clocks(findings: &mut Findings, _: u64) -> Outcome {
    let mut before = Duration::ZERO;
    for _ in 0..20 {
        let now = monotonic()?;
        require!(now >= before, "the monotonic clock went from {before:?} to {now:?}");
        findings.varying(now.as_nanos().to_le_bytes());
        before = now;
    }
    let wall = clock(ClockId::CLOCK_REALTIME)?;
    findings.varying(wall.as_nanos().to_le_bytes());
    Ok(())
}

/// Requires that at least `wanted` went by since `start`, and hashes how much it was.
fn elapsed(findings: &mut Findings, start: Duration, wanted: Duration) -> Outcome {
    let took = monotonic()? - start;
    require!(took >= wanted, "waited {took:?} instead of {wanted:?}");
    findings.varying(took.as_nanos().to_le_bytes());
    Ok(())
}

fn sleep(findings: &mut Findings, _: u64) -> Outcome {
    let start = monotonic()?;
    thread::sleep(NAP);
    elapsed(findings, start, NAP)
}

fn timers(findings: &mut Findings, _: u64) -> Outcome {
    let start = monotonic()?;
    let timer = TimerFd::new(TimerClock::CLOCK_MONOTONIC, TimerFlags::empty())?;
    let every = Expiration::Interval(TimeSpec::from_duration(TICK));
    timer.set(every, TimerSetTimeFlags::empty())?;
    for _ in 0..TICKS {
        timer.wait()?;
    }
    // A wait that comes late covers several periods, so only the first is certain to have been
    // waited for.
    elapsed(findings, start, TICK)
}

fn signals(findings: &mut Findings, _: u64) -> Outcome {
    let expect = |wanted: Signal| -> Outcome {
        let got = SigSet::from_iter([Signal::SIGUSR1, Signal::SIGALRM]).wait()?;
        require!(got == wanted, "{got} instead of {wanted}");
        Ok(())
    };
    raise(Signal::SIGUSR1)?;
    expect(Signal::SIGUSR1)?;
    let start = monotonic()?;
    let pending = alarm::set(1);
    require!(pending.is_none(), "an alarm of {pending:?} s was set");
    require!(alarm::cancel() == Some(1), "the alarm was lost");
    nix::sys::signal::kill(Pid::this(), Signal::SIGALRM)?;
    expect(Signal::SIGALRM)?;
    elapsed(findings, start, Duration::ZERO)
}

fn tcp(findings: &mut Findings, round: u64) -> Outcome {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let server = thread::spawn(move || pour(listener.accept()?.0, round, TCP_BYTES));
    let got = reader_sha256(TcpStream::connect(address)?)?;
    joined(server)?;
    require!(got == stream_sha256(round, TCP_BYTES), "TCP delivered something else");
    findings.fixed(got);
    findings.varying(address.port().to_le_bytes());
    Ok(())
}

fn udp(findings: &mut Findings, round: u64) -> Outcome {
    let sockets = [(); 2].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)));
    let [client, server] = sockets;
    let (client, server) = (client?, server?);
    let mut got = [0; 2048];
    for number in 0..8u64 {
        let mut sent = vec![0; 100 + 150 * number as usize];
        stream::fill(round ^ number, 0, &mut sent);
        client.send_to(&sent, server.local_addr()?)?;
        let (count, from) = server.recv_from(&mut got)?;
        require!(got[..count] == sent[..], "datagram {number} arrived changed");
        require!(from == client.local_addr()?, "datagram {number} came from {from}");
        findings.fixed(&sent);
    }
    Ok(())
}

fn unix(findings: &mut Findings, round: u64) -> Outcome {
    let (near, far) = UnixStream::pair()?;
    let writer = thread::spawn(move || pour(far, round, PIPE_BYTES));
    let got = reader_sha256(near)?;
    joined(writer)?;
    require!(got == stream_sha256(round, PIPE_BYTES), "a Unix socket delivered something else");
    findings.fixed(got);
    Ok(())
}
