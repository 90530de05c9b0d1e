//! The byte stream to the other host: TCP, never blocking, inside TLS where the two hosts have to
//! prove who they are (decision 0032).

mod door;
mod handshake;
pub mod key_file;
mod security;
mod strangers;
#[cfg(test)]
mod tests;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::Connection;
use thiserror::Error;

use self::handshake::{Handshake, Progress};
use crate::clock::HostClock;
use crate::sync::{Mutex, lock};

pub use self::door::Door;
pub use self::handshake::HandshakeError;
pub use self::security::{Security, SecurityError};

/// How long a backup tries to reach its primary, in seconds.
pub const CONNECT_SECONDS_MAX: u64 = 60;
const CONNECT_RETRY: Duration = Duration::from_millis(100);
/// Read at a time.
const RECEIVE_BYTES: usize = 256 * 1024;
/// Encrypted at a time: four records (RFC 8446 section 5.1).
const ENCRYPT_BYTES: usize = 64 * 1024;
/// How long a backup waits for one handshake.
const HANDSHAKE_LONGEST: Duration = Duration::from_secs(5);

/// Why there is no channel.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {cause}; choose a free port of this host with --listen")]
    Listen {
        /// What was asked for.
        address: SocketAddr,
        /// The cause.
        cause: std::io::Error,
    },
    /// No connection within the time limit.
    #[error("no primary answers at {address} within {CONNECT_SECONDS_MAX} s: {cause}")]
    Connect {
        /// What was asked for.
        address: SocketAddr,
        /// The last cause.
        cause: std::io::Error,
    },
    /// What answers is not the other host.
    #[error("the peer at {address} is not accepted: {cause}")]
    Handshake {
        /// What was asked for.
        address: SocketAddr,
        /// Why.
        cause: HandshakeError,
    },
    /// What answers is no ftvmm.
    #[error("the peer at {address} is no primary: {cause}; is an ftvmm primary listening there?")]
    NoPrimary {
        /// What was asked for.
        address: SocketAddr,
        /// Why.
        cause: HandshakeError,
    },
    /// Nobody has said that an address of a network may do without proof.
    #[error(
        "the channel at {0} would be open to everybody; make a key with 'ftvmm keygen FILE', copy \
         it to both hosts and add --channel-key FILE, or say --insecure-channel"
    )]
    Open(SocketAddr),
    /// The host refused something.
    #[error("the channel cannot be set up: {0}")]
    SetUp(#[from] std::io::Error),
}

/// A connection, before it is served.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
    tls: Option<Connection>,
}

/// The half that sends, and what could not be sent yet. Ends the connection when it is dropped.
#[derive(Debug)]
pub struct ChannelWriter {
    stream: TcpStream,
    /// The peer is not to take this for the end of what is sent.
    is_reset: bool,
    tls: Option<Arc<Mutex<Connection>>>,
    unsent: Vec<u8>,
}

/// The half that receives.
#[derive(Debug)]
pub struct ChannelReader {
    stream: TcpStream,
    tls: Option<Arc<Mutex<Connection>>>,
    /// As it came from the socket.
    buffer: Vec<u8>,
    /// Decrypted.
    plain: Vec<u8>,
    /// Bytes may have come with the handshake.
    is_new: bool,
}

impl Channel {
    /// Listens for one peer.
    ///
    /// # Errors
    /// When the address is not free or not this host's, or `security` does not suffice for it.
    pub fn listen(address: SocketAddr, security: &Security) -> Result<TcpListener, ChannelError> {
        if !security.allows(address) {
            return Err(ChannelError::Open(address));
        }
        TcpListener::bind(address).map_err(|cause| ChannelError::Listen { address, cause })
    }

    /// Connects to the primary, which may still be starting, and makes sure of it.
    ///
    /// # Errors
    /// When no connection is made within `CONNECT_SECONDS_MAX`, or what answers is not accepted.
    pub fn connect(address: SocketAddr, security: &Security) -> Result<Self, ChannelError> {
        if !security.allows(address) {
            return Err(ChannelError::Open(address));
        }
        let clock = HostClock::host_start();
        loop {
            let cause =
                match Self::try_connect(address, security, HANDSHAKE_LONGEST, HANDSHAKE_LONGEST) {
                    Ok(channel) => return Ok(channel),
                    Err(HandshakeError::Lost(cause)) => cause,
                    Err(cause @ (HandshakeError::NotFtvmm(_) | HandshakeError::Silent)) => {
                        return Err(ChannelError::NoPrimary { address, cause });
                    }
                    Err(cause) => return Err(ChannelError::Handshake { address, cause }),
                };
            if clock.host_now_ns() > CONNECT_SECONDS_MAX * 1_000_000_000 {
                return Err(ChannelError::Connect { address, cause });
            }
            std::thread::sleep(CONNECT_RETRY);
        }
    }

    /// Connects to a host that listens now, and makes sure of it.
    ///
    /// # Errors
    /// When it does not take the connection within a second, or is not accepted.
    pub fn connect_once(address: SocketAddr, security: &Security) -> Result<Self, HandshakeError> {
        Self::try_connect(address, security, Duration::from_secs(1), HANDSHAKE_LONGEST)
    }

    /// As [`Self::connect_once`], with `longest` for the connection and as long for the proof.
    ///
    /// # Errors
    /// As [`Self::connect_once`].
    pub fn connect_within(
        address: SocketAddr,
        security: &Security,
        longest: Duration,
    ) -> Result<Self, HandshakeError> {
        Self::try_connect(address, security, longest, longest)
    }

    fn try_connect(
        address: SocketAddr,
        security: &Security,
        connect_longest: Duration,
        handshake_longest: Duration,
    ) -> Result<Self, HandshakeError> {
        let stream = TcpStream::connect_timeout(&address, connect_longest)?;
        let clock = HostClock::host_start();
        stream.set_nonblocking(true)?;
        let mut handshake = Handshake::connect(security, &stream)?;
        let until_ns = clock.host_now_ns().saturating_add(handshake_longest.as_nanos() as u64);
        // Without TLS the primary's preamble need not be waited for: the session does that.
        while security.is_proved() && handshake.go_on(&stream)? == Progress::Waits {
            let left_ns = until_ns.saturating_sub(clock.host_now_ns());
            if left_ns == 0 {
                return Err(HandshakeError::Silent);
            }
            let left_ms = u16::try_from(left_ns.div_ceil(1_000_000)).unwrap_or(u16::MAX);
            let mut fds = [PollFd::new(stream.as_fd(), handshake.interest())];
            match poll(&mut fds, PollTimeout::from(left_ms)) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(std::io::Error::from(error).into()),
            }
        }
        Ok(Self::new(stream, handshake)?)
    }

    fn new(stream: TcpStream, handshake: Handshake) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, tls: handshake.tls })
    }

    /// This host's end of the connection.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// The other end of the connection.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn peer_address(&self) -> std::io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// The two halves.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn split(self) -> std::io::Result<(ChannelReader, ChannelWriter)> {
        let tls = self.tls.map(|tls| Arc::new(Mutex::new(tls)));
        let reader = ChannelReader {
            stream: self.stream.try_clone()?,
            is_new: tls.is_some(),
            tls: tls.clone(),
            buffer: vec![0; RECEIVE_BYTES],
            plain: Vec::new(),
        };
        Ok((
            reader,
            ChannelWriter { stream: self.stream, is_reset: false, tls, unsent: Vec::new() },
        ))
    }
}

impl ChannelWriter {
    /// Adds bytes to send; [`Self::flush`] sends them.
    pub fn push(&mut self, bytes: Vec<u8>) {
        match self.unsent.is_empty() {
            true => self.unsent = bytes,
            false => self.unsent.extend_from_slice(&bytes),
        }
    }

    /// Ends the connection as one that broke, when its reader is dropped too: the peer sees a reset
    /// and no end (SO_LINGER in socket(7), with no time to linger).
    pub fn reset(mut self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        self.is_reset = setsockopt(&self.stream, sockopt::Linger, &linger).is_ok();
    }

    /// Whether there is anything to send.
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty() || self.tls.as_ref().is_some_and(|tls| lock(tls).wants_write())
    }

    /// Sends as much as the host takes now; true when nothing is left.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn flush(&mut self) -> std::io::Result<bool> {
        let mut sent = 0;
        let result = loop {
            let is_empty = self.tls.as_ref().is_none_or(|tls| !lock(tls).wants_write());
            if sent == self.unsent.len() && is_empty {
                break Ok(true);
            }
            match send_some(&mut self.stream, self.tls.as_deref(), &self.unsent[sent..]) {
                Ok(None) => {}
                Ok(Some(0)) => break Err(ErrorKind::WriteZero.into()),
                Ok(Some(count)) => sent += count,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break Ok(false),
                Err(e) => break Err(e),
            }
        };
        self.unsent.drain(..sent);
        result
    }
}

/// Sends bytes; `None` when it has sent bytes that were encrypted before.
fn send_some(
    stream: &mut TcpStream,
    tls: Option<&Mutex<Connection>>,
    bytes: &[u8],
) -> std::io::Result<Option<usize>> {
    let Some(tls) = tls else { return stream.write(bytes).map(Some) };
    let mut tls = lock(tls);
    if tls.wants_write() {
        return match tls.write_tls(stream)? {
            0 => Ok(Some(0)),
            _ => Ok(None),
        };
    }
    let taken = tls.writer().write(&bytes[..bytes.len().min(ENCRYPT_BYTES)])?;
    Ok(Some(taken))
}

/// What has arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// These bytes; there may be more.
    Bytes(&'a [u8]),
    /// Nothing.
    Nothing,
    /// The peer has closed the connection.
    Closed,
}

impl ChannelReader {
    /// What is to be waited for.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Takes what has arrived.
    ///
    /// # Errors
    /// When the connection is gone, or what came was changed on its way.
    pub fn receive(&mut self) -> std::io::Result<Received<'_>> {
        if std::mem::take(&mut self.is_new) {
            self.decrypt(0)?;
            if !self.plain.is_empty() {
                return Ok(Received::Bytes(&self.plain));
            }
        }
        loop {
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Ok(Received::Closed),
                Ok(count) if self.tls.is_none() => {
                    return Ok(Received::Bytes(&self.buffer[..count]));
                }
                Ok(count) => {
                    self.decrypt(count)?;
                    if !self.plain.is_empty() {
                        return Ok(Received::Bytes(&self.plain));
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Received::Nothing),
                Err(e) => return Err(e),
            }
        }
    }

    /// Decrypts all that TLS has, with `count` bytes more: none is left behind that epoll would not
    /// know of.
    fn decrypt(&mut self, count: usize) -> std::io::Result<()> {
        self.plain.clear();
        let Some(tls) = &self.tls else { return Ok(()) };
        let mut tls = lock(tls);
        let mut rest = &self.buffer[..count];
        loop {
            let state = tls
                .process_new_packets()
                .map_err(|cause| std::io::Error::new(ErrorKind::InvalidData, cause))?;
            let ready = state.plaintext_bytes_to_read();
            let start = self.plain.len();
            self.plain.resize(start + ready, 0);
            if ready > 0 {
                tls.reader().read_exact(&mut self.plain[start..])?;
            }
            if rest.is_empty() {
                return Ok(());
            }
            // None are taken after the peer's close_notify.
            if tls.read_tls(&mut rest)? == 0 {
                return Ok(());
            }
        }
    }
}

impl Drop for ChannelWriter {
    /// Ends the connection for every handle on it.
    fn drop(&mut self) {
        if !self.is_reset {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}
