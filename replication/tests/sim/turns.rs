//! Guests: what the run loop of a host does.

use ftvmm_devices::Input;
use ftvmm_replication::{
    Check, CursorStep, End, EndReason, Event, GroupEncoder, Ordinal, OutputDigest, Record,
    SessionEvent, StatePart,
};

use crate::host::Host;
use crate::world::{BACKUP, Due, MS, US, World};

/// A guest that has made so many exits can be given to another host.
const EXITS_MIN: u64 = 2;

impl World {
    /// The guest of a host goes on, if it may.
    pub fn turn(&mut self, host: usize) {
        let delay_ns = self.random.between(20 * US, MS);
        if self.hosts[host].stopped.is_some() {
            return;
        }
        let life = self.hosts[host].life;
        self.after(delay_ns, Due::Turn { host, life });
        if std::mem::take(&mut self.hosts[host].untold) {
            let taken_bytes = self.hosts[host].taken_bytes;
            self.step(host, SessionEvent::StateTaken { taken_bytes });
        }
        let own = &self.hosts[host];
        let movable = own.guest.at >= EXITS_MIN;
        if own.joining || own.ended || own.faulted || own.session.is_yielding() {
            return;
        }
        if own.cursor.is_some() {
            self.follow(host);
        } else if own.switch_wanted && movable {
            self.hosts[host].switch_wanted = false;
            if self.hosts[host].session.may_yield() {
                self.flush(host);
                let through = Ordinal(self.hosts[host].guest.at - 1);
                self.step(host, SessionEvent::Yield { through });
            }
        } else if let Some(parts) = own.shipping.filter(|_| movable) {
            self.ship(host, parts);
        } else if own.congested {
            self.flush(host);
        } else {
            self.record(host);
        }
    }

    /// Sends some of the state while the guest runs, or its end while the guest stands.
    fn ship(&mut self, host: usize, parts: u64) {
        if parts == 0 {
            let guest = &self.hosts[host].guest;
            let (at, machine) = (Ordinal(guest.at), guest.save());
            self.hosts[host].shipping = None;
            return self.step(host, SessionEvent::StateEnd { at, machine, disk_through: 0 });
        }
        self.hosts[host].shipping = Some(parts - 1);
        self.step(host, SessionEvent::State(StatePart::Pages(vec![0; 50])));
        match self.hosts[host].congested {
            true => self.flush(host),
            false => self.record(host),
        }
    }

    fn record(&mut self, host: usize) {
        let (now_ns, at) = (self.now_ns, self.hosts[host].guest.at);
        let strays = std::mem::take(&mut self.hosts[host].received);
        let mut inputs: Vec<_> = strays.into_iter().map(|frame| Input::NetRx { frame }).collect();
        for _ in 0..self.random.between(0, 3) {
            inputs.push(match self.random.one_in(3) {
                true => Input::NetRx { frame: self.random.number().to_le_bytes().to_vec() },
                false => Input::Time { now_ns },
            });
        }
        for input in inputs {
            self.log(host, at, Event::Input(input.clone()));
            self.hosts[host].guest.apply(&input);
        }
        if self.options.ends_at == Some(at) {
            let state_digest = self.hosts[host].guest.digest();
            let (chain, outputs) = (self.hosts[host].guest.state, 0);
            let end = End { state_digest, chain, outputs, reason: EndReason::PowerOff };
            self.log(host, at, Event::End(end));
            self.finish_group(host, at);
            return self.end(host);
        }
        if self.random.one_in(10) {
            let chain = self.hosts[host].guest.state;
            let check = Check { chain, ..Check::default() };
            self.log(host, at, Event::Check(Box::new(check)));
        }
        if self.random.one_in(10) {
            self.flush(host);
        }
        self.run_guest(host);
        if self.random.one_in(2) {
            self.flush(host);
        }
    }

    fn log(&mut self, host: usize, at: u64, event: Event) {
        self.hosts[host].encoder.push(&Record { at: Ordinal(at), event });
    }

    /// Closes the group while the guest stands at its exit.
    fn flush(&mut self, host: usize) {
        let horizon = self.hosts[host].guest.at.saturating_sub(1);
        self.finish_group(host, horizon);
    }

    fn finish_group(&mut self, host: usize, horizon: u64) {
        let bytes = self.hosts[host].encoder.finish(Ordinal(horizon));
        self.step(host, SessionEvent::Group { bytes });
    }

    fn run_guest(&mut self, host: usize) {
        let guest = &mut self.hosts[host].guest;
        let left = guest.at;
        let transmitted = guest.run();
        if host == BACKUP && self.flip_at == Some(guest.at) && !self.flipped {
            self.flipped = true;
            guest.state ^= 1;
        }
        let (at, chain) = (Ordinal(guest.at), guest.state);
        let frame = guest.sent.last().filter(|_| transmitted).map(|sent| sent.frame.clone());
        self.step(host, SessionEvent::Executed(Ordinal(left)));
        if let Some(frame) = frame {
            let digest = OutputDigest::of(at, chain, &frame);
            self.step(host, SessionEvent::Output { at, digest, frame });
        }
    }

    fn follow(&mut self, host: usize) {
        if self.hosts[host].strays > 0 && self.random.one_in(3) {
            self.hosts[host].strays -= 1;
            let frame = self.random.number().to_le_bytes().to_vec();
            self.step(host, SessionEvent::Strays(vec![frame]));
        }
        let Host { cursor, guest, .. } = &mut self.hosts[host];
        let at = guest.at;
        let Some(cursor) = cursor else { return };
        match cursor.next(Ordinal(at)) {
            CursorStep::Apply(input) => guest.apply(&input),
            CursorStep::Check(check) if check.chain == guest.state => {}
            CursorStep::End(End { state_digest, .. }) if state_digest == guest.digest() => {
                self.end(host);
            }
            CursorStep::Proceed if self.options.ends_at != Some(at) => self.run_guest(host),
            CursorStep::Wait => {}
            CursorStep::Exhausted => {
                self.hosts[host].cursor = None;
                self.hosts[host].encoder = GroupEncoder::new();
                let through = Ordinal(at.saturating_sub(1));
                self.step(host, SessionEvent::TookOver { through });
            }
            other => {
                let description = format!("{other:?} at exit {at}");
                self.hosts[host].faulted = true;
                self.step(host, SessionEvent::ReplayFault { description });
            }
        }
    }

    fn end(&mut self, host: usize) {
        self.hosts[host].ended = true;
        let state_digest = self.hosts[host].guest.digest();
        self.step(host, SessionEvent::GuestEnded { state_digest });
    }
}
