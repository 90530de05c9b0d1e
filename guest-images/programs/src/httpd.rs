//! The HTTP server's I/O: what [`crate::http`] decides is sent in large writes, so that a network
//! card with segmentation offload gets large segments.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::AppletError;
use crate::http::{
    HEAD_BYTES_MAX, Head, Request, Resource, Selection, answer_head, body_range, error_head,
    parse_head, resource, select,
};
use crate::options::Options;
use crate::serve::{bind_any, detach_if, serve_clients};
use crate::stream;

const DEFAULT_PORT: u16 = 80;
const DEFAULT_ROOT: &str = "/srv";
const WRITE_BYTES: usize = 128 << 10;

enum Source {
    Stream { seed: u64, offset_bytes: u64 },
    File(File),
}

impl Source {
    fn open(resource: &Resource, root: &Path) -> io::Result<(Self, u64)> {
        match resource {
            Resource::Stream { seed, length_bytes } => {
                Ok((Self::Stream { seed: *seed, offset_bytes: 0 }, *length_bytes))
            }
            Resource::File(name) => {
                let file = File::open(root.join(name))?;
                let about = file.metadata()?;
                if !about.is_file() {
                    return Err(io::ErrorKind::NotFound.into());
                }
                Ok((Self::File(file), about.len()))
            }
        }
    }

    fn seek(&mut self, to_bytes: u64) -> io::Result<()> {
        match self {
            Self::Stream { offset_bytes, .. } => *offset_bytes = to_bytes,
            Self::File(file) => drop(file.seek(SeekFrom::Start(to_bytes))?),
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Stream { seed, offset_bytes } => {
                stream::fill(*seed, *offset_bytes, buffer);
                *offset_bytes += buffer.len() as u64;
                Ok(())
            }
            Self::File(file) => file.read_exact(buffer),
        }
    }
}

/// Sends the head and the bytes of `body`, the head together with the first of them.
fn send(
    client: &mut impl Write,
    head: String,
    source: &mut Source,
    body: Range<u64>,
) -> io::Result<()> {
    source.seek(body.start)?;
    let mut left = body.end - body.start;
    let mut buffer = head.into_bytes();
    loop {
        let held = buffer.len();
        let count = left.min((WRITE_BYTES - held) as u64) as usize;
        buffer.resize(held + count, 0);
        source.fill(&mut buffer[held..])?;
        client.write_all(&buffer)?;
        left -= count as u64;
        if left == 0 {
            return Ok(());
        }
        buffer.clear();
    }
}

fn answer(client: &mut impl Write, request: &Request, root: &Path) -> io::Result<()> {
    let keep_alive = request.keep_alive;
    if !matches!(request.method.as_str(), "GET" | "HEAD") {
        return client.write_all(error_head("405 Method Not Allowed", keep_alive).as_bytes());
    }
    let found = resource(&request.path).map(|resource| Source::open(&resource, root));
    let Some(Ok((mut source, length_bytes))) = found else {
        return client.write_all(error_head("404 Not Found", keep_alive).as_bytes());
    };
    // Only GET has ranges (RFC 9110 §14.2).
    let is_head = request.method == "HEAD";
    let selection =
        if is_head { Selection::Whole } else { select(request.range.as_deref(), length_bytes) };
    let head = answer_head(&selection, length_bytes, keep_alive);
    let body = if is_head { 0..0 } else { body_range(&selection, length_bytes) };
    send(client, head, &mut source, body)
}

fn serve_client(mut client: TcpStream, root: &Path) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut received = Vec::with_capacity(HEAD_BYTES_MAX);
    loop {
        match parse_head(&received) {
            Head::Partial => {
                let held = received.len();
                received.resize(HEAD_BYTES_MAX, 0);
                let count = client.read(&mut received[held..])?;
                received.truncate(held + count);
                if count == 0 {
                    return Ok(());
                }
            }
            Head::Complete(request, length) => {
                received.drain(..length);
                answer(&mut client, &request, root)?;
                if !request.keep_alive {
                    return Ok(());
                }
            }
            Head::Malformed => {
                return client.write_all(error_head("400 Bad Request", false).as_bytes());
            }
        }
    }
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let port = options.named("--port", DEFAULT_PORT, "a port")?;
    let root = options.named("--root", PathBuf::from(DEFAULT_ROOT), "a directory")?;
    let listener = bind_any(port, TcpListener::bind).map_err(AppletError::io("bind"))?;
    detach_if(options.flag("--detach"))?;
    serve_clients(&listener, move |client| serve_client(client, &root))
}
