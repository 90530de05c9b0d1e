//! Clients that want nothing but a place.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use super::clients::CLIENTS_MAX;
use super::server::Limits;
use super::{ControlServer, Operator, Refused, SnapshotSummary, Status, request};

/// More than a socket holds that nobody reads, in bytes.
const STATE_BYTES: usize = 4 << 20;
const NO_PROFILE: &str = "not possible now: the run has no --profile";
const ASK: &[u8] = b"GET /status HTTP/1.1\r\n\r\n";

/// Has long answers; a snapshot waits at the gate when it has begun and before it ends.
struct Talkative {
    gate: Barrier,
}

impl Operator for Talkative {
    fn status(&self) -> Status {
        Status { state: "x".repeat(STATE_BYTES), ..Status::default() }
    }

    fn snapshot(&self, _path: &Path) -> Result<SnapshotSummary, Refused> {
        self.gate.wait();
        self.gate.wait();
        Ok(SnapshotSummary { exit: 7, bytes: 4096 })
    }

    fn stop(&self) -> Result<(), Refused> {
        Ok(())
    }
}

struct Served {
    socket: PathBuf,
    gate_of: Arc<Talkative>,
    _server: ControlServer,
    _folder: TempDir,
}

fn serve(limits: Limits, waiting: usize) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let run = Arc::new(Talkative { gate: Barrier::new(waiting) });
    let server = ControlServer::start_with(&socket, run.clone(), limits).unwrap();
    Served { socket, gate_of: run, _server: server, _folder: folder }
}

impl Served {
    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// A client that sends this. One that is closed at once is one that had to leave.
    fn say(&self, text: &[u8]) -> UnixStream {
        let mut stream = self.connect();
        let _ = stream.write_all(text);
        stream
    }

    /// What the operator is answered, a status code.
    fn answer(&self) -> String {
        let mut stream = self.say(b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n");
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        String::from_utf8_lossy(&head[9..]).into_owned()
    }

    fn answers(&self) {
        assert_eq!(self.answer(), "200");
    }
}

/// Waits until an answer has begun or the connection has ended, and reads nothing.
fn hears(stream: &UnixStream) {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(60_000_u16)).unwrap(), 1);
}

/// The server has ended the connection; what was under way is read first.
fn ends(mut stream: UnixStream) {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
}

#[test]
fn clients_that_never_send_do_not_keep_the_operator_out() {
    let served = serve(Limits::default(), 1);
    let silent: Vec<_> = (0..CLIENTS_MAX + 8).map(|_| served.connect()).collect();
    served.answers();
    // Half a request is none.
    let slow: Vec<_> = (0..CLIENTS_MAX + 8).map(|_| served.say(&ASK[..10])).collect();
    served.answers();
    // The first ones have made room.
    ends(silent.into_iter().next().unwrap());
    drop(slow);
}

#[test]
fn clients_that_never_read_do_not_keep_the_operator_out() {
    let served = serve(Limits::default(), 1);
    let clients: Vec<_> = (0..CLIENTS_MAX + 8).map(|_| served.say(ASK)).collect();
    clients.iter().for_each(hears);
    served.answers();
}

#[test]
fn a_request_that_is_carried_out_is_never_ended_for_another() {
    let ask = b"PUT /snapshot HTTP/1.1\r\nContent-Length: 13\r\n\r\n{\"path\":\"/f\"}";
    let served = serve(Limits::default(), CLIENTS_MAX + 1);
    let mut busy: Vec<_> = (0..CLIENTS_MAX).map(|_| served.say(ask)).collect();
    served.gate_of.gate.wait();
    // All places are taken by what may not be ended.
    assert_eq!(served.answer(), "503");
    let reply = request(&served.socket, "GET", "/version", None).unwrap();
    assert_eq!(reply.status, 503);
    served.gate_of.gate.wait();
    for stream in &mut busy {
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
    }
    // They do nothing now.
    served.answers();
}

#[test]
fn whoever_takes_too_long_is_left() {
    let short = Duration::from_millis(20);
    let served = serve(Limits { request: short, ..Limits::default() }, 1);
    ends(served.connect());
    ends(served.say(&ASK[..10]));
    let served = serve(Limits { answer: short, ..Limits::default() }, 1);
    let unread = served.say(ASK);
    hears(&unread);
    // Ended from the other side while the answer is under way.
    let mut fds = [PollFd::new(unread.as_fd(), PollFlags::POLLHUP)];
    assert_eq!(poll(&mut fds, PollTimeout::from(60_000_u16)).unwrap(), 1);
}

#[test]
fn a_run_without_a_profile_says_so() {
    let served = serve(Limits::default(), 0);
    let reply = request(&served.socket, "GET", "/profile", None).unwrap();
    let body = reply.body.unwrap();
    assert_eq!((reply.status, body["fault_message"].as_str()), (409, Some(NO_PROFILE)));
}
