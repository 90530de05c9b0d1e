//! How two hosts make sure of each other, before anything else is said.

use std::io::{self, ErrorKind};
use std::net::TcpStream;

use ftvmm_replication::wire;
use nix::poll::PollFlags;
use rustls::{
    AlertDescription, ClientConnection, CommonState, Connection, InvalidMessage, ServerConnection,
};
use thiserror::Error;

use super::security::Security;

/// Magic of [`wire::PREAMBLE`], whose version may be another.
const MAGIC: &[u8] = wire::PREAMBLE.split_at(6).0;
/// First bytes of a TLS handshake record (RFC 8446 section 5.1).
const TLS_HANDSHAKE: [u8; 2] = [0x16, 3];
/// First byte of any TLS record: from change_cipher_spec to application_data.
const TLS_RECORDS: std::ops::RangeInclusive<u8> = 0x14..=0x17;

/// Why the other end is not the other host.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// It is gone; another attempt may do better.
    #[error("the connection was lost before both hosts had proved who they are: {0}")]
    Lost(#[from] io::Error),
    /// It speaks without TLS.
    #[error(
        "the other host speaks without TLS and this one with it; give both the same --channel-key"
    )]
    PeerIsPlain,
    /// It speaks with TLS.
    #[error(
        "the other host speaks with TLS and this one without it; give both the same --channel-key"
    )]
    PeerHasTls,
    /// It has another key or certificate.
    #[error(
        "the two hosts do not accept each other's key or certificate ({0}); give both the same \
         --channel-key, or certificates of the same --tls-ca"
    )]
    NotAccepted(String),
    /// It is something else.
    #[error("it is no ftvmm: it began with \"{}\"", .0.escape_ascii())]
    NotFtvmm(Vec<u8>),
    /// It takes the connection and says nothing.
    #[error("it said nothing for 5 s")]
    Silent,
    /// TLS failed otherwise.
    #[error("TLS failed: {0}")]
    Tls(rustls::Error),
}

/// How far a handshake is.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// It goes on when the socket has bytes.
    Waits,
    /// Both are sure of each other, or need not be.
    Done,
}

/// A handshake over a socket that never blocks.
#[derive(Debug)]
pub struct Handshake {
    pub(super) tls: Option<Connection>,
    has_begun: bool,
}

impl Handshake {
    /// Of the side that is connected to.
    ///
    /// # Errors
    /// When TLS does not take its own configuration.
    pub fn serve(security: &Security) -> Result<Self, HandshakeError> {
        let server = |tls: &super::security::Tls| ServerConnection::new(tls.server.clone());
        let tls = security.tls().map(server).transpose().map_err(HandshakeError::Tls)?;
        Ok(Self { tls: tls.map(Into::into), has_begun: false })
    }

    /// Of the side that connects.
    ///
    /// # Errors
    /// As [`Self::serve`].
    pub fn connect(security: &Security, stream: &TcpStream) -> Result<Self, HandshakeError> {
        let Some(tls) = security.tls() else { return Ok(Self { tls: None, has_begun: false }) };
        // An address is never sent as a name, and none is compared (decision 0032).
        let name = stream.peer_addr()?.ip().into();
        let client = ClientConnection::new(tls.client.clone(), name);
        let tls = Some(client.map_err(HandshakeError::Tls)?.into());
        Ok(Self { tls, has_begun: false })
    }

    /// What the socket is waited for: bytes, and room where some wait that it did not take.
    pub fn interest(&self) -> PollFlags {
        match self.tls.as_deref().is_some_and(CommonState::wants_write) {
            true => PollFlags::POLLIN | PollFlags::POLLOUT,
            false => PollFlags::POLLIN,
        }
    }

    /// Goes on as far as the socket allows.
    ///
    /// # Errors
    /// When the other end is not the other host, or is gone.
    pub fn go_on(&mut self, stream: &TcpStream) -> Result<Progress, HandshakeError> {
        if !self.has_begun && !self.begins_right(stream)? && self.tls.is_none() {
            return Ok(Progress::Waits);
        }
        let Some(tls) = &mut self.tls else { return Ok(Progress::Done) };
        loop {
            let reads = match step(tls, stream) {
                Err(HandshakeError::Lost(e)) if e.kind() == ErrorKind::WouldBlock => {
                    return Ok(Progress::Waits);
                }
                result => result?,
            };
            if is_sure(tls) && !tls.wants_write() {
                return Ok(Progress::Done);
            }
            // What begins wrong is named before TLS says that it is invalid.
            if reads && !self.has_begun {
                self.has_begun = true;
            }
        }
    }

    /// Looks at the first bytes, which stay where they are; false while there are too few.
    fn begins_right(&mut self, stream: &TcpStream) -> Result<bool, HandshakeError> {
        let mut first = [0; wire::PREAMBLE.len()];
        let count = match stream.peek(&mut first) {
            Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(count) => count,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let first = &first[..count];
        let is_plain = first.starts_with(MAGIC);
        let has_tls = first.starts_with(&TLS_HANDSHAKE);
        match (is_plain, has_tls, self.tls.is_some()) {
            (true, _, true) => {
                tell_that_tls_is_spoken(stream);
                return Err(HandshakeError::PeerIsPlain);
            }
            (_, true, false) => {
                let _ = io::Write::write(&mut &*stream, &wire::PREAMBLE);
                return Err(HandshakeError::PeerHasTls);
            }
            (false, _, false) if !MAGIC.starts_with(&first[..count.min(MAGIC.len())]) => {
                return Err(HandshakeError::NotFtvmm(first.to_vec()));
            }
            (false, _, false) => return Ok(false),
            (false, _, true) if !TLS_RECORDS.contains(&first[0]) && first[0] != MAGIC[0] => {
                return Err(HandshakeError::NotFtvmm(first.to_vec()));
            }
            (..) => {}
        }
        self.has_begun = count >= TLS_HANDSHAKE.len() || is_plain;
        Ok(true)
    }
}

/// An alert, as TLS would send it: a plain peer then sees that this is TLS.
fn tell_that_tls_is_spoken(stream: &TcpStream) {
    // fatal, unexpected_message (RFC 8446 section 6)
    let _ = io::Write::write(&mut &*stream, &[0x15, 3, 3, 0, 2, 2, 10]);
}

/// A client is sure when the server's ticket says that its own proof was accepted.
fn is_sure(tls: &Connection) -> bool {
    let is_told = match tls {
        Connection::Client(client) => client.tls13_tickets_received() > 0,
        Connection::Server(_) => true,
    };
    !tls.is_handshaking() && is_told
}

/// Writes what is to be written, or else reads once. Returns whether it has read.
fn step(tls: &mut Connection, mut stream: &TcpStream) -> Result<bool, HandshakeError> {
    if tls.wants_write() {
        tls.write_tls(&mut stream)?;
        return Ok(false);
    }
    if tls.read_tls(&mut stream)? == 0 {
        return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
    }
    tls.process_new_packets().map_err(|error| {
        // The alert that tells the other side why.
        let _ = tls.write_tls(&mut stream);
        reason(error)
    })?;
    Ok(true)
}

fn reason(error: rustls::Error) -> HandshakeError {
    use rustls::Error::{
        AlertReceived, InvalidCertificate, InvalidMessage as Invalid, NoCertificatesPresented,
        PeerIncompatible,
    };
    match error {
        Invalid(InvalidMessage::InvalidContentType) => HandshakeError::PeerIsPlain,
        InvalidCertificate(_) | NoCertificatesPresented | PeerIncompatible(_) => {
            HandshakeError::NotAccepted(error.to_string())
        }
        AlertReceived(alert) if alert != AlertDescription::InternalError => {
            HandshakeError::NotAccepted(error.to_string())
        }
        error => HandshakeError::Tls(error),
    }
}
