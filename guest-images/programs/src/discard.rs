//! TCP discard (RFC 863).

use std::io;
use std::net::TcpListener;

use crate::AppletError;
use crate::options::Options;
use crate::serve::{bind_any, detach_if, serve_clients};

const DEFAULT_PORT: u16 = 9;

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let port = options.named("--port", DEFAULT_PORT, "a port")?;
    let listener = bind_any(port, TcpListener::bind).map_err(AppletError::io("bind"))?;
    detach_if(options.flag("--detach"))?;
    serve_clients(&listener, |mut client| io::copy(&mut client, &mut io::sink()).map(drop))
}
