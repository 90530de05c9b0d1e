//! The clients of the control socket: so many at most, and none keeps its place by doing nothing.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use ftvmm_host::sync::{Condvar, Mutex, lock, wait, wait_timeout_while};

/// Clients at once, each with a thread.
pub const CLIENTS_MAX: usize = 32;

/// Names a connected client.
pub type ClientId = u64;

/// Whether a client has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// It has.
    As {
        /// Its name.
        id: ClientId,
        /// Another one had to leave.
        for_another: bool,
    },
    /// It has none: each client has a request that is being carried out.
    Full,
}

/// What a client's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It waits for a request.
    Listens,
    /// It does what was asked for. Nobody may end that.
    CarriesOut,
    /// It sends the answer.
    Answers,
    /// It has to leave, for a later client.
    Leaves,
}

struct Client {
    stream: Arc<UnixStream>,
    doing: Doing,
    /// Number of the last change: who has the least has done nothing for longest. A request that
    /// comes a byte at a time is none until it is whole.
    changed: u64,
}

#[derive(Default)]
struct Places {
    clients: BTreeMap<ClientId, Client>,
    /// Changes so far.
    changes: u64,
}

/// All clients.
#[derive(Default)]
pub struct Clients {
    places: Mutex<Places>,
    changed: Condvar,
}

impl Clients {
    /// Gives a new client a place: that of the one that has done nothing for longest, when there is
    /// no other.
    pub fn enter(&self, stream: &Arc<UnixStream>) -> Entered {
        let mut places = lock(&self.places);
        let is_full = places.clients.len() >= CLIENTS_MAX;
        if is_full && !places.send_away_the_idlest() {
            return Entered::Full;
        }
        while places.clients.len() >= CLIENTS_MAX {
            // Whoever has to leave is where a closed socket wakes it, so this is not for long.
            places = wait(&self.changed, places);
        }
        places.changes += 1;
        let id = places.changes;
        let client = Client { stream: stream.clone(), doing: Doing::Listens, changed: id };
        places.clients.insert(id, client);
        Entered::As { id, for_another: is_full }
    }

    /// The client is gone.
    pub fn leave(&self, id: ClientId) {
        lock(&self.places).clients.remove(&id);
        self.changed.notify_all();
    }

    /// A request is whole. False when it must not be carried out, because the client has to leave.
    pub fn carries_out(&self, id: ClientId) -> bool {
        self.change(id, Doing::CarriesOut)
    }

    /// What was asked for is done.
    pub fn answers(&self, id: ClientId) {
        let _ = self.change(id, Doing::Answers);
    }

    /// The answer is out.
    pub fn listens(&self, id: ClientId) {
        let _ = self.change(id, Doing::Listens);
    }

    fn change(&self, id: ClientId, doing: Doing) -> bool {
        let mut places = lock(&self.places);
        places.changes += 1;
        let changed = places.changes;
        let client = places.clients.get_mut(&id).filter(|client| client.doing != Doing::Leaves);
        let stays = client.is_some();
        if let Some(client) = client {
            (client.doing, client.changed) = (doing, changed);
        }
        drop(places);
        self.changed.notify_all();
        stays
    }

    /// Waits until every answer is out, no longer than `longest`.
    pub fn wait_for_answers(&self, longest: Duration) {
        let is_asked = |doing| matches!(doing, Doing::CarriesOut | Doing::Answers);
        let places = lock(&self.places);
        drop(wait_timeout_while(&self.changed, places, longest, |places| {
            places.clients.values().any(|client| is_asked(client.doing))
        }));
    }
}

impl Places {
    /// False when there is none that may be.
    fn send_away_the_idlest(&mut self) -> bool {
        let may_go = |client: &&mut Client| client.doing != Doing::CarriesOut;
        let Some(client) = self.clients.values_mut().filter(may_go).min_by_key(|c| c.changed)
        else {
            return false;
        };
        client.doing = Doing::Leaves;
        let _ = client.stream.shutdown(Shutdown::Both);
        true
    }
}
