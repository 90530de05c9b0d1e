//! What lies between the servers, and between a client and a server: networks that lose what a test
//! wants lost.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Copies until either end closes.
fn copy(mut from: TcpStream, mut to: TcpStream, mut may_pass: impl FnMut(&[u8]) -> bool) {
    let mut buffer = [0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if may_pass(&buffer[..count]) && to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn listen(mut serve: impl FnMut(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            serve(stream);
        }
    });
    port
}

/// The network between the members. etcd says on each connection which member has opened it, in the
/// header `X-Server-From` (server/etcdserver/api/rafthttp), so one member can be cut off.
pub struct PeerNet {
    ports: Vec<u16>,
    state: Arc<Mutex<Net>>,
}

#[derive(Default)]
struct Net {
    /// The member that was cut off: its place and its number.
    cut: Option<(usize, String)>,
    open: Vec<Connection>,
}

struct Connection {
    from: String,
    to: usize,
    ends: [TcpStream; 2],
}

impl Net {
    fn is_cut(&self, from: &str, to: usize) -> bool {
        self.cut.as_ref().is_some_and(|(place, id)| *place == to || id == from)
    }
}

impl PeerNet {
    /// A network to the members that listen at these ports.
    pub fn new(members: &[u16]) -> Self {
        let state: Arc<Mutex<Net>> = Arc::default();
        let enter = |(place, port): (usize, &u16)| {
            let (state, port) = (state.clone(), *port);
            listen(move |stream| {
                let state = state.clone();
                thread::spawn(move || connect(stream, place, port, &state));
            })
        };
        let ports = members.iter().enumerate().map(enter).collect();
        Self { ports, state }
    }

    /// Where the others find a member.
    pub fn port(&self, member: usize) -> u16 {
        self.ports[member]
    }

    /// Cuts one off, at once.
    pub fn cut(&self, member: usize, id: u64) {
        let mut net = self.state.lock().unwrap();
        net.cut = Some((member, format!("{id:x}")));
        for connection in &net.open {
            if net.is_cut(&connection.from, connection.to) {
                connection.ends.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
            }
        }
    }

    /// Lets all through.
    pub fn join(&self) {
        self.state.lock().unwrap().cut = None;
    }
}

fn connect(mut stream: TcpStream, to: usize, port: u16, state: &Mutex<Net>) {
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(count @ 1..) => head.extend_from_slice(&buffer[..count]),
            _ => return,
        }
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let from = text.lines().find_map(|line| line.strip_prefix("X-Server-From: "));
    let from = from.unwrap_or_default().to_owned();
    let Ok(mut member) = TcpStream::connect(("127.0.0.1", port)) else { return };
    {
        let mut net = state.lock().unwrap();
        if net.is_cut(&from, to) {
            return;
        }
        let ends = [stream.try_clone().unwrap(), member.try_clone().unwrap()];
        net.open.push(Connection { from, to, ends });
    }
    if member.write_all(&head).is_ok() {
        let back = (member.try_clone().unwrap(), stream.try_clone().unwrap());
        thread::spawn(move || copy(back.0, back.1, |_| true));
        copy(stream, member, |_| true);
    }
}

/// A way to a member on which answers are lost from the moment that a request passes which holds
/// certain bytes; `lose_nothing` ends that for new connections.
pub struct LossyWay {
    /// Where clients find the member.
    pub port: u16,
    is_lossy: Arc<AtomicBool>,
}

impl LossyWay {
    /// A way to `port`.
    pub fn new(port: u16, needle: &'static str) -> Self {
        let is_lossy = Arc::new(AtomicBool::new(true));
        let lossy = is_lossy.clone();
        let way = listen(move |stream| {
            let Ok(member) = TcpStream::connect(("127.0.0.1", port)) else { return };
            let (seen, lossy) = (Arc::new(AtomicBool::new(false)), lossy.clone());
            let back = (member.try_clone().unwrap(), stream.try_clone().unwrap());
            let passed = seen.clone();
            thread::spawn(move || copy(back.0, back.1, |_| !passed.load(Ordering::SeqCst)));
            thread::spawn(move || {
                copy(stream, member, |sent| {
                    let holds = sent.windows(needle.len()).any(|part| part == needle.as_bytes());
                    if holds && lossy.load(Ordering::SeqCst) {
                        seen.store(true, Ordering::SeqCst);
                    }
                    true
                });
            });
        });
        Self { port: way, is_lossy }
    }

    /// From now on everything passes.
    pub fn lose_nothing(&self) {
        self.is_lossy.store(false, Ordering::SeqCst);
    }
}

/// A way that leads to a member, and later to another.
pub struct SwitchedWay {
    /// Where clients find the member.
    pub port: u16,
    to: Arc<AtomicU16>,
}

impl SwitchedWay {
    /// A way to `port`.
    pub fn new(port: u16) -> Self {
        let to = Arc::new(AtomicU16::new(port));
        let leads_to = to.clone();
        let port = listen(move |stream| {
            let port = leads_to.load(Ordering::SeqCst);
            let Ok(member) = TcpStream::connect(("127.0.0.1", port)) else { return };
            let back = (member.try_clone().unwrap(), stream.try_clone().unwrap());
            thread::spawn(move || copy(back.0, back.1, |_| true));
            thread::spawn(move || copy(stream, member, |_| true));
        });
        Self { port, to }
    }

    /// New connections lead to `port`.
    pub fn lead_to(&self, port: u16) {
        self.to.store(port, Ordering::SeqCst);
    }
}
