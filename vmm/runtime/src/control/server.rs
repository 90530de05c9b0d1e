//! The threads behind the socket: one that accepts, one for each client.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ftvmm_host::Seldom;
use ftvmm_host::clock::{HostClock, sleep_ms};
use ftvmm_host::contain::Thread;
use ftvmm_host::sync::{Mutex, lock};
use thiserror::Error;

use super::Operator;
use super::clients::{ClientId, Clients, Entered};
use super::http::Connection;
use super::patience::Patience;
use super::routes::{answer, fault};
use super::socket::{Socket, SocketError};

/// How long the end waits for requests that are being answered: the one that asked for the end is
/// among them.
const FAREWELL_LONGEST: Duration = Duration::from_secs(2);
/// Pause after the host had no descriptor for a client, in milliseconds: trying at once would only
/// burn the guest's time.
const ACCEPT_PAUSE_MS: u64 = 100;

/// How long a client may take.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Until a request is there in whole, after the last answer.
    pub request: Duration,
    /// Until an answer has been read, as far as the socket does not hold it.
    pub answer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { request: Duration::from_secs(60), answer: Duration::from_secs(10) }
    }
}

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
    limits: Limits,
    ended: AtomicBool,
    clients: Clients,
    clock: HostClock,
    lines: Mutex<Seldom>,
}

/// Serves the control socket until it is dropped.
pub struct ControlServer(Arc<Shared>);

impl ControlServer {
    /// Listens at `path` and answers for `run`.
    ///
    /// # Errors
    /// When the socket cannot be had, above all because a live ftvmm serves it.
    pub fn start(path: &Path, run: Arc<dyn Operator>) -> Result<Self, ControlError> {
        Self::start_with(path, run, Limits::default())
    }

    /// As [`Self::start`], with limits that a test can wait for.
    ///
    /// # Errors
    /// As there.
    pub(super) fn start_with(
        path: &Path,
        run: Arc<dyn Operator>,
        limits: Limits,
    ) -> Result<Self, ControlError> {
        let unusable = |cause| ControlError::Socket { path: path.into(), cause };
        let socket = Socket::listen(path).map_err(unusable)?;
        let shared = Arc::new(Shared {
            socket,
            run,
            limits,
            ended: AtomicBool::new(false),
            clients: Clients::default(),
            clock: HostClock::host_start(),
            lines: Mutex::new(Seldom::new(1, 1)),
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
        self.0.clients.wait_for_answers(FAREWELL_LONGEST);
    }
}

fn accept(shared: &Arc<Shared>) {
    while !shared.ended.load(Ordering::Acquire) {
        match shared.socket.accept() {
            Ok(stream) => admit(shared, stream),
            Err(_) if shared.ended.load(Ordering::Acquire) => return,
            Err(error) => {
                shared.warn(&format!("a control connection was not accepted: {error}"));
                sleep_ms(ACCEPT_PAUSE_MS);
            }
        }
    }
}

/// Gives a client a thread, if there is a place for it.
fn admit(shared: &Arc<Shared>, stream: UnixStream) {
    let stream = Arc::new(stream);
    let id = match shared.clients.enter(&stream) {
        Entered::As { id, for_another } => {
            if for_another {
                shared.warn("too many control connections: the one idle for longest was closed");
            }
            id
        }
        Entered::Full => {
            let full = fault(503, "too many requests to the control socket are being carried out");
            let mut connection = Connection::new(Patience::new(stream, shared.limits.answer));
            let _ = connection.send(&full, true);
            return;
        }
    };
    let theirs = shared.clone();
    let serve = move || {
        serve_client(&theirs, id, stream);
        theirs.clients.leave(id);
    };
    if let Err(error) = Thread::ControlClient.start(serve) {
        shared.warn(&format!("no thread for a control connection: {error}"));
        shared.clients.leave(id);
    }
}

/// Answers one client until it has no further request.
fn serve_client(shared: &Shared, id: ClientId, stream: Arc<UnixStream>) {
    let Limits { request: request_longest, answer: answer_longest } = shared.limits;
    let mut connection = Connection::new(Patience::new(stream, request_longest));
    loop {
        let request = match connection.receive() {
            Ok(request) => request,
            Err(error) => {
                if let Some(status) = error.status() {
                    connection.stream().renew(answer_longest);
                    let _ = connection.send(&fault(status, &error.to_string()), true);
                }
                return;
            }
        };
        if !shared.clients.carries_out(id) {
            return;
        }
        let answer = answer(shared.run.as_ref(), &request);
        shared.clients.answers(id);
        let is_last = request.is_last || shared.ended.load(Ordering::Acquire);
        connection.stream().renew(answer_longest);
        if let Err(error) = connection.send(&answer, is_last) {
            if error.kind() == ErrorKind::TimedOut {
                shared.warn("a control client did not read its answer in time and was left");
            }
            return;
        }
        if is_last {
            return;
        }
        shared.clients.listens(id);
        connection.stream().renew(request_longest);
    }
}

impl Shared {
    /// Clients can cause lines as often as they like.
    fn warn(&self, what: &str) {
        if let Some(others) = lock(&self.lines).may_say(self.clock.host_now_ns()) {
            tracing::warn!(others, "{what}");
        }
    }
}
