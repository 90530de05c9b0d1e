//! Real clients of a guest: ordinary sockets and curl, in the network the lab's hosts are plugged
//! into.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use crate::Program;
use crate::lab::Lab;

/// How long a client waits for one answer. Only a guest that is dead makes it pass.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one datagram is waited for before it is sent again.
const DATAGRAM_TIMEOUT: Duration = Duration::from_millis(500);

/// How long an unreachable guest is given before it is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// curl's exit status for a connection that was not made (curl(1)).
const CURL_NOT_CONNECTED: i32 = 7;

/// Moves the calling thread, and no other, into the clients' network for good.
///
/// # Errors
/// What the system said.
pub fn enter_network(lab: &Lab) -> io::Result<()> {
    enter_namespace(lab.namespace())
}

/// As [`enter_network`], by the namespace's name.
///
/// # Errors
/// What the system said.
pub fn enter_namespace(name: &str) -> io::Result<()> {
    let namespace = File::open(Path::new("/run/netns").join(name))?;
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

/// Sends a datagram into the blue.
///
/// # Errors
/// What the system said.
pub fn send_datagram(to: SocketAddr, payload: &[u8]) -> io::Result<()> {
    UdpSocket::bind("0.0.0.0:0")?.send_to(payload, to).map(drop)
}

/// Repeats `call` while the guest cannot be reached: where address resolution gave up on a slow
/// guest, the next attempt begins it anew.
///
/// # Errors
/// What `call` said last, or at once when it was something else.
pub fn reaching<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let tries = ANSWER_TIMEOUT.as_millis() / RETRY_PAUSE.as_millis();
    for _ in 1..tries {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::HostUnreachable => {}
            answer => return answer,
        }
        thread::sleep(RETRY_PAUSE);
    }
    call()
}

/// Sends a datagram to an echo server until it comes back; true when it came back unchanged.
///
/// # Errors
/// `TimedOut` when the server never answers, or what the system said.
pub fn echo_datagram(server: SocketAddr, payload: &[u8]) -> io::Result<bool> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(DATAGRAM_TIMEOUT))?;
    let mut answer = vec![0; payload.len() + 1];
    let tries = ANSWER_TIMEOUT.as_millis() / DATAGRAM_TIMEOUT.as_millis();
    for _ in 0..tries {
        socket.send(payload)?;
        match socket.recv(&mut answer) {
            Ok(count) => return Ok(answer[..count] == *payload),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Sends bytes over TCP to an echo server; true when they came back unchanged.
///
/// # Errors
/// What the system said.
pub fn echo_stream(server: SocketAddr, payload: &[u8]) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&server, ANSWER_TIMEOUT)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(payload)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::with_capacity(payload.len());
    stream.read_to_end(&mut answer)?;
    Ok(answer == payload)
}

/// Fetches a URL with curl; returns the body.
///
/// # Errors
/// curl's message when it fails; `HostUnreachable` when there was no connection.
pub fn fetch(lab: &Lab, url: &str) -> io::Result<Vec<u8>> {
    let timeout = ANSWER_TIMEOUT.as_secs().to_string();
    let arguments = ["-sS", "--fail", "--max-time", &timeout, url];
    let said = lab.client(Program::Curl, &arguments).map_err(io::Error::other)?.output()?;
    let kind = match said.status.code() {
        Some(0) => return Ok(said.stdout),
        Some(CURL_NOT_CONNECTED) => io::ErrorKind::HostUnreachable,
        _ => io::ErrorKind::Other,
    };
    Err(io::Error::new(kind, String::from_utf8_lossy(&said.stderr)))
}
