//! The threads behind the socket: one that accepts, one for each client.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ftvmm_host::contain::Thread;
use ftvmm_host::sync::{Condvar, Mutex, lock, wait_timeout_while};
use thiserror::Error;

use super::Operator;
use super::http::Connection;
use super::routes::{answer, fault};
use super::socket::{Socket, SocketError};

/// More clients at once are told to come again.
const CLIENTS_MAX: usize = 32;
/// A client that is quiet for so long is left.
const QUIET_LONGEST: Duration = Duration::from_secs(60);
/// How long the end waits for requests that are being answered: the one that asked for the end is
/// among them.
const FAREWELL_LONGEST: Duration = Duration::from_secs(2);

/// Why the control socket cannot be served.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The socket cannot be had.
    #[error("control socket '{path}': {cause}", path = path.display())]
    Socket {
        /// Its file.
        path: PathBuf,
        /// The cause.
        cause: SocketError,
    },
    /// No thread can be had.
    #[error("the host refuses a thread for the control socket: {0}")]
    Thread(std::io::Error),
}

struct Shared {
    socket: Socket,
    run: Arc<dyn Operator>,
    ended: AtomicBool,
    clients: Mutex<Clients>,
    idle: Condvar,
}

#[derive(Default)]
struct Clients {
    connected: usize,
    /// Requests whose answer is not out yet.
    asking: usize,
}

/// Serves the control socket until it is dropped.
pub struct ControlServer(Arc<Shared>);

impl ControlServer {
    /// Listens at `path` and answers for `run`.
    ///
    /// # Errors
    /// When the socket cannot be had, above all because a live ftvmm serves it.
    pub fn start(path: &Path, run: Arc<dyn Operator>) -> Result<Self, ControlError> {
        let unusable = |cause| ControlError::Socket { path: path.into(), cause };
        let socket = Socket::listen(path).map_err(unusable)?;
        let shared = Arc::new(Shared {
            socket,
            run,
            ended: AtomicBool::new(false),
            clients: Mutex::default(),
            idle: Condvar::new(),
        });
        let server = Self(shared.clone());
        Thread::Control.start(move || accept(&shared)).map_err(ControlError::Thread)?;
        Ok(server)
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
        self.0.socket.close();
        let clients = lock(&self.0.clients);
        drop(wait_timeout_while(&self.0.idle, clients, FAREWELL_LONGEST, |c| c.asking > 0));
    }
}

fn accept(shared: &Arc<Shared>) {
    while !shared.ended.load(Ordering::Acquire) {
        match shared.socket.accept() {
            Ok(stream) => spawn_client(shared, stream),
            Err(_) if shared.ended.load(Ordering::Acquire) => return,
            Err(error) => {
                tracing::warn!(%error, "a control connection was not accepted");
                // Out of descriptors, most likely: trying at once would only burn the guest's time.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn spawn_client(shared: &Arc<Shared>, stream: UnixStream) {
    if let Err(error) = stream.set_read_timeout(Some(QUIET_LONGEST)) {
        tracing::warn!(%error, "a control connection cannot be served");
        return;
    }
    if !shared.enter() {
        let full = fault(503, "too many connections to the control socket; close some");
        let _ = Connection::new(stream).send(&full, true);
        return;
    }
    let theirs = shared.clone();
    let serve = move || {
        serve_client(&theirs, stream);
        theirs.count(|clients| clients.connected -= 1);
    };
    if let Err(error) = Thread::ControlClient.start(serve) {
        tracing::warn!(%error, "no thread for a control connection");
        shared.count(|clients| clients.connected -= 1);
    }
}

/// Answers one client until it has no further request.
fn serve_client(shared: &Shared, stream: UnixStream) {
    let mut connection = Connection::new(stream);
    loop {
        let request = match connection.receive() {
            Ok(request) => request,
            Err(error) => {
                if let Some(status) = error.status() {
                    let _ = connection.send(&fault(status, &error.to_string()), true);
                }
                return;
            }
        };
        shared.count(|clients| clients.asking += 1);
        let is_last = request.is_last || shared.ended.load(Ordering::Acquire);
        let sent = connection.send(&answer(shared.run.as_ref(), &request), is_last);
        shared.count(|clients| clients.asking -= 1);
        if sent.is_err() || is_last {
            return;
        }
    }
}

impl Shared {
    fn enter(&self) -> bool {
        let mut has_room = false;
        self.count(|clients| {
            has_room = clients.connected < CLIENTS_MAX;
            clients.connected += usize::from(has_room);
        });
        has_room
    }

    fn count(&self, change: impl FnOnce(&mut Clients)) {
        change(&mut lock(&self.clients));
        self.idle.notify_all();
    }
}
