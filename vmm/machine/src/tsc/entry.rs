//! The guest's #GP handler with a port read as its first instruction.
//!
//! The handler is whatever gate 13 of the IDT points to at an exit; kernels have an early one and a
//! final one and rewrite the beginning of the latter while they boot, so every exit looks again.
//! What is written where follows from the guest's registers and memory at exits alone: it is the
//! same on every machine that runs this guest.

use kvm_bindings::kvm_sregs;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::code::{GP_ENTRY, can_displace};
use super::paging::AddressSpace;
use crate::memory::Memory;

const GP_VECTOR: u64 = 13;
const GATE_BYTES: u64 = 16;
const GATE_PRESENT: u8 = 0x80;
/// 64-bit interrupt and trap gates (AMD APM vol. 2, 4.8.4); the lowest bit tells which.
const GATE_TYPE: u8 = 0x0e;
/// Enough for the instructions that hold the first two bytes.
const HANDLER_BYTES: usize = 17;

/// The displaced beginning of the #GP handler, and how it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    idt: (u64, u16),
    gate: [u8; GATE_BYTES as usize],
    /// Where the gate lies in guest-physical memory.
    gate_gpa: u64,
    /// Virtual address of the handler.
    pub handler: u64,
    /// Where its first two bytes lie in guest-physical memory.
    places: [u64; 2],
    /// What the guest believes to stand there.
    original: [u8; 2],
}

impl Entry {
    /// Looks where the #GP handler is and puts the port read there. `thoroughly` also looks whether
    /// page tables have changed under an unchanged IDT.
    pub fn keep(entry: &mut Option<Entry>, thoroughly: bool, sregs: &kvm_sregs, memory: &Memory) {
        if entry.as_ref().is_some_and(|entry| !thoroughly && entry.stands(sregs, memory)) {
            return;
        }
        let found = Self::locate(sregs, memory, entry.as_ref());
        if let Some(old) = entry.take()
            && found.as_ref().is_none_or(|new| new.places != old.places)
        {
            old.put_back(memory);
        }
        if let Some(new) = &found {
            new.put(memory);
        }
        *entry = found;
    }

    fn stands(&self, sregs: &kvm_sregs, memory: &Memory) -> bool {
        self.idt == (sregs.idt.base, sregs.idt.limit)
            && memory
                .read_obj(GuestAddress(self.gate_gpa))
                .is_ok_and(|gate: [u8; 16]| gate == self.gate)
            && self.bytes(memory) == Some(GP_ENTRY)
    }

    fn locate(sregs: &kvm_sregs, memory: &Memory, old: Option<&Entry>) -> Option<Entry> {
        let space = AddressSpace::new(memory, sregs);
        let gate_address = sregs.idt.base.checked_add(GP_VECTOR * GATE_BYTES)?;
        if u64::from(sregs.idt.limit) < (GP_VECTOR + 1) * GATE_BYTES - 1 {
            return None;
        }
        let gate: [u8; GATE_BYTES as usize] = space.read(gate_address)?;
        if gate[5] & (GATE_PRESENT | GATE_TYPE) != GATE_PRESENT | GATE_TYPE {
            return None;
        }
        let [a, b, _, _, _, _, c, d, e, f, g, h, ..] = gate;
        let handler = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let places = [space.translate(handler)?, space.translate(handler.wrapping_add(1))?];
        let mut code: [u8; HANDLER_BYTES] = space.read(handler)?;
        // A byte we put there stands for the one it displaced, also when the guest rewrote the
        // other.
        if let Some(old) = old.filter(|old| old.places == places) {
            for i in 0..GP_ENTRY.len() {
                if code[i] == GP_ENTRY[i] {
                    code[i] = old.original[i];
                }
            }
        }
        can_displace(&code).then_some(Entry {
            idt: (sregs.idt.base, sregs.idt.limit),
            gate,
            gate_gpa: space.translate(gate_address)?,
            handler,
            places,
            original: [code[0], code[1]],
        })
    }

    fn bytes(&self, memory: &Memory) -> Option<[u8; 2]> {
        let byte = |place| memory.read_obj::<u8>(GuestAddress(place)).ok();
        Some([byte(self.places[0])?, byte(self.places[1])?])
    }

    fn write(&self, memory: &Memory, bytes: [u8; 2]) {
        for (place, byte) in self.places.into_iter().zip(bytes) {
            // Where it was read it can be written: guest memory has no read-only part.
            let _ = memory.write_obj(byte, GuestAddress(place));
        }
    }

    /// Puts the port read in the place of the handler's own bytes.
    pub fn put(&self, memory: &Memory) {
        self.write(memory, GP_ENTRY);
    }

    /// Gives the handler its own bytes back, unless the guest has put others there since.
    pub fn put_back(&self, memory: &Memory) {
        if self.bytes(memory) == Some(GP_ENTRY) {
            self.write(memory, self.original);
        }
    }

    /// The handler's first bytes as the guest believes them to be.
    pub fn handler_bytes(&self, space: &AddressSpace<'_>) -> Option<[u8; HANDLER_BYTES]> {
        let mut code: [u8; HANDLER_BYTES] = space.read(self.handler)?;
        code[..GP_ENTRY.len()].copy_from_slice(&self.original);
        Some(code)
    }

    /// Whether an instruction at `rip` lies in the displaced bytes.
    pub fn holds(&self, rip: u64) -> bool {
        rip.wrapping_sub(self.handler) < GP_ENTRY.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::{guest, map};
    use super::*;

    const IDT: u64 = 0xffff_fe00_0000_0000;
    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const NOP3: [u8; 3] = [0x0f, 0x1f, 0x00];

    struct World {
        memory: Memory,
        sregs: kvm_sregs,
        entry: Option<Entry>,
    }

    impl World {
        fn new() -> Self {
            let (memory, mut sregs) = guest();
            map(&memory, IDT, 0x5000, 3);
            map(&memory, TEXT, 0x6000, 1);
            map(&memory, TEXT + 0x1000, 0x9000, 1);
            sregs.idt.base = IDT;
            sregs.idt.limit = 0xfff;
            let world = Self { memory, sregs, entry: None };
            world.write(0x6000, &[0x90; 0x1000]);
            world.write(0x9000, &[0x90; 0x1000]);
            world
        }

        fn write(&self, gpa: u64, bytes: &[u8]) {
            self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
        }

        fn read(&self, gpa: u64) -> [u8; 2] {
            self.memory.read_obj(GuestAddress(gpa)).unwrap()
        }

        fn set_gate(&self, handler: u64) {
            let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            self.write(0x50d0, &low.to_le_bytes());
            self.write(0x50d8, &(handler >> 32).to_le_bytes());
        }

        fn keep(&mut self) {
            Entry::keep(&mut self.entry, false, &self.sregs, &self.memory);
        }
    }

    #[test]
    fn nothing_is_armed_without_a_gate() {
        let mut world = World::new();
        world.keep();
        assert_eq!(world.entry, None);
        world.set_gate(TEXT);
        world.sregs.idt.limit = 13 * 16 + 14;
        world.keep();
        assert_eq!(world.entry, None);
        world.sregs.idt.limit += 1;
        world.keep();
        assert_eq!(world.entry.as_ref().unwrap().handler, TEXT);
        assert_eq!(world.read(0x6000), GP_ENTRY);
    }

    #[test]
    fn an_early_handler_gets_its_bytes_back_when_the_final_one_comes() {
        let mut world = World::new();
        world.write(0x6010, &[0x6a, 0x0d, 0xeb, 0x20]);
        world.set_gate(TEXT + 0x10);
        world.keep();
        assert_eq!(world.read(0x6010), GP_ENTRY);
        // The final one straddles two pages.
        world.write(0x6fff, &NOP3[..1]);
        world.write(0x9000, &NOP3[1..]);
        world.set_gate(TEXT + 0xfff);
        world.keep();
        assert_eq!(world.read(0x6010), [0x6a, 0x0d]);
        assert_eq!([world.read(0x6fff)[0], world.read(0x9000)[0]], GP_ENTRY);
        let entry = world.entry.as_ref().unwrap();
        assert_eq!(entry.original, NOP3[..2]);
        let space = AddressSpace::new(&world.memory, &world.sregs);
        assert_eq!(entry.handler_bytes(&space).unwrap()[..4], [NOP3[0], NOP3[1], NOP3[2], 0x90]);
        assert!(entry.holds(TEXT + 0x1000) && !entry.holds(TEXT + 0x1001) && !entry.holds(TEXT));
        entry.put_back(&world.memory);
        assert_eq!([world.read(0x6fff)[0], world.read(0x9000)[0]], NOP3[..2]);
    }

    #[test]
    fn bytes_the_guest_rewrites_are_the_new_original() {
        let mut world = World::new();
        world.set_gate(TEXT);
        world.keep();
        assert_eq!(world.entry.as_ref().unwrap().original, [0x90, 0x90]);
        // The whole instruction, as alternatives do.
        world.write(0x6000, &NOP3);
        world.keep();
        assert_eq!(world.entry.as_ref().unwrap().original, NOP3[..2]);
        assert_eq!(world.read(0x6000), GP_ENTRY);
        // One byte only.
        world.write(0x6000, &[0xfc]);
        world.write(0x6001, &[0x90]);
        world.keep();
        world.write(0x6000, &[0x90]);
        world.keep();
        assert_eq!(world.entry.as_ref().unwrap().original, [0x90, 0x90]);
        assert_eq!(world.read(0x6000), GP_ENTRY);
    }

    #[test]
    fn changed_page_tables_are_seen_by_a_thorough_look() {
        let mut world = World::new();
        world.set_gate(TEXT);
        world.keep();
        map(&world.memory, TEXT, 0x9000, 1);
        world.keep();
        assert_eq!(world.read(0x9000), [0x90, 0x90]);
        Entry::keep(&mut world.entry, true, &world.sregs, &world.memory);
        assert_eq!(world.read(0x9000), GP_ENTRY);
        assert_eq!(world.read(0x6000), [0x90, 0x90], "the old place is as it was");
    }

    #[test]
    fn a_handler_that_makes_an_exit_at_once_stays_as_it_is() {
        let mut world = World::new();
        world.write(0x6000, &[0xe6, 0x8d, 0xeb, 0xfe]);
        world.set_gate(TEXT);
        world.keep();
        assert_eq!((world.entry.take(), world.read(0x6000)), (None, [0xe6, 0x8d]));
    }
}
