//! The other end: one request to a running ftvmm.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

/// Why there is no reply.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error("no ftvmm answers at '{path}': {cause}; is it running with \
             --control?", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The connection failed.
    #[error("the ftvmm at '{path}' was lost before it replied: {cause}", path = path.display())]
    Lost {
        /// The socket.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The reply is no reply.
    #[error("'{path}' is not an ftvmm control socket", path = path.display())]
    NoFtvmm {
        /// The socket.
        path: PathBuf,
    },
}

/// A reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// Status code (RFC 9110 section 15).
    pub status: u16,
    /// What it says, if anything.
    pub body: Option<Value>,
}

/// Asks the ftvmm at `socket` and waits for its reply, however long what is asked for takes.
///
/// # Errors
/// When there is no reply.
pub fn request(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Reply, ClientError> {
    let unreached = |cause| ClientError::Connect { path: socket.into(), cause };
    let lost = |cause| ClientError::Lost { path: socket.into(), cause };
    let mut stream = UnixStream::connect(socket).map_err(unreached)?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let bytes = body.len();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {bytes}\r\n\r\n{body}"
    );
    let sent = stream.write_all(text.as_bytes()).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut received = Vec::new();
    let heard = stream.read_to_end(&mut received);
    // A server that has no place says so without reading what it was sent, which breaks the
    // connection after its reply.
    match (parse(&received), sent.and(heard)) {
        (Some(reply), _) => Ok(reply),
        (None, Err(error)) => Err(lost(error)),
        (None, Ok(_)) if received.is_empty() => Err(lost(io::ErrorKind::UnexpectedEof.into())),
        (None, Ok(_)) => Err(ClientError::NoFtvmm { path: socket.into() }),
    }
}

/// A whole reply: the connection ended after it.
fn parse(bytes: &[u8]) -> Option<Reply> {
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut parsed = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(head_bytes)) = parsed.parse(bytes) else {
        return None;
    };
    let rest = &bytes[head_bytes..];
    let body = match rest.is_empty() {
        true => None,
        false => Some(serde_json::from_slice(rest).ok()?),
    };
    Some(Reply { status: parsed.code?, body })
}
