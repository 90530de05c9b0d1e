//! The faults are over: whoever has the guest goes on, and gets a backup.

use crate::world::{Bounds, Step, World};

/// More steps than any world needs to come to rest.
const STEPS_MAX: usize = 2000;

impl World {
    /// Does what happens by itself until nothing does but time passing.
    pub fn settle(&mut self) {
        for _ in 0..STEPS_MAX {
            let Some(step) = self.usual_steps().into_iter().next() else { return };
            self.take(step);
        }
        panic!("the world does not come to rest");
    }

    /// Whether the pair comes together again when nothing more goes wrong.
    pub fn heal(mut self) {
        self.bounds = Bounds { outputs: self.bounds.outputs, ..Bounds::default() };
        let was_cut = self.net.cut_to.contains(&true);
        self.net.cut_to = [false, false];
        if was_cut {
            self.break_connection();
        }
        for _ in 0..STEPS_MAX {
            if self.hosts.iter().all(|host| !host.gone && host.session.is_protected()) {
                return;
            }
            if let Some(step) = self.usual_steps().into_iter().next() {
                self.take(step);
            } else if let Some(host) = (0..2).find(|host| self.is_to_be_replaced(*host)) {
                self.replace(host);
            } else if self.hosts.iter().any(|host| host.is_live()) {
                self.beat();
            } else if self.hosts.iter().any(|host| host.claim.is_some()) {
                // A claim that the witness cannot judge waits for a person.
                return;
            } else {
                break;
            }
        }
        let lives = self.hosts.iter().any(|host| host.is_live());
        assert!(!lives, "the guest runs and stays without a backup: {}", self.places());
        // Nobody is left to go on; that takes the loss of a host.
        assert!(self.crashes > 0, "nobody has the guest: {}", self.places());
    }

    fn is_to_be_replaced(&self, host: usize) -> bool {
        let is_stuck = self.hosts[host].session.state_name() == "AwaitingBackup";
        self.hosts[1 - host].is_live() && (self.hosts[host].gone || is_stuck)
    }

    fn beat(&mut self) {
        if let Some(next_ns) = self.next_deadline_ns() {
            self.now_ns = self.now_ns.max(next_ns);
        }
        for host in 0..2 {
            if self.deadline_ns(host).is_some_and(|deadline_ns| deadline_ns <= self.now_ns) {
                self.take(Step::Tick(host));
            }
        }
    }

    fn places(&self) -> String {
        let place = |host: usize| {
            let own = &self.hosts[host];
            format!("host {host} {} {:?} gone={}", own.session.state_name(), own.mode, own.gone)
        };
        format!("{}; {}", place(0), place(1))
    }
}
