//! The connection between the hosts: late, cut anywhere, and sometimes gone.

use ftvmm_replication::DisconnectReason;

use crate::coverage::Mark;
use crate::host::{Host, Parcel};
use crate::world::{BACKUP, Due, MS, OnHost, PRIMARY, US, World};

use ftvmm_replication::Role;

impl World {
    pub fn connect(&mut self) {
        let retry_ns = self.random.between(5 * MS, 20 * MS);
        self.after(retry_ns, Due::Connect);
        self.try_connect();
    }

    pub fn try_connect(&mut self) {
        let idle = |host: &Host| {
            let session = host.core.session();
            let runs_here = host.thread.begun && session.role() == Role::Primary;
            let has_time = !runs_here || session.accepts_backup();
            let is_free = !host.core.is_connected() && has_time;
            let wants = host.core.wants_connection();
            host.wire.connection == 0 && !host.is_gone() && (is_free || wants)
        };
        let paused = self.hosts.iter().any(|host| self.now_ns < host.held.paused_until_ns);
        if paused || !self.hosts.iter().all(idle) {
            return;
        }
        self.connections += 1;
        self.cut = false;
        let lives = [self.hosts[BACKUP].life, self.hosts[PRIMARY].life];
        for (host, peer_life) in self.hosts.iter_mut().zip(lives) {
            (host.wire.connection, host.wire.peer_life) = (self.connections, peer_life);
            host.wire.pipe.clear();
            host.wire.socket.clear();
        }
        self.trace("connect");
        if self.hosts.iter().all(|host| host.core.wants_connection()) {
            self.coverage.mark(Mark::ConnectedAgain);
        }
        self.core(PRIMARY, |core, now_ns| core.connect(now_ns));
        self.core(BACKUP, |core, now_ns| core.connect(now_ns));
    }

    /// Sends bytes in pieces.
    pub fn send_cut(&mut self, from: usize, mut bytes: Vec<u8>) {
        while bytes.len() > 1 && self.random.one_in(2) {
            let rest = bytes.split_off(self.random.number() as usize % bytes.len());
            self.post(from, Parcel::Bytes(std::mem::replace(&mut bytes, rest)));
        }
        self.post(from, Parcel::Bytes(bytes));
    }

    pub fn post(&mut self, from: usize, parcel: Parcel) {
        let (to, connection) = (1 - from, self.hosts[from].wire.connection);
        // A connection is only dead for one side until the other hears of it.
        if self.cut || connection == 0 || connection != self.hosts[to].wire.connection {
            return;
        }
        self.hosts[to].wire.pipe.push_back(parcel);
        let delay_ns = match self.random.one_in(20) {
            true => self.random.between(2 * MS, 20 * MS),
            false => self.random.between(20 * US, 2 * MS),
        };
        self.after(delay_ns, Due::Arrive { host: to, connection });
    }

    pub fn arrive(&mut self, host: usize, connection: u64) {
        if self.hosts[host].wire.connection != connection || self.cut {
            return;
        }
        if let Some(parcel) = self.hosts[host].wire.pipe.pop_front() {
            self.take_in(host, parcel);
        }
    }

    /// The connection breaks for this host.
    pub fn disconnect(&mut self, host: usize) {
        if self.hosts[host].wire.connection > 0 {
            self.take_in(host, Parcel::Broken);
        }
    }

    /// The host's kernel has it. A host that stands still reads it afterwards.
    fn take_in(&mut self, host: usize, parcel: Parcel) {
        let own = &mut self.hosts[host];
        if own.crashed {
            return;
        }
        own.wire.socket.push_back(parcel);
        let waits_ns = own.held.paused_until_ns.saturating_sub(self.now_ns);
        match waits_ns {
            0 => self.read(host),
            _ if own.wire.socket.len() == 1 => self.after_on(waits_ns, host, OnHost::Read),
            _ => {}
        }
    }

    /// The host reads all there is, and then does what follows from it.
    pub fn read(&mut self, host: usize) {
        if self.hosts[host].wire.socket.len() > 1 {
            self.coverage.mark(Mark::ReadLate);
        }
        while let Some(parcel) = self.hosts[host].wire.socket.pop_front() {
            let (core, now_ns) = (&mut self.hosts[host].core, self.now_ns);
            match parcel {
                Parcel::Bytes(bytes) => core.receive(now_ns, &bytes),
                Parcel::Closed => core.disconnect(now_ns, DisconnectReason::Closed),
                Parcel::Broken => {
                    let description = "connection reset".into();
                    core.disconnect(now_ns, DisconnectReason::Transport { description });
                }
            }
        }
        self.pump(host);
    }

    pub fn close(&mut self, host: usize) {
        self.hang_up(host, Parcel::Closed);
    }

    /// This host ends a connection that broke, and looks for another one if the network is well.
    pub fn break_off(&mut self, host: usize) {
        self.hang_up(host, Parcel::Broken);
        if self.random.one_in(2) {
            let delay_ns = self.random.between(200 * US, 3 * MS);
            self.after(delay_ns, Due::ConnectAgain);
        }
    }

    fn hang_up(&mut self, host: usize, last: Parcel) {
        self.post(host, last);
        self.hosts[host].wire.connection = 0;
        self.hosts[host].wire.socket.clear();
    }
}
