//! What the clients' network heard from the guest, and behind which host: a capture of all frames
//! that both hosts send there.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

use crate::clients::enter_namespace;
use crate::lab::Lab;

/// Bytes of a frame that are looked at: both addresses and the type.
const HEAD_BYTES: usize = 14;
/// How long the capture takes to see that it is to stop.
const LOOK_EVERY_MS: i64 = 50;
/// `PACKET_OUTGOING` of packet(7): what this side sends to the host.
pub(crate) const OUTGOING: u8 = 4;

/// Frames of the guest that came from one host, with none from another between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The host, `a` or `b`.
    pub host: &'static str,
    /// How many.
    pub frames: u64,
}

/// A capture under way.
pub struct Capture {
    stop: Arc<AtomicBool>,
    spans: Arc<Mutex<Vec<Span>>>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Listens to the ports of both hosts for frames from `mac`.
    ///
    /// # Errors
    /// When the system refuses the socket.
    pub fn start(lab: &Lab, mac: [u8; 6]) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let spans = Arc::new(Mutex::new(Vec::new()));
        let (own_stop, own_spans) = (Arc::clone(&stop), Arc::clone(&spans));
        let namespace = lab.namespace().to_owned();
        let (told, ready) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || match listen(&namespace) {
            Ok(listening) => {
                let _ = told.send(Ok(()));
                while !own_stop.load(Ordering::Relaxed) {
                    listening.look(mac, &own_spans);
                }
            }
            Err(error) => drop(told.send(Err(error))),
        });
        ready.recv().map_err(io::Error::other)??;
        Ok(Self { stop, spans, thread: Some(thread) })
    }

    /// What was heard since the last call.
    pub fn take(&self) -> Vec<Span> {
        // Frames that lie in the socket belong to what was.
        thread::sleep(Duration::from_millis(2 * LOOK_EVERY_MS.cast_unsigned()));
        std::mem::take(&mut *self.spans.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes this thread into a namespace, all of whose frames the socket hears. It waits for one as
/// long as a look takes.
pub(crate) fn packet_socket(namespace: &str) -> io::Result<OwnedFd> {
    enter_namespace(namespace)?;
    let all = Some(SockProtocol::EthAll);
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, LOOK_EVERY_MS * 1000))?;
    Ok(socket)
}

struct Listening {
    socket: OwnedFd,
    /// Index and host of each port.
    ports: [(usize, &'static str); 2],
}

fn listen(namespace: &str) -> io::Result<Listening> {
    let socket = packet_socket(namespace)?;
    let index = |port: &str| if_nametoindex(port).map(|index| index as usize);
    let ports = [(index("a-outer")?, "a"), (index("b-outer")?, "b")];
    // A round makes some thousand frames; none may be missing.
    setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20))?;
    Ok(Listening { socket, ports })
}

impl Listening {
    /// Takes one frame, or finds that none came.
    fn look(&self, mac: [u8; 6], spans: &Mutex<Vec<Span>>) {
        let mut head = [0; HEAD_BYTES];
        let Ok((length, Some(from))) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut head)
        else {
            return;
        };
        let port = self.ports.iter().find(|(index, _)| *index == from.ifindex());
        let Some((_, host)) = port.filter(|_| from.pkttype() != OUTGOING) else { return };
        if length < HEAD_BYTES || head[6..12] != mac {
            return;
        }
        let mut spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
        match spans.last_mut() {
            Some(span) if span.host == *host => span.frames += 1,
            _ => spans.push(Span { host, frames: 1 }),
        }
    }
}
