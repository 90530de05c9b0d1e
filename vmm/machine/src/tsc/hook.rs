//! Being told of new kernel code before it runs.
//!
//! Linux makes memory executable in one way once it has booted: `set_memory_x`, from 6.2 on
//! `set_memory_rox` too, with an address and a number of pages, after the code there was relocated
//! and its alternatives applied (modules, their init sections, trampolines of ftrace and kprobes,
//! BPF). So these functions get a port read as an instruction near their start, and when the guest
//! comes to it the pages are searched.
//!
//! The instruction itself must still be executed, and neither emulation nor a single step does that
//! on every host. So there are two places: the port read is at the first; there the instruction is
//! put back, and the port read goes to one that follows on the straight path, a few bytes on; there
//! it goes back to the first. Two exits a call. Between the two no interrupt is given to the guest,
//! so nothing else runs there meanwhile.
//!
//! What a function starts with belongs to others: ENDBR64 to the CPU, the call or NOP behind it to
//! ftrace, which checks its bytes. Both are left alone.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::code::HOOK;
use super::paging::AddressSpace;
use crate::memory::Memory;

/// The functions, by name.
pub const FUNCTIONS: [&str; 2] = ["set_memory_x", "set_memory_rox"];
/// So far from a function's start the first place is looked for.
pub const PROLOGUE_BYTES: usize = 64;
const PAGE_BYTES: u64 = 4096;
/// No module has more code; what a guest asks for beyond is left to the next look.
const SEARCHED_BYTES_MAX: u64 = 64 << 20;
const CALL_REL32: u8 = 0xe8;
const CALL_BYTES: usize = 5;
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// What ftrace puts in the place of its calls (Linux, `x86_nops[5]`).
const NOP5: [u8; CALL_BYTES] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// An instruction in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    address: u64,
    /// What stands there while the port read does not.
    original: [u8; 2],
}

/// A function that is hooked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    first: Place,
    second: Place,
    /// The port read is at the second place.
    halfway: bool,
}

/// Code that is about to become executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewCode {
    /// Its virtual address.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

impl Hook {
    /// A hook in the function at `address`, which starts with `code`; `None` when there is no good
    /// place in it.
    pub fn choose(address: u64, code: &[u8]) -> Option<Self> {
        let mut start = 0;
        if code.starts_with(&ENDBR64) {
            start += ENDBR64.len();
        }
        let rest = code.get(start..)?;
        if rest.first() == Some(&CALL_REL32) || rest.starts_with(&NOP5) {
            start += CALL_BYTES;
        }
        let mut decoder = Decoder::with_ip(64, code.get(start..)?, 0, DecoderOptions::NONE);
        let instructions: Vec<Instruction> = decoder.iter().collect();
        let place = |at: usize| {
            let original = code.get(start + at..)?.first_chunk()?;
            Some(Place { address: address + (start + at) as u64, original: *original })
        };
        let behind = instructions.iter().position(|i| i.ip() as usize >= HOOK.len())?;
        if !instructions[..behind].iter().all(is_straight) {
            return None;
        }
        let second = place(instructions[behind].ip() as usize)?;
        Some(Self { first: place(0)?, second, halfway: false })
    }

    /// Address of the instruction that is replaced while no call of the function is in progress.
    pub fn address(&self) -> u64 {
        self.first.address
    }

    /// The guest has left the first place and not reached the second.
    pub fn is_halfway(&self) -> bool {
        self.halfway
    }

    /// Whether the port read at `rip` is this one.
    pub fn stands_at(&self, rip: u64) -> bool {
        let place = if self.halfway { &self.second } else { &self.first };
        place.address == rip
    }

    /// Moves the port read to its other place.
    pub fn hop(&mut self, space: &AddressSpace<'_>, memory: &Memory) {
        let (from, to) = if self.halfway {
            (&self.second, &mut self.first)
        } else {
            (&self.first, &mut self.second)
        };
        write(space, memory, from.address, from.original);
        if let Some(original) = space.read(to.address) {
            to.original = original;
            write(space, memory, to.address, HOOK);
        }
        self.halfway = !self.halfway;
    }

    /// Puts the port read there, whatever the guest has put in its place.
    pub fn keep(&mut self, space: &AddressSpace<'_>, memory: &Memory) {
        if self.halfway {
            return;
        }
        if let Some(original) = space.read(self.first.address).filter(|bytes| *bytes != HOOK) {
            self.first.original = original;
            write(space, memory, self.first.address, HOOK);
        }
    }
}

/// What a call with these arguments makes executable.
pub fn new_code(rdi: u64, rsi: u64) -> NewCode {
    // The second argument is an int.
    let pages = u64::try_from(rsi as u32 as i32).unwrap_or(0);
    let address = rdi / PAGE_BYTES * PAGE_BYTES;
    NewCode { address, bytes: (pages * PAGE_BYTES).min(SEARCHED_BYTES_MAX) }
}

fn write(space: &AddressSpace<'_>, memory: &Memory, address: u64, bytes: [u8; 2]) {
    for (at, byte) in (address..).zip(bytes) {
        if let Some(gpa) = space.translate(at) {
            // It was read from there.
            let _ = memory.write_obj(byte, GuestAddress(gpa));
        }
    }
}

/// The guest goes from here to the next instruction, whatever happens.
fn is_straight(instruction: &Instruction) -> bool {
    use Mnemonic::{Add, And, Cmp, Lea, Mov, Movsxd, Nop, Or, Push, Sub, Test, Xor};
    let harmless = [Add, And, Cmp, Lea, Mov, Movsxd, Nop, Or, Push, Sub, Test, Xor];
    let touches_control = (0..instruction.op_count()).any(|i| {
        let register = instruction.op_register(i);
        register.is_cr() || register.is_dr() || register.is_segment_register()
    });
    instruction.flow_control() == FlowControl::Next
        && harmless.contains(&instruction.mnemonic())
        && !touches_control
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::{guest, map};
    use super::*;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    /// `set_memory_x` of Debian's 6.1.
    const DEBIAN: [u8; 23] = [
        0xe8, 0x6b, 0x84, 0xfe, 0xff, // call __fentry__
        0x48, 0x83, 0xec, 0x08, // sub rsp, 8
        0x31, 0xc0, // xor eax, eax
        0x48, 0x83, 0x3d, 0x85, 0x35, 0xbb, 0x01, 0x00, // cmp qword [rip+…], 0
        0x48, 0x89, 0x3c, 0x24, // mov [rsp], rdi
    ];

    #[test]
    fn two_instructions_on_a_straight_path_are_chosen() {
        let hook = Hook::choose(TEXT, &DEBIAN).unwrap();
        assert_eq!((hook.first.address, hook.second.address), (TEXT + 5, TEXT + 9));
        assert_eq!((hook.first.original, hook.second.original), ([0x48, 0x83], [0x31, 0xc0]));
        let with_endbr = [&ENDBR64[..], &NOP5, &DEBIAN[5..]].concat();
        assert_eq!(Hook::choose(TEXT, &with_endbr).unwrap().first.address, TEXT + 9);
        // Two pushes make one place.
        let hook = Hook::choose(TEXT, &[0x55, 0x53, 0x31, 0xc0, 0xc3]).unwrap();
        assert_eq!((hook.first.address, hook.second.address), (TEXT, TEXT + 2));
        for code in [
            &[0x75, 0x10, 0x31, 0xc0, 0x90, 0x90][..], // jne
            &[0x55, 0xc3, 0x31, 0xc0, 0x90, 0x90],     // push; ret
            &[0x31, 0xff, 0x31],                       // cut off
            &[0x0f, 0x20, 0xe0, 0x31, 0xc0, 0x90],     // mov rax, cr4
        ] {
            assert_eq!(Hook::choose(TEXT, code), None, "{code:02x?}");
        }
    }

    #[test]
    fn the_port_read_goes_to_and_fro() {
        let (memory, sregs) = guest();
        map(&memory, TEXT, 0x6000, 1);
        let read = |at: u64| memory.read_obj::<[u8; 2]>(GuestAddress(0x6000 + at)).unwrap();
        memory.write_slice(&DEBIAN, GuestAddress(0x6000)).unwrap();
        let space = AddressSpace::new(&memory, &sregs);
        let mut hook = Hook::choose(TEXT, &DEBIAN).unwrap();
        hook.keep(&space, &memory);
        assert_eq!((read(5), read(9)), (HOOK, [0x31, 0xc0]));
        assert!(hook.stands_at(TEXT + 5) && !hook.stands_at(TEXT + 9) && !hook.is_halfway());
        hook.hop(&space, &memory);
        assert_eq!((read(5), read(9)), ([0x48, 0x83], HOOK));
        assert!(hook.stands_at(TEXT + 9) && hook.is_halfway());
        hook.keep(&space, &memory);
        hook.hop(&space, &memory);
        assert_eq!((read(5), read(9)), (HOOK, [0x31, 0xc0]));
        // The guest rewrote the first place: that is what stands there from now on.
        memory.write_slice(&[0x90, 0x90], GuestAddress(0x6005)).unwrap();
        hook.keep(&space, &memory);
        hook.hop(&space, &memory);
        assert_eq!(read(5), [0x90, 0x90]);
    }

    #[test]
    fn hostile_arguments_are_bounded() {
        assert_eq!(new_code(0x1234, 2), NewCode { address: 0x1000, bytes: 0x2000 });
        assert_eq!(new_code(0x1000, u64::MAX).bytes, 0);
        assert_eq!(new_code(0x1000, 0x1_0000_0001).bytes, 0x1000);
        assert_eq!(new_code(u64::MAX, i32::MAX as u64).bytes, SEARCHED_BYTES_MAX);
    }
}
