//! A primary that waits for its backup, and strangers at its port: as processes, on this machine's
//! KVM.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ftvmm_replication::policy::{Refusal, Role};
use ftvmm_replication::{BuildId, Message, Term, WireError, wire};
use tempfile::TempDir;

/// Anything that takes longer does not come.
const LONGEST: Duration = Duration::from_secs(120);
/// Descriptors that a primary may have beyond those that it waits with: fewer than the strangers
/// take at its door, and as many as a backup needs.
const DESCRIPTORS_FEW: u64 = 5;
const DESCRIPTORS_ENOUGH: u64 = 40;

/// A program, and what it says.
struct Program {
    child: Child,
    said: Arc<(Mutex<Vec<String>>, Condvar)>,
}

impl Program {
    fn start(arguments: &[&str]) -> Self {
        #[expect(clippy::disallowed_methods, reason = "our own program")]
        let mut command = Command::new(env!("CARGO_BIN_EXE_ftvmm"));
        let command = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let said = Arc::<(Mutex<Vec<String>>, Condvar)>::default();
        let (lines, heard) = (BufReader::new(child.stderr.take().unwrap()).lines(), said.clone());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                heard.0.lock().unwrap().push(line);
                heard.1.notify_all();
            }
        });
        Self { child, said }
    }

    /// Waits until a line has this in it.
    fn says(&self, what: &str) {
        let (lines, more) = &*self.said;
        let is_silent = |lines: &mut Vec<String>| !lines.iter().any(|line| line.contains(what));
        let waited = more.wait_timeout_while(lines.lock().unwrap(), LONGEST, is_silent).unwrap();
        assert!(!waited.1.timed_out(), "not said: {what}\n{}", waited.0.join("\n"));
    }

    /// How many lines have one of these in them.
    fn count(&self, what: &[&str]) -> u64 {
        let lines = self.said.0.lock().unwrap();
        let has = |line: &&String| what.iter().any(|what| line.contains(what));
        lines.iter().filter(has).count() as u64
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where a pair is tried.
struct Place {
    folder: TempDir,
    address: SocketAddr,
}

impl Place {
    /// `None` on a machine that cannot run a guest.
    fn here() -> Option<Self> {
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("not tried: this needs /dev/kvm");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("kernel"), kernel()).unwrap();
        // Free a moment later, as nobody else asks for it.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Some(Self { folder, address })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, role: &str, way: &str) -> Program {
        let [kernel, witness] = ["kernel", "witness"].map(|name| self.path(name));
        let witness = format!("file:{}", witness.display());
        let address = self.address.to_string();
        let kernel = kernel.to_str().unwrap();
        Program::start(&[
            "--kernel",
            kernel,
            "--mem",
            "64",
            "--role",
            role,
            way,
            &address,
            "--witness",
            &witness,
            "--insecure-channel",
        ])
    }

    /// A primary that waits.
    fn primary(&self) -> Program {
        let primary = self.start("primary", "--listen");
        primary.says("waiting for a backup");
        // What answers is set up in whole.
        let mut stranger = self.connect();
        stranger.write_all(&wire::PREAMBLE).unwrap();
        stranger.write_all(&[0xff; 64]).unwrap();
        let mut rest = Vec::new();
        let ended = stranger.read_to_end(&mut rest).map_err(|error| error.kind());
        assert!(matches!(ended, Ok(_) | Err(std::io::ErrorKind::ConnectionReset)), "{ended:?}");
        primary
    }

    fn connect(&self) -> TcpStream {
        for _ in 0..1000 {
            if let Ok(stream) = TcpStream::connect(self.address) {
                return stream;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("nobody listens at {}", self.address);
    }

    /// A real backup comes and is let in. As under a supervisor: one that waited too long behind a
    /// stranger comes again.
    fn lets_in(&self, primary: &Program) {
        const STARTS: &str = "the guest starts in lockstep";
        for _ in 0..10 {
            let mut backup = self.start("backup", "--connect");
            while backup.child.try_wait().unwrap().is_none() {
                if primary.count(&[STARTS]) > 0 {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        primary.says(STARTS);
    }
}

/// A kernel of one instruction in an endless loop (System V ABI, ELF header and one segment).
fn kernel() -> Vec<u8> {
    const CODE_AT: u64 = 64 + 56;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x10_0000, 64, 0_u64] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([0; 4]);
    for half in [64_u16, 56, 1, 64, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(5_u32.to_le_bytes());
    for word in [CODE_AT, 0x10_0000, 0x10_0000, 2, 2, 0x1000] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([0xeb, 0xfe]);
    bytes
}

/// Descriptors of a process.
fn descriptors(process: &Child) -> u64 {
    std::fs::read_dir(Path::new("/proc").join(process.id().to_string()).join("fd")).unwrap().count()
        as u64
}

/// The soft limit, so that it can be raised again.
fn limit_descriptors(process: &Child, most: u64) {
    let id = process.id() as libc::pid_t;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit in force is written to `limit`; none is read.
    let result =
        unsafe { libc::prlimit(id, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    assert_eq!(result, 0);
    limit.rlim_cur = most;
    // SAFETY: the limit is read; nothing is written where the old one would go.
    let result =
        unsafe { libc::prlimit(id, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(result, 0);
}

#[test]
fn without_descriptors_a_primary_says_so_once_a_second_and_goes_on() {
    let Some(place) = Place::here() else { return };
    let primary = place.primary();
    #[expect(clippy::disallowed_methods, reason = "how long the strangers were there")]
    let since = std::time::Instant::now();
    let waiting = descriptors(&primary.child);
    limit_descriptors(&primary.child, waiting + DESCRIPTORS_FEW);
    let strangers: Vec<_> = (0..40).map(|_| place.connect()).collect();
    primary.says("Too many open files");
    // Those that wait at the door meanwhile are left there one after the other.
    primary.says("more connections were refused");
    let seconds = since.elapsed().as_secs();
    for kind in [&["was not accepted"][..], &["was refused", "were refused"]] {
        let lines = primary.count(kind);
        assert!(lines <= seconds + 2, "{lines} lines in {seconds} s: {kind:?}");
    }
    drop(strangers);
    limit_descriptors(&primary.child, waiting + DESCRIPTORS_ENOUGH);
    place.lets_in(&primary);
}

#[test]
fn silent_strangers_do_not_keep_a_backup_out() {
    let Some(place) = Place::here() else { return };
    let primary = place.primary();
    let silent: Vec<_> = (0..40).map(|_| place.connect()).collect();
    place.lets_in(&primary);
    drop(silent);
}

/// The first has the session until its time to say Hello is over; the others have to wait.
#[test]
fn strangers_that_begin_like_a_backup_and_fall_silent_do_not_keep_one_out() {
    let Some(place) = Place::here() else { return };
    let primary = place.primary();
    let silent: Vec<_> = (0..3)
        .map(|_| {
            let mut stranger = place.connect();
            stranger.write_all(&wire::PREAMBLE).unwrap();
            stranger
        })
        .collect();
    primary.says("a backup connected");
    place.lets_in(&primary);
    drop(silent);
}

#[test]
fn whoever_speaks_the_protocol_and_is_not_the_backup_ends_no_primary() {
    let Some(place) = Place::here() else { return };
    let primary = place.primary();
    let strange: BuildId = "9.9.9+fedcba9876543210".try_into().unwrap();
    let fingerprint = ftvmm_runtime::testing::header().fingerprint;
    let hello = Message::Hello {
        role: Role::Backup,
        build: strange,
        fingerprint,
        highest_term: Term(0),
        runs: false,
    };
    let refusal = Refusal::Wire(WireError::VersionMismatch { ours: 1, theirs: 2 });
    let encoded = |message: &Message| {
        let mut bytes = wire::PREAMBLE.to_vec();
        wire::encode(message, &mut bytes);
        bytes
    };
    let mut newer = wire::PREAMBLE;
    newer[7] ^= 0xff;
    for said in [encoded(&Message::Refuse { refusal }), encoded(&hello), newer.to_vec()] {
        let mut stranger = place.connect();
        stranger.write_all(&said).unwrap();
        stranger.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // The primary hangs up, whatever it has said before.
        let mut rest = Vec::new();
        let ended = stranger.read_to_end(&mut rest).map_err(|error| error.kind());
        assert!(matches!(ended, Ok(_) | Err(std::io::ErrorKind::ConnectionReset)), "{ended:?}");
    }
    place.lets_in(&primary);
}
