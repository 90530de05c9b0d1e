//! The port where a backup connects: whoever comes has to show that it is the other host before it
//! costs more than a place here. A thread of its own waits for them.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::handshake::{Handshake, Progress};
use super::security::Security;
use super::strangers::Strangers;
use super::{Channel, HandshakeError};
use crate::clock::HostClock;
use crate::contain::Thread;

/// Connections that have not proved anything yet; the oldest makes room for one more.
const PENDING_MAX: usize = 8;
/// Time that each of them has, in nanoseconds.
const PENDING_LONGEST_NS: u64 = 2_000_000_000;
/// Pause after the host had no descriptor for a connection, in nanoseconds.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;
/// Longest sleep: lines that were held back are due then at the latest, in milliseconds.
const SLEEP_LONGEST_MS: u16 = 1000;

/// Takes connections until it is dropped.
pub struct Door {
    stop: Arc<(AtomicBool, EventFd)>,
    thread: Option<JoinHandle<()>>,
}

struct Pending {
    stream: TcpStream,
    peer: SocketAddr,
    since_ns: u64,
    handshake: Handshake,
}

struct Keeper {
    listener: TcpListener,
    security: Security,
    stop: Arc<(AtomicBool, EventFd)>,
    pending: Vec<Pending>,
    accepts_from_ns: u64,
    strangers: Strangers,
    on_peer: Box<dyn Fn(Channel) + Send>,
}

impl Door {
    /// Hands every peer that `security` accepts to `on_peer`.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn open(
        listener: TcpListener,
        security: Security,
        on_peer: Box<dyn Fn(Channel) + Send>,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let stop = Arc::new((AtomicBool::new(false), EventFd::new(libc::EFD_NONBLOCK)?));
        let mut keeper = Keeper {
            listener,
            security,
            stop: stop.clone(),
            pending: Vec::new(),
            accepts_from_ns: 0,
            strangers: Strangers::default(),
            on_peer,
        };
        let thread = Thread::Handshake.start(move || keeper.run())?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Door {
    /// The port is free afterwards.
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::Release);
        let _ = self.stop.1.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Keeper {
    fn run(&mut self) {
        let clock = HostClock::host_start();
        while !self.stop.0.load(Ordering::Acquire) {
            let now_ns = clock.host_now_ns();
            self.leave_slow(now_ns);
            self.strangers.say_held(now_ns);
            let Ok(has_come) = self.wait(now_ns) else { return };
            let now_ns = clock.host_now_ns();
            self.greet(now_ns);
            if has_come {
                self.accept(now_ns);
            }
        }
    }

    /// Sleeps until something happens. Returns whether somebody is at the door.
    fn wait(&self, now_ns: u64) -> Result<bool, Errno> {
        let accepts = now_ns >= self.accepts_from_ns;
        let at_door = if accepts { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), at_door),
            PollFd::new(borrow(&self.stop.1), PollFlags::POLLIN),
        ];
        for pending in &self.pending {
            fds.push(PollFd::new(pending.stream.as_fd(), pending.handshake.interest()));
        }
        let ends = self.pending.iter().map(|pending| pending.since_ns + PENDING_LONGEST_NS);
        let due = ends.chain((!accepts).then_some(self.accepts_from_ns)).min();
        let sleep = due.map_or(u64::MAX, |due| due.saturating_sub(now_ns).div_ceil(1_000_000));
        let sleep = u16::try_from(sleep).unwrap_or(u16::MAX).min(SLEEP_LONGEST_MS);
        match poll(&mut fds, PollTimeout::from(sleep)) {
            Ok(_) => Ok(accepts && fds[0].any().unwrap_or(true)),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => {
                tracing::error!(%error, "no backup can connect any more");
                Err(error)
            }
        }
    }

    fn accept(&mut self, now_ns: u64) {
        match self.listener.accept() {
            Ok((stream, peer)) => {
                if self.pending.len() >= PENDING_MAX {
                    let oldest = self.pending.remove(0);
                    self.strangers.say(now_ns, oldest.peer, "it made room for a later one");
                }
                let handshake = Handshake::serve(&self.security);
                let ready = stream.set_nonblocking(true).map_err(HandshakeError::from);
                match ready.and(handshake) {
                    Ok(handshake) => {
                        self.pending.push(Pending { stream, peer, since_ns: now_ns, handshake });
                    }
                    Err(error) => self.strangers.say(now_ns, peer, &error.to_string()),
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                self.accepts_from_ns = now_ns + ACCEPT_PAUSE_NS;
                self.strangers.not_accepted(now_ns, &error);
            }
        }
    }

    /// Goes on with every handshake whose socket has something.
    fn greet(&mut self, now_ns: u64) {
        for mut pending in std::mem::take(&mut self.pending) {
            match pending.handshake.go_on(&pending.stream) {
                Ok(Progress::Waits) => self.pending.push(pending),
                Ok(Progress::Done) => {
                    let Pending { stream, peer, handshake, .. } = pending;
                    match Channel::new(stream, handshake) {
                        Ok(channel) => (self.on_peer)(channel),
                        Err(error) => self.strangers.say(now_ns, peer, &error.to_string()),
                    }
                }
                Err(error) => self.strangers.say(now_ns, pending.peer, &error.to_string()),
            }
        }
    }

    fn leave_slow(&mut self, now_ns: u64) {
        let (strangers, mut left) = (&mut self.strangers, Vec::new());
        for pending in std::mem::take(&mut self.pending) {
            if now_ns >= pending.since_ns + PENDING_LONGEST_NS {
                strangers.say(now_ns, pending.peer, "it did not say in 2 s who it is");
            } else {
                left.push(pending);
            }
        }
        self.pending = left;
    }
}

/// The descriptor for poll.
fn borrow(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor stays open for as long as the event that is borrowed with it.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
