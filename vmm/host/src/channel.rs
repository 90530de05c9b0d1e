//! The byte stream to the other host: TCP, never blocking.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use thiserror::Error;

use crate::clock::HostClock;

/// How long a backup tries to reach its primary, in seconds.
const CONNECT_SECONDS_MAX: u64 = 60;
const CONNECT_RETRY: Duration = Duration::from_millis(100);
/// Read at a time.
const RECEIVE_BYTES: usize = 256 * 1024;

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
    /// The host refused something.
    #[error("the channel cannot be set up: {0}")]
    SetUp(#[from] std::io::Error),
}

/// A connection, before it is served.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
}

/// The half that sends, and what could not be sent yet. Ends the connection when it is dropped.
#[derive(Debug)]
pub struct ChannelWriter {
    stream: TcpStream,
    unsent: Vec<u8>,
}

/// The half that receives.
#[derive(Debug)]
pub struct ChannelReader {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Channel {
    /// Listens for one peer.
    ///
    /// # Errors
    /// When the address is not free or not this host's.
    pub fn listen(address: SocketAddr) -> Result<TcpListener, ChannelError> {
        TcpListener::bind(address).map_err(|cause| ChannelError::Listen { address, cause })
    }

    /// Takes the next peer that comes.
    ///
    /// # Errors
    /// When the host fails.
    pub fn accept(listener: &TcpListener) -> Result<Self, ChannelError> {
        let (stream, peer) = listener.accept()?;
        tracing::info!(%peer, "a backup connected");
        Ok(Self::new(stream)?)
    }

    /// Connects to the primary, which may still be starting.
    ///
    /// # Errors When no connection is made within `CONNECT_SECONDS_MAX`.
    pub fn connect(address: SocketAddr) -> Result<Self, ChannelError> {
        let clock = HostClock::host_start();
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                Ok(stream) => return Ok(Self::new(stream)?),
                Err(cause) if clock.host_now_ns() > CONNECT_SECONDS_MAX * 1_000_000_000 => {
                    return Err(ChannelError::Connect { address, cause });
                }
                Err(_) => std::thread::sleep(CONNECT_RETRY),
            }
        }
    }

    /// Connects to a host that listens now.
    ///
    /// # Errors
    /// When it does not, within a second.
    pub fn connect_once(address: SocketAddr) -> std::io::Result<Self> {
        Self::new(TcpStream::connect_timeout(&address, Duration::from_secs(1))?)
    }

    fn new(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream })
    }

    /// This host's end of the connection.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// The two halves.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn split(self) -> std::io::Result<(ChannelReader, ChannelWriter)> {
        let buffer = vec![0; RECEIVE_BYTES];
        let reader = ChannelReader { stream: self.stream.try_clone()?, buffer };
        Ok((reader, ChannelWriter { stream: self.stream, unsent: Vec::new() }))
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

    /// Whether there is anything to send.
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends as much as the host takes now; true when nothing is left.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn flush(&mut self) -> std::io::Result<bool> {
        let mut sent = 0;
        let result = loop {
            if sent == self.unsent.len() {
                break Ok(true);
            }
            match self.stream.write(&self.unsent[sent..]) {
                Ok(0) => break Err(ErrorKind::WriteZero.into()),
                Ok(count) => sent += count,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break Ok(false),
                Err(e) => break Err(e),
            }
        };
        self.unsent.drain(..sent);
        result
    }
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
    /// When the connection is gone.
    pub fn receive(&mut self) -> std::io::Result<Received<'_>> {
        loop {
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Ok(Received::Closed),
                Ok(count) => return Ok(Received::Bytes(&self.buffer[..count])),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Received::Nothing),
                Err(e) => return Err(e),
            }
        }
    }
}

impl Drop for ChannelWriter {
    /// Ends the connection for every handle on it.
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
