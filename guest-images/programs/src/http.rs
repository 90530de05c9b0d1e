//! What to answer: the part of the HTTP server that does no I/O (RFC 9110, RFC 9112).
//!
//! GET and HEAD of files and of `/bytes/N[/SEED]`, one byte range (RFC 9110 §14). A request with
//! several ranges gets the whole, which §14.2 allows. A request that could carry a body ends its
//! connection, so that the body is never taken for the next request.

use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use crate::stream::DEFAULT_SEED;

/// A request head longer than this is refused.
pub const HEAD_BYTES_MAX: usize = 8 << 10;

const HEADERS_MAX: usize = 64;

/// The part of a request that decides the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// As written: methods are case-sensitive.
    pub method: String,
    /// The path without its query.
    pub path: String,
    /// The value of `Range`.
    pub range: Option<String>,
    /// Whether the connection lives on after the answer.
    pub keep_alive: bool,
}

/// What the bytes received so far are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// The start of a request.
    Partial,
    /// A whole request, and its length in bytes.
    Complete(Request, usize),
    /// No request that this server understands.
    Malformed,
}

/// Looks for a request at the start of `bytes`.
pub fn parse_head(bytes: &[u8]) -> Head {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let length = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_BYTES_MAX => return Head::Partial,
        Ok(httparse::Status::Partial) | Err(_) => return Head::Malformed,
    };
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Head::Malformed;
    };
    let header = |name: &str| {
        let found = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| String::from_utf8_lossy(header.value).trim().to_owned())
    };
    let connection = header("connection").unwrap_or_default().to_ascii_lowercase();
    let asked = |word: &str| connection.split(',').any(|part| part.trim() == word);
    let wants_more = if version == 0 { asked("keep-alive") } else { !asked("close") };
    let has_body = header("content-length").is_some_and(|length| length != "0")
        || header("transfer-encoding").is_some();
    let request = Request {
        method: method.to_owned(),
        path: target.split('?').next().unwrap_or_default().to_owned(),
        range: header("range"),
        keep_alive: wants_more && !has_body,
    };
    Head::Complete(request, length)
}

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// The first `length_bytes` of the stream with this seed.
    Stream {
        /// See [`crate::stream`].
        seed: u64,
        /// The length asked for.
        length_bytes: u64,
    },
    /// A file, relative to the root; never outside of it.
    File(PathBuf),
}

/// Finds out what `path` names; `None` is for what can not exist.
pub fn resource(path: &str) -> Option<Resource> {
    if let Some(numbers) = path.strip_prefix("/bytes/") {
        let (length, seed) = numbers.split_once('/').unwrap_or((numbers, ""));
        let seed = if seed.is_empty() { DEFAULT_SEED } else { seed.parse().ok()? };
        return Some(Resource::Stream { seed, length_bytes: length.parse().ok()? });
    }
    let relative = Path::new(path.strip_prefix('/')?);
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    let named = if path == "/" { Path::new("index.html") } else { relative };
    plain.then(|| Resource::File(named.to_owned()))
}

/// The bytes to send of a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All of them.
    Whole,
    /// This range of offsets.
    Part(Range<u64>),
    /// The range asked for begins behind the end.
    Unsatisfiable,
}

/// Applies the value of a `Range` header to a resource of `length_bytes` (RFC 9110 §14.1.2). What
/// is not a single valid byte range is ignored (§14.2).
pub fn select(range: Option<&str>, length_bytes: u64) -> Selection {
    let Some((first, last)) = range.and_then(byte_range) else {
        return Selection::Whole;
    };
    let part = match (first, last) {
        (Some(first), Some(last)) if first > last => return Selection::Whole,
        (Some(first), last) => first..last.map_or(length_bytes, |l| l.saturating_add(1)),
        (None, Some(suffix)) => length_bytes.saturating_sub(suffix)..length_bytes,
        (None, None) => return Selection::Whole,
    };
    let part = part.start..part.end.min(length_bytes);
    if part.is_empty() { Selection::Unsatisfiable } else { Selection::Part(part) }
}

fn byte_range(range: &str) -> Option<(Option<u64>, Option<u64>)> {
    let (first, last) = range.strip_prefix("bytes=")?.trim().split_once('-')?;
    let number = |text: &str| match text {
        "" => Some(None),
        digits if digits.bytes().all(|b| b.is_ascii_digit()) => Some(Some(digits.parse().ok()?)),
        _ => None,
    };
    Some((number(first)?, number(last)?))
}

/// The head of the answer that sends `selection` of a resource of `length_bytes`.
pub fn answer_head(selection: &Selection, length_bytes: u64, keep_alive: bool) -> String {
    let (status, extra) = match selection {
        Selection::Whole => ("200 OK", String::new()),
        Selection::Part(part) => {
            let last = part.end - 1;
            let range = format!("Content-Range: bytes {}-{last}/{length_bytes}\r\n", part.start);
            ("206 Partial Content", range)
        }
        Selection::Unsatisfiable => {
            ("416 Range Not Satisfiable", format!("Content-Range: bytes */{length_bytes}\r\n"))
        }
    };
    let body = body_range(selection, length_bytes);
    head(status, body.end - body.start, &format!("Accept-Ranges: bytes\r\n{extra}"), keep_alive)
}

/// The offsets of the resource that the body consists of.
pub fn body_range(selection: &Selection, length_bytes: u64) -> Range<u64> {
    match selection {
        Selection::Whole => 0..length_bytes,
        Selection::Part(part) => part.clone(),
        Selection::Unsatisfiable => 0..0,
    }
}

/// The head of an answer without a body.
pub fn error_head(status: &str, keep_alive: bool) -> String {
    head(status, 0, "", keep_alive)
}

fn head(status: &str, length_bytes: u64, extra: &str, keep_alive: bool) -> String {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    format!(
        "HTTP/1.1 {status}\r\nServer: ftguest\r\nConnection: {connection}\r\n\
         Content-Type: application/octet-stream\r\nContent-Length: {length_bytes}\r\n{extra}\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(text: &str) -> Request {
        match parse_head(text.as_bytes()) {
            Head::Complete(request, length) => {
                assert_eq!(length, text.len());
                request
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_shape_of_range_selects_what_the_rfc_says() {
        const CASES: &[(Option<&str>, Selection)] = &[
            (None, Selection::Whole),
            (Some("bytes=0-0"), Selection::Part(0..1)),
            (Some("bytes=2-4"), Selection::Part(2..5)),
            (Some("bytes=8-"), Selection::Part(8..10)),
            (Some("bytes=8-99"), Selection::Part(8..10)),
            (Some("bytes=8-18446744073709551615"), Selection::Part(8..10)),
            (Some("bytes=-3"), Selection::Part(7..10)),
            (Some("bytes=-99"), Selection::Part(0..10)),
            (Some("bytes=10-"), Selection::Unsatisfiable),
            (Some("bytes=10-12"), Selection::Unsatisfiable),
            (Some("bytes=-0"), Selection::Unsatisfiable),
            (Some("bytes=4-2"), Selection::Whole),
            (Some("bytes=-"), Selection::Whole),
            (Some("bytes=+1-2"), Selection::Whole),
            (Some("bytes=0-1,4-5"), Selection::Whole),
            (Some("lines=0-1"), Selection::Whole),
        ];
        for (range, wanted) in CASES {
            assert_eq!(&select(*range, 10), wanted, "{range:?}");
        }
        assert_eq!(select(Some("bytes=0-"), 0), Selection::Unsatisfiable);
    }

    #[test]
    fn the_head_states_the_length_of_the_body_that_follows() {
        let part = answer_head(&Selection::Part(2..5), 10, true);
        assert!(part.starts_with("HTTP/1.1 206 "), "{part}");
        assert!(part.contains("\r\nContent-Length: 3\r\n"), "{part}");
        assert!(part.contains("\r\nContent-Range: bytes 2-4/10\r\n"), "{part}");
        assert!(part.ends_with("\r\n\r\n"), "{part}");
        let none = answer_head(&Selection::Unsatisfiable, 10, false);
        assert!(none.contains("\r\nContent-Range: bytes */10\r\n"), "{none}");
        assert!(none.contains("\r\nContent-Length: 0\r\n"), "{none}");
    }

    #[test]
    fn a_connection_is_kept_by_the_rules_of_its_version() {
        const CASES: &[(&str, bool)] = &[
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", false),
        ];
        for (text, kept) in CASES {
            assert_eq!(complete(text).keep_alive, *kept, "{text:?}");
        }
    }

    #[test]
    fn a_request_is_complete_only_with_its_empty_line() {
        let text = "GET /bytes/9?x=1 HTTP/1.1\r\nHost: a\r\nrange:  bytes=1-2 \r\n\r\n";
        for length in 0..text.len() {
            assert_eq!(parse_head(&text.as_bytes()[..length]), Head::Partial, "{length}");
        }
        let request = complete(text);
        assert_eq!(request.path, "/bytes/9");
        assert_eq!(request.range.as_deref(), Some("bytes=1-2"));
        assert_eq!(parse_head(b"\x16\x03\x01"), Head::Malformed);
        assert_eq!(parse_head(&[b'A'; HEAD_BYTES_MAX]), Head::Malformed);
    }

    #[test]
    fn a_path_names_a_stream_or_a_file_below_the_root() {
        let file = |path: &str| Some(Resource::File(path.into()));
        let stream = |seed, length_bytes| Some(Resource::Stream { seed, length_bytes });
        assert_eq!(resource("/"), file("index.html"));
        assert_eq!(resource("/a/b.txt"), file("a/b.txt"));
        assert_eq!(resource("/bytes/10"), stream(DEFAULT_SEED, 10));
        assert_eq!(resource("/bytes/10/3"), stream(3, 10));
        for path in ["/../etc/passwd", "/a/../../b", "//etc/passwd", "/bytes/x", "/bytes/1/x", "a"]
        {
            assert_eq!(resource(path), None, "{path}");
        }
    }
}
