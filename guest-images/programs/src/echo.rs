//! TCP and UDP echo (RFC 862).

use std::io;
use std::net::{TcpListener, UdpSocket};
use std::thread;

use crate::AppletError;
use crate::options::Options;
use crate::serve::{bind_any, detach_if, serve_clients};

const DEFAULT_PORT: u16 = 7;
const DATAGRAM_BYTES_MAX: usize = 65_535;

/// Echoes datagrams for ever.
///
/// # Errors
/// The socket broke. A datagram that cannot be sent back is dropped, as a network would.
pub fn echo_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((count, from)) => drop(socket.send_to(&buffer[..count], from)),
            // An ICMP error for an earlier answer is reported on the next call.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
    }
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let port = options.named("--port", DEFAULT_PORT, "a port")?;
    let listener = bind_any(port, TcpListener::bind).map_err(AppletError::io("bind"))?;
    let socket = bind_any(port, UdpSocket::bind).map_err(AppletError::io("bind"))?;
    detach_if(options.flag("--detach"))?;
    thread::spawn(move || echo_datagrams(&socket));
    serve_clients(&listener, |client| {
        client.set_nodelay(true)?;
        io::copy(&mut &client, &mut &client).map(drop)
    })
}
