//! The guest's whole state: to the other host, to a file, and back.

use ftvmm_replication::{
    Event, FileHeader, MemoryCheckMode, Ordinal, SessionEvent, SnapshotMark, SnapshotReader,
    SnapshotWriter, StatePart,
};

use crate::coverage::Mark;
use crate::disk::Completion;
use crate::fingerprint::fingerprint;
use crate::guest::{CELLS, Guest, cells_from_bytes, cells_to_bytes};
use crate::host::Stage;
use crate::world::{FAULTS_END_NS, OnHost, US, World};

/// What a part is padded to where the state is to be big.
const BIG_PART_BYTES: usize = 900 << 10;
/// What may be under way: the window, and the part that went past it.
const UNDER_WAY_MAX: u64 = (4 << 20) + (BIG_PART_BYTES as u64);

/// A state on its way: what was sent of each page and block.
pub struct Sender {
    /// The transfer to the other host; `None` for a file.
    number: Option<u64>,
    pages: [Option<u64>; CELLS],
    blocks: [Option<u64>; CELLS],
    /// Parts that are to be sent while the guest runs.
    parts_left: u64,
    begun: bool,
    /// One that waits for room.
    unsent: Option<StatePart>,
    sent_bytes: u64,
    pad_bytes: usize,
    file: SnapshotWriter<Vec<u8>>,
}

impl Sender {
    /// What is left is to be taken while the guest stands still.
    pub fn wants_stop(&self) -> bool {
        self.parts_left == 0 && self.unsent.is_none()
    }

    /// What was not sent as it is now.
    fn news(sent: &mut [Option<u64>; CELLS], now: &[u64; CELLS], most: usize) -> Vec<u8> {
        let news: Vec<_> = (0..CELLS)
            .filter(|cell| sent[*cell] != Some(now[*cell]))
            .take(most)
            .map(|cell| (cell as u8, now[cell]))
            .collect();
        news.iter().for_each(|(cell, value)| sent[usize::from(*cell)] = Some(*value));
        cells_to_bytes(&news)
    }
}

/// The parts of a snapshot.
pub fn snapshot_parts(file: &[u8]) -> Vec<StatePart> {
    let mut reader = SnapshotReader::new(file).expect("a snapshot");
    std::iter::from_fn(|| reader.next_part().expect("a whole snapshot")).collect()
}

impl World {
    /// Begins to send the state to the other host, or to a file.
    pub fn begin_sending(&mut self, host: usize, number: Option<u64>) {
        let own = &mut self.hosts[host];
        if number.is_none() && (!own.thread.is_live || own.state.sender.is_some()) {
            return;
        }
        let header = FileHeader {
            build: "sim".try_into().expect("a name"),
            fingerprint: fingerprint(),
            rtc_epoch_s: 0,
            kernel_path: String::new(),
            initramfs_path: None,
            start: None,
        };
        let big = self.options.big_state;
        let (pad_bytes, most) = if big { (BIG_PART_BYTES, 12) } else { (0, 20) };
        self.hosts[1 - host].state.restored_bytes = 0;
        self.hosts[host].state.sender = Some(Sender {
            number,
            pages: [None; CELLS],
            blocks: [None; CELLS],
            parts_left: self.random.between(if big { 8 } else { 1 }, most),
            begun: false,
            unsent: None,
            sent_bytes: 0,
            pad_bytes,
            file: SnapshotWriter::new(Vec::new(), &header).expect("memory takes it"),
        });
        self.after_on(0, host, OnHost::Send);
    }

    /// The thread that sends the state goes on while the guest runs.
    pub fn send_on(&mut self, host: usize) {
        let own = &mut self.hosts[host];
        let Some(sender) = own.state.sender.as_mut().filter(|sender| !sender.wants_stop()) else {
            return;
        };
        if sender.unsent.is_none() {
            sender.parts_left -= 1;
            let mut part = match (std::mem::replace(&mut sender.begun, true), self.random.one_in(2))
            {
                (false, _) => StatePart::Outline { total_bytes: 100 },
                (_, true) => {
                    StatePart::Pages(Sender::news(&mut sender.pages, &own.thread.guest.memory, 3))
                }
                (_, false) => {
                    StatePart::Blocks(Sender::news(&mut sender.blocks, &own.disk.blocks, 3))
                }
            };
            if let StatePart::Pages(bytes) | StatePart::Blocks(bytes) = &mut part {
                bytes.resize(bytes.len() + sender.pad_bytes, 0);
            }
            sender.unsent = Some(part);
        }
        let Some(number) = sender.number else {
            let part = sender.unsent.take().expect("made above");
            sender.file.write_part(&part).expect("memory takes it");
            let delay_ns = self.random.between(20 * US, 1000 * US);
            return self.after_on(delay_ns, host, OnHost::Send);
        };
        let mut part = sender.unsent.take();
        let bytes = part.as_ref().map_or(0, StatePart::len_bytes);
        match self.core(host, |core, now_ns| core.send_part(now_ns, number, &mut part)) {
            None => self.hosts[host].state.sender = None,
            Some(has_room) => {
                if !has_room {
                    self.coverage.mark(Mark::WaitedForRoom);
                }
                self.note_sent(host, number, part, bytes);
            }
        }
        let delay_ns = self.random.between(20 * US, 1000 * US);
        self.after_on(delay_ns, host, OnHost::Send);
    }

    fn note_sent(&mut self, host: usize, number: u64, unsent: Option<StatePart>, bytes: u64) {
        let restored_bytes = self.hosts[1 - host].state.restored_bytes;
        let is_whole = self.hosts[host].wire.connection == self.hosts[1 - host].wire.connection;
        // What the core decided may have begun another.
        let sender = self.hosts[host].state.sender.as_mut();
        let Some(sender) = sender.filter(|sender| sender.number == Some(number)) else { return };
        sender.sent_bytes += if unsent.is_none() { bytes } else { 0 };
        sender.unsent = unsent;
        let under_way = sender.sent_bytes.saturating_sub(restored_bytes);
        assert!(!is_whole || under_way <= UNDER_WAY_MAX, "{under_way} bytes of state under way");
    }

    /// The guest stands still for the rest of its state; whether its thread goes on at once.
    pub fn save_state(&mut self, host: usize) -> bool {
        let own = &mut self.hosts[host];
        if !own.disk.queue.is_empty() {
            return false;
        }
        let Some(mut sender) = own.state.sender.take() else { return true };
        let mut parts = Vec::new();
        if !sender.begun {
            parts.push(StatePart::Outline { total_bytes: 100 });
        }
        parts.push(StatePart::Pages(Sender::news(
            &mut sender.pages,
            &own.thread.guest.memory,
            CELLS,
        )));
        parts.push(StatePart::Blocks(Sender::news(&mut sender.blocks, &own.disk.blocks, CELLS)));
        let machine = (&own.thread.guest, own.disk.last_id, own.disk.untaken());
        let machine = postcard::to_stdvec(&machine).expect("plain data");
        let (at, disk_through) = (own.thread.guest.at, own.disk.last_id);
        match sender.number {
            Some(number) => {
                own.thread.guest.renew_copy();
                if !own.core.session().is_attaching() || !own.core.transfer().is_number(number) {
                    return true;
                }
                self.hosts[1 - host].state.offered = Some((at, disk_through));
                for part in parts {
                    self.step(host, SessionEvent::State(part));
                }
                let at = Ordinal(at);
                self.step(host, SessionEvent::StateEnd { at, machine, disk_through });
                self.hosts[host].core.count_attach(US);
            }
            None => self.save(host, sender, parts, machine),
        }
        true
    }

    /// The end of a snapshot: the log says that memory was copied, and which snapshot it was.
    fn save(&mut self, host: usize, sender: Sender, parts: Vec<StatePart>, machine: Vec<u8>) {
        let check = self.hosts[host].thread.guest.check(MemoryCheckMode::Renew);
        self.log(host, Event::Check(Box::new(check)));
        let mark = SnapshotMark { path: "/snapshot".into(), memory_digest: 0 };
        self.log(host, Event::Snapshot(mark));
        let mut file = sender.file;
        for part in parts.iter().chain([&StatePart::Machine(machine)]) {
            file.write_part(part).expect("memory takes it");
        }
        self.coverage.mark(Mark::Saved);
        self.snapshot = Some(file.finish().expect("memory takes it"));
    }

    /// Puts a part of a state in place; after the last one, the exit the guest stands at.
    pub fn put_part(&mut self, host: usize, part: &StatePart) -> Result<Option<Ordinal>, String> {
        let is_to_be_copied = self.now_ns < FAULTS_END_NS;
        let own = &mut self.hosts[host];
        own.state.restored_bytes += part.len_bytes();
        match part {
            StatePart::Outline { .. } => {
                own.disk.clear();
                own.disk.copying = true;
                own.thread.guest.memory = [0; CELLS];
            }
            StatePart::Pages(bytes) => {
                cells_from_bytes(bytes, |cell, value| own.thread.guest.memory[cell] = value);
            }
            StatePart::Blocks(_) if is_to_be_copied && std::mem::take(&mut own.disk.is_bad) => {
                return Err("the disk cannot be copied".into());
            }
            StatePart::Blocks(bytes) => {
                cells_from_bytes(bytes, |cell, value| own.disk.blocks[cell] = value);
            }
            StatePart::Machine(bytes) => {
                let (guest, last_id, answers): (Guest, u64, Vec<Completion>) =
                    postcard::from_bytes(bytes).expect("a machine was sent");
                let memory = std::mem::replace(&mut own.thread.guest, guest).memory;
                own.thread.guest.memory = memory;
                own.thread.guest.renew_copy();
                own.disk.resume(last_id, answers);
                own.disk.copying = false;
                own.thread.stage = Stage::AtExit;
                let mark = if own.thread.is_live { Mark::Restored } else { Mark::Attached };
                self.coverage.mark(mark);
                if own.thread.is_live {
                    self.checker.on_restored(&own.thread.guest);
                }
                return Ok(Some(Ordinal(own.thread.guest.at)));
            }
        }
        Ok(None)
    }
}
