//! What must hold, seen from outside.

use std::collections::BTreeMap;

use ftvmm_devices::DiskOp;
use ftvmm_replication::ReleasePolicy;

use crate::disk::Disk;
use crate::guest::{CELLS, Guest, number};
use crate::world::PRIMARY;

/// Right to speak, as the witness gave it.
pub enum Right {
    /// The primary of a pair: only what the backup can explain may leave.
    Gated {
        /// Horizon of the last group that arrived at the backup.
        backup_received: u64,
        /// The last exit in the past of a state the backup was given; it may not be in place yet.
        in_state: u64,
    },
    /// Won a term of its own.
    Own {
        /// The term.
        term: u64,
    },
}

/// A host in one of its lives.
type HostLife = (usize, u64);

/// A frame as the client got it.
struct Got {
    frame: Vec<u8>,
    /// In which turn it came last.
    turn: u64,
}

/// Sees every frame that reaches the client and every term that is won.
///
/// The hosts speak in turns, and a turn ends when another host takes over. Once a host has, no
/// other may be heard, by a frame or an announcement: what it says is an output for the second
/// time, or out of order. Within a turn no frame is sent twice. The host that takes over may begin
/// with frames that the client has: the host before may have died between a frame and the message
/// that it has left, so one of the two had to say it (decision 0011).
#[derive(Default)]
pub struct Checker {
    /// What the client knows: frame by number.
    client: BTreeMap<u64, Got>,
    /// Who speaks, since the first time that the witness gave a host a term of its own.
    speaker: Option<HostLife>,
    turn: u64,
    /// Last frame each host sent.
    last_of_host: [u64; 2],
    /// Who holds a term: a host and which of its lives.
    terms: BTreeMap<u64, HostLife>,
    /// The last flush that the disk of a host has, in each of its lives.
    flushed: BTreeMap<HostLife, u64>,
    /// The last flush that a guest was told of.
    told: u64,
}

impl Checker {
    /// The witness gave `term` to `host` in its `life`.
    pub fn on_granted(&mut self, host: usize, life: u64, term: u64) {
        let holder = *self.terms.entry(term).or_insert((host, life));
        assert_eq!(holder, (host, life), "term {term} was given to both");
    }

    /// `host` says that it is active in `term`.
    pub fn on_speaks(&mut self, host: usize, life: u64, term: u64) {
        assert_eq!(self.terms.get(&term), Some(&(host, life)), "host {host} speaks in term {term}");
        let last = self.terms.keys().last();
        assert_eq!(last, Some(&term), "host {host} speaks in an old term");
        let before = self.speaker.replace((host, life)).unwrap_or((PRIMARY, 0));
        self.turn += u64::from(before != (host, life));
    }

    /// A host tells the network that the guest is there.
    pub fn on_announced(&self, sender: HostLife) {
        let speaker = self.speaker.unwrap_or((PRIMARY, 0));
        assert_eq!(sender, speaker, "a host announces the guest, which another one has");
    }

    /// `host` speaks no more: what it says next follows what others said.
    pub fn on_silent(&mut self, host: usize) {
        self.last_of_host[host] = 0;
    }

    /// The disk of `host` has every write up to the flush `id`.
    pub fn on_flushed(&mut self, host: usize, life: u64, id: u64) {
        self.flushed.insert((host, life), id);
    }

    /// A guest may be told of its flushes up to `id`: its own disk has them, and that of a host
    /// which follows.
    pub fn on_flush_told(&mut self, id: u64, own: HostLife, peer: Option<HostLife>) {
        let speaker = self.speaker.unwrap_or((PRIMARY, 0));
        assert_eq!(own, speaker, "a guest that another host has is told of flush {id}");
        for disk in [Some(own), peer].into_iter().flatten() {
            let has = self.flushed.get(&disk).copied().unwrap_or_default();
            assert!(has >= id, "flush {id} is told, the disk of {disk:?} has {has}");
        }
        self.told = self.told.max(id);
    }

    /// The guest could be started again on `disk`, which is neither half of another nor behind.
    pub fn on_usable(&self, disk: &Disk) {
        assert!(!disk.copying, "half a disk may be used");
        let (told, has) = (self.told, disk.done_through);
        assert!(has >= told, "a disk may be used that has {has}, flush {told} was told");
    }

    /// A guest goes on from a snapshot: the client has seen what it had sent until then.
    pub fn on_restored(&mut self, guest: &Guest) {
        self.client = guest
            .sent
            .iter()
            .map(|sent| (number(&sent.frame), Got { frame: sent.frame.clone(), turn: self.turn }))
            .collect();
    }

    /// `guest` goes on with `disk`, which holds what it wrote, and every write that the client may
    /// know of.
    pub fn on_disk(&self, guest: &Guest, disk: &Disk) {
        let mut blocks = [0; CELLS];
        for request in &guest.requests {
            match &request.op {
                DiskOp::Write { sector, data } if request.id <= disk.done_through => {
                    let value =
                        data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                    blocks[*sector as usize] = value;
                }
                _ => {}
            }
        }
        assert_eq!(disk.blocks, blocks, "the disk is not what the guest wrote");
        for (k, Got { frame, .. }) in &self.client {
            let Some(sent) = guest.sent.get(*k as usize - 1).filter(|sent| sent.frame == *frame)
            else {
                continue;
            };
            let told = guest.told_writes[..sent.told_writes].iter().max();
            let done = disk.done_through;
            assert!(told <= Some(&done), "frame {k} tells of write {told:?}, the disk has {done}");
        }
    }

    /// Who holds the last term.
    pub fn holder(&self) -> Option<HostLife> {
        self.terms.values().last().copied()
    }

    /// Frames the client has seen.
    pub fn seen(&self) -> u64 {
        self.client.len() as u64
    }

    /// A host puts `frame` on the network; whether the client had it, which is right only of the
    /// host that took over last. `trusted` says that the backup's bits were left alone, or that
    /// releases compare them.
    pub fn on_frame(
        &mut self,
        sender: HostLife,
        frame: &[u8],
        right: &Right,
        release: ReleasePolicy,
        guests: [&Guest; 2],
        trusted: bool,
    ) -> bool {
        let (host, _) = sender;
        let k = number(frame);
        let speaker = self.speaker.unwrap_or((PRIMARY, 0));
        assert_eq!(sender, speaker, "frame {k} is of a host that another has taken over from");
        let index = k as usize - 1;
        assert_eq!(guests[host].sent[index].frame, frame, "frame {k} is not what the guest sent");
        match right {
            Right::Gated { backup_received, in_state } => match release {
                ReleasePolicy::Compare if guests[host].sent[index].at <= *in_state => {}
                ReleasePolicy::Compare => {
                    let other = guests[1 - host].sent.get(index);
                    assert_eq!(other, Some(&guests[host].sent[index]), "frame {k} had no match");
                }
                ReleasePolicy::Ack => {
                    let at = guests[host].sent[index].at;
                    assert!(at <= *backup_received, "frame {k} of exit {at} was not covered");
                }
            },
            Right::Own { term } => {
                let holder = self.terms.get(term).map(|(holder, _)| *holder);
                assert_eq!(holder, Some(host), "frame {k} without a right");
            }
        }

        // In order on each host, and without a gap for the client, across take-overs too.
        if self.last_of_host[host] > 0 {
            assert_eq!(k, self.last_of_host[host] + 1, "host {host} sends out of order");
        }
        self.last_of_host[host] = k;
        assert!(k <= self.seen() + 1, "the client misses a frame before {k}");
        let got = Got { frame: frame.to_vec(), turn: self.turn };
        let Some(known) = self.client.insert(k, got) else { return false };
        assert!(known.frame == frame || !trusted, "the client saw another frame {k}");
        assert!(known.turn < self.turn, "frame {k} is sent twice");
        true
    }

    /// At the end: the guest that goes on explains everything the client saw, and the client has
    /// got everything it sent.
    pub fn on_survivor(&self, guest: &Guest, trusted: bool) {
        for (k, Got { frame, .. }) in &self.client {
            let sent = guest.sent.get(*k as usize - 1);
            let explained = sent.is_some_and(|sent| sent.frame == *frame);
            assert!(explained || !trusted, "the survivor cannot explain frame {k}");
        }
        let (seen, sent) = (self.seen(), guest.sent.len() as u64);
        // A side that is not believed may have said more.
        assert!(seen == sent || seen > sent && !trusted, "{seen} frames seen, {sent} sent");
    }
}
