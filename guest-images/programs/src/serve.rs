//! A thread for each TCP client, a bounded number of them. One too many waits in the listen queue.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::AppletError;

/// Clients served at the same time; with 128 KiB of buffer each, this bounds the memory of a small
/// guest.
pub const CLIENTS_MAX: usize = 128;

/// Far longer than any failover may take.
const CLIENT_PATIENCE: Duration = Duration::from_secs(120);
const STACK_BYTES: usize = 128 << 10;

#[derive(Default)]
struct Slots {
    taken: Mutex<usize>,
    freed: Condvar,
}

struct Slot(Arc<Slots>);

impl Slots {
    fn take(self: &Arc<Self>) -> Slot {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self
            .freed
            .wait_while(taken, |taken| *taken >= CLIENTS_MAX)
            .unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        Slot(self.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

/// All of this machine's addresses, of both versions of IP where the kernel has both.
///
/// # Errors
/// What `bind` said for IPv4.
pub fn bind_any<T>(port: u16, bind: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    let [both, older] = [IpAddr::from(Ipv6Addr::UNSPECIFIED), Ipv4Addr::UNSPECIFIED.into()];
    bind((both, port).into()).or_else(|_| bind((older, port).into()))
}

/// Serves every client of `listener` with `serve`, for ever. A client's error ends that client
/// only.
///
/// # Errors
/// The listener broke or no thread can be had.
pub fn serve_clients(
    listener: &TcpListener,
    serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
) -> Result<(), AppletError> {
    let slots = Arc::new(Slots::default());
    loop {
        let slot = slots.take();
        let client = match listener.accept() {
            Ok((client, _)) => client,
            // The client gave up while it was queued.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(source) => return Err(AppletError::io("accept")(source)),
        };
        let serve = serve.clone();
        let client_thread = move || {
            let _slot = slot;
            // Clients go away in the middle of things; there is nobody to tell.
            let _ = with_patience(&client).and_then(|()| serve(client));
        };
        #[allow(clippy::disallowed_methods, reason = "a thread in the guest, with a small stack")]
        thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(client_thread)
            .map_err(AppletError::io("thread"))?;
    }
}

/// Clients of a test vanish without a word; their places must become free again.
fn with_patience(client: &TcpStream) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))
}

/// With `detach`, goes on in the background: the caller's shell sees the end once the sockets are
/// bound.
///
/// # Errors
/// No second process can be had.
pub fn detach_if(detach: bool) -> Result<(), AppletError> {
    if detach {
        nix::unistd::daemon(true, true).map_err(|e| AppletError::io("daemon")(e.into()))?;
    }
    Ok(())
}
