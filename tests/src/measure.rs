//! Times a client sees: one request after the other, each waited for.
//!
//! Every function with an address runs in the network of the calling thread;
//! [`crate::clients::enter_network`] moves a thread to the clients of a lab. The first requests are
//! not counted: they pay for address resolution and cold caches.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use crate::clients::reaching;
use crate::clock;
use crate::lab::{LabError, LabProcess};
use crate::pair::READY;

/// What `ftvmm` logs when the guest's first instruction is next.
pub const SWITCHED_ON: &str = "the guest is switched on";
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Requests before the ones that count.
pub const WARM_UP: usize = 5;
/// After this long without an answer a datagram counts as lost.
const LOST: Duration = Duration::from_secs(5);
/// Longest wait for one answer over TCP. Only a server that is dead makes it pass.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a small request, and of its echo.
const PAYLOAD_BYTES: usize = 64;

/// Times of requests in the order they were made.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// Those that were answered.
    pub answered: Vec<Duration>,
    /// How many were not.
    pub lost: usize,
}

/// Round trips of small datagrams to an echo server, one outstanding.
///
/// # Errors
/// `TimedOut` when the server does not answer at all, or what the system said.
pub fn udp_echoes(server: SocketAddr, count: usize) -> io::Result<Times> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    let mut times = Times::default();
    for number in 0..WARM_UP + count {
        let took = reaching(|| udp_echo(&socket, number as u64))?;
        if number < WARM_UP {
            continue;
        }
        match took {
            Some(took) => times.answered.push(took),
            None => times.lost += 1,
        }
    }
    if times.answered.is_empty() && count > 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(times)
}

/// One round trip; `None` when the datagram or its echo got lost.
fn udp_echo(socket: &UdpSocket, number: u64) -> io::Result<Option<Duration>> {
    let mut payload = [0; PAYLOAD_BYTES];
    payload[..8].copy_from_slice(&number.to_le_bytes());
    let mut answer = [0; PAYLOAD_BYTES + 1];
    let started = clock::now();
    socket.send(&payload)?;
    // A late echo of an earlier datagram is passed over, and must not prolong the wait.
    while let Some(left) = LOST.checked_sub(clock::now() - started).filter(|d| !d.is_zero()) {
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut answer) {
            Ok(length) if answer[..length] == payload => return Ok(Some(clock::now() - started)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Round trips of small messages over one TCP connection to an echo server, one outstanding.
///
/// # Errors
/// What the system said.
pub fn tcp_echoes(server: SocketAddr, count: usize) -> io::Result<Times> {
    let mut stream = reaching(|| connect(server))?;
    let mut payload = [0; PAYLOAD_BYTES];
    let mut took = || -> io::Result<Duration> {
        let started = clock::now();
        stream.write_all(&payload)?;
        stream.read_exact(&mut payload)?;
        Ok(clock::now() - started)
    };
    (0..WARM_UP).try_for_each(|_| took().map(drop))?;
    let answered = (0..count).map(|_| took()).collect::<Result<_, _>>()?;
    Ok(Times { answered, lost: 0 })
}

/// Times of whole HTTP requests for `path`, from connecting to the end of the connection; the
/// answer must carry `body_bytes`.
///
/// # Errors
/// `InvalidData` when the answer is not what was asked for, or what the system said.
pub fn http_requests(
    server: SocketAddr,
    path: &str,
    body_bytes: usize,
    count: usize,
) -> io::Result<Times> {
    let took = || http_request(server, path, body_bytes);
    (0..WARM_UP).try_for_each(|_| reaching(took).map(drop))?;
    let answered = (0..count).map(|_| took()).collect::<Result<_, _>>()?;
    Ok(Times { answered, lost: 0 })
}

fn http_request(server: SocketAddr, path: &str, body_bytes: usize) -> io::Result<Duration> {
    let started = clock::now();
    let mut stream = connect(server)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let took = clock::now() - started;
    let head_end = answer.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
    let right = answer.starts_with(b"HTTP/1.1 200 ")
        && head_end.is_some_and(|end| answer.len() - end == body_bytes);
    if right { Ok(took) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn connect(server: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, ANSWER_TIMEOUT)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// From power-on until the guest serves, whatever `ftvmm` had to wait for before; `None` when it
/// ended instead.
///
/// # Errors
/// As [`LabProcess::wait_for_stdout`].
pub fn boot_time(ftvmm: &LabProcess) -> Result<Option<Duration>, LabError> {
    while !String::from_utf8_lossy(&ftvmm.stderr()).contains(SWITCHED_ON) {
        if ftvmm.ended().is_some() {
            return Ok(None);
        }
        thread::sleep(LOOK_EVERY);
    }
    let started = clock::now();
    Ok(ftvmm.wait_for_stdout(READY)?.then(|| clock::now() - started))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn an_echo_of_something_else_is_passed_over() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let answered = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&answered);
        thread::spawn(move || {
            let mut buffer = [0; PAYLOAD_BYTES];
            let (_, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&[0xff; PAYLOAD_BYTES], from).unwrap();
            thread::sleep(LOOK_EVERY);
            answered.store(true, Ordering::SeqCst);
            server.send_to(&buffer, from).unwrap();
        });
        assert!(udp_echo(&client, 7).unwrap().is_some());
        assert!(seen.load(Ordering::SeqCst));
    }

    #[test]
    fn a_short_answer_is_no_measurement() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                let _ = client.read(&mut [0; 1024]).unwrap();
                client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc").unwrap();
            }
        });
        assert_eq!(http_requests(address, "/", 3, 2).unwrap().answered.len(), 2);
        let error = http_requests(address, "/", 4, 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
