//! What must hold, seen from outside. A breach panics; the search shows the way to it.

use crate::guest::{Disk, Guest};
use crate::world::World;

/// A host in one of its lives.
type HostLife = (usize, u8);

/// What the client and the guest know.
#[derive(Clone, Debug, Default)]
pub struct Checker {
    /// The last frame that reached the client: a history.
    client: Vec<u8>,
    /// The host that may speak, since the last one went live.
    speaker: Option<HostLife>,
    /// Frames of this speaker: the last one's length.
    said: usize,
    /// Flushes that a guest was told of.
    committed: u64,
}

impl Checker {
    /// A primary starts its guest in lockstep. Its backup may have taken over already.
    pub fn on_begins(&mut self, who: HostLife) {
        self.speaker.get_or_insert(who);
    }

    /// A host goes live: nobody else may be heard from now on.
    pub fn on_speaks(&mut self, who: HostLife) {
        if self.speaker != Some(who) {
            (self.speaker, self.said) = (Some(who), 0);
        }
    }

    /// A guest goes on with inputs of its own: it explains what the client saw.
    pub fn on_goes_on(&self, guest: &Guest) {
        let Guest { inputs } = guest;
        let client = &self.client;
        assert!(inputs.starts_with(client), "the survivor {inputs:?} cannot explain {client:?}");
    }

    /// A guest goes on with this disk: it has every flush that a guest was told of.
    pub fn on_disk(&self, disk: Disk) {
        let committed = self.committed;
        assert!(disk.done >= committed, "flush {committed} was told and is lost: {disk:?}");
    }

    /// A frame reaches the client. `peer` is the guest that has to have sent it too.
    pub fn on_frame(&mut self, who: HostLife, own: &Guest, peer: Option<&Guest>, frame: &[u8]) {
        assert_eq!(self.speaker, Some(who), "a host is heard from which another has taken over");
        assert!(own.inputs.starts_with(frame), "the guest never sent {frame:?}");
        if let Some(peer) = peer {
            let has = &peer.inputs;
            assert!(has.starts_with(frame), "{frame:?} leaves, the other guest is at {has:?}");
        }
        let (client, length) = (&self.client, frame.len());
        assert!(length <= client.len() + 1, "the client misses a frame before {frame:?}");
        let common = length.min(client.len());
        assert_eq!(frame[..common], client[..common], "the client sees two histories");
        assert!(length > self.said, "{frame:?} is sent twice by one host");
        self.said = length;
        if length > client.len() {
            self.client = frame.to_vec();
        }
    }

    /// A guest is told of its flushes up to `through`.
    pub fn on_flush_told(&mut self, who: HostLife, own: Disk, peer: Option<Disk>, through: u64) {
        assert_eq!(self.speaker, Some(who), "a guest that another host has is told of a flush");
        for disk in [Some(own), peer].into_iter().flatten() {
            assert!(disk.done >= through, "flush {through} is told, a disk has {}", disk.done);
        }
        self.committed = self.committed.max(through);
    }
}

impl World {
    /// After every step.
    pub fn check(&self) {
        let speaks = |host: usize| {
            let own = &self.hosts[host];
            !own.gone && own.session.may_speak(self.now_ns)
        };
        assert!(!(speaks(0) && speaks(1)), "two hosts are live");
    }
}
