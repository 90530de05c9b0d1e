//! HTTP/1.1 as far as a control socket needs it (RFC 9112): requests with a `Content-Length`, one
//! after the other on a connection.
//!
//! httparse takes messages apart. A server crate would bring its own threads or an executor, and a
//! panic in one would end the guest; what is here has bounds for everything a client sends.

use std::io::{self, Read, Write};

use thiserror::Error;

/// Bytes of a request's line and headers.
const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Bytes of a request's body.
const BODY_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 64;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `PUT` and so on.
    pub method: String,
    /// What is asked for.
    pub path: String,
    /// The body; empty without one.
    pub body: Vec<u8>,
    /// The client sends no further request.
    pub is_last: bool,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code (RFC 9110 section 15).
    pub status: u16,
    /// JSON, if there is anything to say.
    pub body: Option<String>,
    /// With status 405: what would be right.
    pub allow: Option<String>,
}

/// Why there is no request.
#[derive(Debug, Error)]
pub enum RequestError {
    /// The client is gone, or took too long; nobody waits for an answer.
    #[error("the client is gone: {0}")]
    Gone(#[from] io::Error),
    /// The client has no further request.
    #[error("the client has no further request")]
    Ended,
    /// What came is not HTTP.
    #[error("this is no HTTP request: {0}")]
    Malformed(#[from] httparse::Error),
    /// A number or header makes no sense.
    #[error("the header {name} must be {wanted}")]
    Header {
        /// Its name.
        name: &'static str,
        /// What would be right.
        wanted: &'static str,
    },
    /// The body has no length.
    #[error("a body needs a Content-Length; chunks are not understood")]
    NoLength,
    /// The head is too long.
    #[error("the request line and headers are longer than {HEAD_BYTES_MAX} bytes")]
    HeadTooLong,
    /// The body is too long.
    #[error("the body is longer than {BODY_BYTES_MAX} bytes")]
    BodyTooLong,
}

impl RequestError {
    /// The status code to answer with, if there is anyone to answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Gone(_) | Self::Ended => None,
            Self::Malformed(_) | Self::Header { .. } => Some(400),
            Self::NoLength => Some(411),
            Self::BodyTooLong => Some(413),
            Self::HeadTooLong => Some(431),
        }
    }
}

/// A connection, and what arrived of it beyond the last request.
pub struct Connection<S> {
    stream: S,
    received: Vec<u8>,
}

/// What a request's head says.
struct Head {
    method: String,
    path: String,
    body_bytes: usize,
    is_last: bool,
    wants_continue: bool,
    head_bytes: usize,
}

impl<S: Read + Write> Connection<S> {
    /// A connection that stands.
    pub fn new(stream: S) -> Self {
        Self { stream, received: Vec::new() }
    }

    /// What it reads from and writes to.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The next request.
    ///
    /// # Errors
    /// When there is none, or none that can be understood; then there will be no other one.
    pub fn receive(&mut self) -> Result<Request, RequestError> {
        let head = loop {
            match Head::parse(&self.received)? {
                Some(head) if head.head_bytes <= HEAD_BYTES_MAX => break head,
                None if self.received.len() < HEAD_BYTES_MAX => self.read_more()?,
                _ => return Err(RequestError::HeadTooLong),
            }
        };
        if head.body_bytes > BODY_BYTES_MAX {
            return Err(RequestError::BodyTooLong);
        }
        let bytes = head.head_bytes + head.body_bytes;
        if head.wants_continue && self.received.len() < bytes {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        while self.received.len() < bytes {
            self.read_more()?;
        }
        let rest = self.received.split_off(bytes);
        let body = std::mem::replace(&mut self.received, rest).split_off(head.head_bytes);
        let Head { method, path, is_last, .. } = head;
        Ok(Request { method, path, body, is_last })
    }

    fn read_more(&mut self) -> Result<(), RequestError> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk)? {
            0 if self.received.is_empty() => Err(RequestError::Ended),
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            bytes => {
                self.received.extend_from_slice(&chunk[..bytes]);
                Ok(())
            }
        }
    }

    /// Sends an answer; `is_last` says that the connection ends with it.
    ///
    /// # Errors
    /// When the client is gone.
    pub fn send(&mut self, answer: &Response, is_last: bool) -> io::Result<()> {
        let Response { status, body, allow } = answer;
        let mut text = format!("HTTP/1.1 {status} {}\r\nServer: ftvmm\r\n", reason(*status));
        if let Some(allow) = allow {
            text += &format!("Allow: {allow}\r\n");
        }
        if is_last {
            text += "Connection: close\r\n";
        }
        match body {
            Some(body) => {
                let bytes = body.len();
                text += &format!(
                    "Content-Type: application/json\r\nContent-Length: {bytes}\r\n\r\n{body}"
                );
            }
            None => text += "\r\n",
        }
        self.stream.write_all(text.as_bytes())
    }
}

impl Head {
    /// The head at the beginning of `bytes`, when it is complete.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, RequestError> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(head_bytes) = parsed.parse(bytes)? else {
            return Ok(None);
        };
        let (Some(method), Some(path)) = (parsed.method, parsed.path) else {
            return Ok(None);
        };
        let mut head = Self {
            method: method.into(),
            path: path.into(),
            body_bytes: 0,
            is_last: parsed.version == Some(0),
            wants_continue: false,
            head_bytes,
        };
        for header in parsed.headers.iter() {
            head.apply_header(header.name, header.value)?;
        }
        Ok(Some(head))
    }

    fn apply_header(&mut self, name: &str, value: &[u8]) -> Result<(), RequestError> {
        let value = String::from_utf8_lossy(value);
        if name.eq_ignore_ascii_case("content-length") {
            let wanted = RequestError::Header { name: "Content-Length", wanted: "a number" };
            self.body_bytes = value.trim().parse().map_err(|_| wanted)?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(RequestError::NoLength);
        } else if name.eq_ignore_ascii_case("connection") {
            self.is_last |= value.to_ascii_lowercase().contains("close");
        } else if name.eq_ignore_ascii_case("expect") {
            self.wants_continue = value.eq_ignore_ascii_case("100-continue");
        }
        Ok(())
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Gives what it holds one piece per read, and keeps what is written.
    struct Pieces(VecDeque<Vec<u8>>, Vec<u8>);

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some(piece) = self.0.pop_front() else { return Ok(0) };
            buffer[..piece.len()].copy_from_slice(&piece);
            Ok(piece.len())
        }
    }

    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn connection(text: &str, piece_bytes: usize) -> Connection<Pieces> {
        let pieces = text.as_bytes().chunks(piece_bytes).map(<[u8]>::to_vec).collect();
        Connection::new(Pieces(pieces, Vec::new()))
    }

    #[test]
    fn requests_come_one_after_the_other_in_whatever_pieces() {
        let text = "PUT /attach HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n12345\
                    GET /status HTTP/1.1\r\nConnection: Close\r\n\r\n";
        for piece_bytes in [1, 4096] {
            let mut connection = connection(text, piece_bytes);
            let first = connection.receive().unwrap();
            assert_eq!((first.path.as_str(), first.body.as_slice()), ("/attach", &b"12345"[..]));
            assert!(!first.is_last);
            let second = connection.receive().unwrap();
            assert_eq!((second.method.as_str(), second.is_last), ("GET", true));
            assert!(second.body.is_empty());
            assert!(matches!(connection.receive(), Err(RequestError::Ended)));
            let continued = !connection.stream.1.is_empty();
            assert_eq!(continued, piece_bytes < 4096, "only a body that is not there is asked for");
        }
    }

    #[test]
    fn what_is_no_request_gets_its_status() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(HEAD_BYTES_MAX));
        for (text, status) in [
            ("\x01\x02\r\n\r\n", Some(400)),
            ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", Some(400)),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", Some(411)),
            ("PUT / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", Some(413)),
            (&long, Some(431)),
            ("PUT / HTTP/1.1\r\nContent-Length: 5\r\n\r\n12", None),
            ("GET / HT", None),
        ] {
            let error = connection(text, 1000).receive().unwrap_err();
            assert_eq!(error.status(), status, "{text}: {error}");
        }
    }
}
