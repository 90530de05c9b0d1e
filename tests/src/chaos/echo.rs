//! Clients that number every byte: whatever is lost, changed, repeated or out of order is seen.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ftvmm_guest_programs::stream::{DEFAULT_SEED, fill};

use crate::clients::enter_namespace;
use crate::clock;
use crate::lab::Lab;

/// Bytes that are on their way at most, so that the stream goes on at all times.
const WINDOW_BYTES: u64 = 4096;
const WRITE_BYTES: u64 = 512;
const EVERY: Duration = Duration::from_millis(8);
/// A guest that is silent for so long is dead.
const GIVE_UP: Duration = Duration::from_secs(120);
/// So long answers to datagrams are waited for after the last was sent.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// What a client of a round saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Bytes, or datagrams, that came back right.
    pub right: u64,
    /// Datagrams that did not come back. The network may lose them.
    pub lost: u64,
    /// Datagrams that came back more than once. At a take-over the new host sends again what the
    /// old one has not reported as sent, so there may be some.
    pub repeated: u64,
    /// The longest time without an answer.
    pub longest_silence: Duration,
    /// What must not be, in words.
    pub wrong: Option<String>,
}

/// How a client and its owner speak.
struct Desk {
    stop: AtomicBool,
    right: AtomicU64,
}

impl Desk {
    /// `more` has come back right; the answer before came at `last`.
    fn note(&self, seen: &mut Seen, more: u64, last: &mut Instant) {
        seen.right += more;
        self.right.store(seen.right, Ordering::Relaxed);
        let now = clock::now();
        seen.longest_silence = seen.longest_silence.max(now - *last);
        *last = now;
    }
}

/// A client at work.
pub struct Client {
    desk: Arc<Desk>,
    thread: JoinHandle<io::Result<Seen>>,
}

impl Client {
    fn start(lab: &Lab, work: impl FnOnce(&Desk) -> io::Result<Seen> + Send + 'static) -> Self {
        let desk = Arc::new(Desk { stop: AtomicBool::new(false), right: AtomicU64::new(0) });
        let (own, namespace) = (Arc::clone(&desk), lab.namespace().to_owned());
        let thread = thread::spawn(move || {
            enter_namespace(&namespace)?;
            work(&own)
        });
        Self { desk, thread }
    }

    /// A stream over one connection for the whole round.
    pub fn stream(lab: &Lab, server: SocketAddr) -> Self {
        Self::start(lab, move |desk| stream(desk, server))
    }

    /// A numbered datagram now and then.
    pub fn datagrams(lab: &Lab, server: SocketAddr) -> Self {
        Self::start(lab, move |desk| datagrams(desk, server))
    }

    /// How much has come back right so far.
    pub fn right(&self) -> u64 {
        self.desk.right.load(Ordering::Relaxed)
    }

    /// Whether it has given up.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Has it send no more, and waits for what is under way.
    pub fn finish(self) -> Seen {
        self.desk.stop.store(true, Ordering::Relaxed);
        let broken = |wrong: String| Seen { wrong: Some(wrong), ..Seen::default() };
        match self.thread.join() {
            Ok(Ok(seen)) => seen,
            Ok(Err(error)) => broken(error.to_string()),
            Err(_) => broken("the client panicked".into()),
        }
    }
}

fn expected(offset_bytes: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fill(DEFAULT_SEED, offset_bytes, &mut bytes);
    bytes
}

fn stream(desk: &Desk, server: SocketAddr) -> io::Result<Seen> {
    let mut connection = TcpStream::connect_timeout(&server, GIVE_UP)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(EVERY))?;
    let (mut sent, mut seen, mut last) = (0, Seen::default(), clock::now());
    let mut buffer = vec![0; WINDOW_BYTES as usize];
    while !desk.stop.load(Ordering::Relaxed) || seen.right < sent {
        if !desk.stop.load(Ordering::Relaxed) && sent - seen.right < WINDOW_BYTES {
            connection.write_all(&expected(sent, WRITE_BYTES as usize))?;
            sent += WRITE_BYTES;
        }
        match connection.read(&mut buffer) {
            Ok(0) => return Err(io::Error::other("the guest closed the connection")),
            Ok(count) => {
                if buffer[..count] != expected(seen.right, count) {
                    let at = seen.right;
                    let wrong =
                        format!("{count} bytes at {at} of the stream are not what was sent");
                    return Ok(Seen { wrong: Some(wrong), ..seen });
                }
                desk.note(&mut seen, count as u64, &mut last);
                thread::sleep(EVERY);
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if last.elapsed() > GIVE_UP {
                    return Err(io::Error::other(format!("no answer for {GIVE_UP:?}")));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(seen)
}

/// Every datagram is asked once, so a second answer is a second copy of the first.
fn datagrams(desk: &Desk, server: SocketAddr) -> io::Result<Seen> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(EVERY))?;
    let (mut answered, mut seen) = (Vec::new(), Seen::default());
    let (mut last, mut stopped) = (clock::now(), None);
    while stopped.is_none_or(|at: Instant| at.elapsed() < LAST_ANSWERS) {
        if stopped.is_none() {
            // Nothing may listen at this moment; that is a datagram lost.
            let _ = socket.send(&(answered.len() as u64).to_le_bytes());
            answered.push(false);
            if desk.stop.load(Ordering::Relaxed) {
                stopped = Some(clock::now());
            }
        }
        let asked = clock::now();
        while let Some(rest) = EVERY.checked_sub(asked.elapsed()).filter(|rest| !rest.is_zero()) {
            socket.set_read_timeout(Some(rest))?;
            let mut answer = [0; 9];
            let Ok(8) = socket.recv(&mut answer) else { continue };
            let number =
                answer.first_chunk().map_or(u64::MAX, |number| u64::from_le_bytes(*number));
            match usize::try_from(number).ok().and_then(|number| answered.get_mut(number)) {
                None => return Err(io::Error::other(format!("datagram {number} was never sent"))),
                Some(true) => seen.repeated += 1,
                Some(open) => *open = true,
            }
            desk.note(&mut seen, 1, &mut last);
        }
    }
    seen.lost = answered.iter().filter(|answered| !**answered).count() as u64;
    Ok(seen)
}
