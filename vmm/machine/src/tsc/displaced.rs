//! What the #GP handler's own first instructions do, for those that kernels begin it with.
//!
//! They stand where the port read is now. Linux's are a NOP (CLAC, where there is no SMAP),
//! ENDBR64, CLD, or the PUSH of the vector in its early handlers. Carried out here they need no
//! single step, which not every host gets right.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use super::code::GP_ENTRY;
use super::paging::AddressSpace;
use crate::memory::Memory;

const RFLAGS_DF: u64 = 1 << 10;
const WORD_BYTES: u64 = 8;
const PAGE_BYTES: u64 = 4096;

/// Carries out the instructions of `handler` that begin in its first two bytes; `regs` stand at the
/// first. False, and nothing has been done, when there is one among them that only a step can carry
/// out.
pub fn execute(
    handler: &[u8],
    regs: &mut kvm_regs,
    space: &AddressSpace<'_>,
    memory: &Memory,
) -> bool {
    let mut after = *regs;
    let mut pushed = Vec::new();
    let mut decoder = Decoder::with_ip(64, handler, regs.rip, DecoderOptions::NONE);
    while decoder.position() < GP_ENTRY.len() {
        let instruction = decoder.decode();
        match instruction.mnemonic() {
            Mnemonic::Nop | Mnemonic::Endbr64 => {}
            Mnemonic::Cld => after.rflags &= !RFLAGS_DF,
            Mnemonic::Push => match push(&instruction, &mut after, space) {
                Some(place) => pushed.push(place),
                None => return false,
            },
            _ => return false,
        }
        after.rip = instruction.next_ip();
    }
    for (place, value) in pushed {
        // It was found in memory; the rest of the exception's frame lies beside it.
        let _ = memory.write_obj(value, GuestAddress(place));
    }
    *regs = after;
    true
}

/// PUSH imm8 below a frame that the CPU has just pushed to the same page, so that the page can be
/// written and is marked so: where the word lies, and the word.
fn push(
    instruction: &Instruction,
    regs: &mut kvm_regs,
    space: &AddressSpace<'_>,
) -> Option<(u64, u64)> {
    let fits = regs.rsp.is_multiple_of(WORD_BYTES) && !regs.rsp.is_multiple_of(PAGE_BYTES);
    if instruction.code() != Code::Pushq_imm8 || !fits {
        return None;
    }
    regs.rsp -= WORD_BYTES;
    Some((space.translate(regs.rsp)?, instruction.immediate8to64() as u64))
}

#[cfg(test)]
mod tests {
    use super::super::paging::tests::{guest, map};
    use super::*;

    const STACK: u64 = 0xffff_fe00_0000_1000;
    const HANDLER: u64 = 0xffff_ffff_8100_0000;

    /// Registers after `handler`, and the word at the top of the stack.
    fn executed(handler: &[u8], rsp: u64) -> Option<(kvm_regs, u64)> {
        let (memory, sregs) = guest();
        map(&memory, STACK, 0x5000, 3);
        let mut regs = kvm_regs { rip: HANDLER, rsp, rflags: RFLAGS_DF | 2, ..Default::default() };
        let before = regs;
        let space = AddressSpace::new(&memory, &sregs);
        if !execute(handler, &mut regs, &space, &memory) {
            assert_eq!(regs, before, "{handler:02x?}");
            return None;
        }
        let place = space.translate(regs.rsp).unwrap();
        Some((regs, memory.read_obj(GuestAddress(place)).unwrap()))
    }

    #[test]
    fn what_handlers_begin_with_is_carried_out() {
        let rsp = STACK + 0xf50;
        for (handler, bytes, flags, pushed) in [
            (&[0x0f, 0x1f, 0x00, 0xcc][..], 3, RFLAGS_DF | 2, None), // nop dword ptr [rax]
            (&[0xf3, 0x0f, 0x1e, 0xfa], 4, RFLAGS_DF | 2, None),     // endbr64
            (&[0x90, 0x90, 0xcc], 2, RFLAGS_DF | 2, None),           // nop ; nop
            (&[0xfc, 0x90], 2, 2, None),                             // cld ; nop
            (&[0x6a, 0x0d, 0xeb, 0x20], 2, RFLAGS_DF | 2, Some(13)), // push 13
            (&[0xfc, 0x6a, 0xf3], 3, 2, Some(-13_i64 as u64)),       // cld ; push -13
        ] {
            let (regs, word) = executed(handler, rsp).unwrap();
            assert_eq!((regs.rip, regs.rflags), (HANDLER + bytes, flags), "{handler:02x?}");
            match pushed {
                Some(value) => assert_eq!((regs.rsp, word), (rsp - 8, value), "{handler:02x?}"),
                None => assert_eq!(regs.rsp, rsp, "{handler:02x?}"),
            }
        }
    }

    #[test]
    fn what_only_a_step_can_do_is_left_alone() {
        let rsp = STACK + 0xf50;
        for handler in [
            &[0x50, 0x90][..],               // push rax
            &[0x0f, 0x01, 0xca],             // clac
            &[0x90, 0x48, 0x83, 0xc4, 0x08], // nop ; add rsp, 8
            &[0x68, 0x0d, 0, 0, 0],          // push 13, with four bytes
        ] {
            assert!(executed(handler, rsp).is_none(), "{handler:02x?}");
        }
        // The word would lie in another page, or over two.
        for rsp in [STACK + 0x1000, STACK + 0xf54] {
            assert!(executed(&[0x6a, 0x0d], rsp).is_none(), "{rsp:#x}");
        }
    }
}
