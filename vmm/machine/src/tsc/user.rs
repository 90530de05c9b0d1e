//! User mode's RDTSC and RDTSCP, from the exception frame of the #GP that CR4.TSD made of them.
//!
//! The frame says where the instruction stands; it is decoded from there, through the guest's page
//! tables, in the width of its code segment. What comes out are the registers as they would be
//! behind it.

use iced_x86::{Decoder, DecoderOptions};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::code::Trapped;
use super::paging::AddressSpace;
use super::segment::{self, Purpose};

/// The longest instruction (AMD APM vol. 3, 1.1); a longer one is a #GP of its own.
const INSTRUCTION_BYTES_MAX: usize = 15;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_ONE: u64 = 1 << 1;

/// What the CPU pushes for an exception with an error code in long mode (AMD APM vol. 2, 8.9.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    error_code: u64,
    rip: u64,
    cs: u16,
    rflags: u64,
    rsp: u64,
    ss: u16,
}

impl Frame {
    fn read(space: &AddressSpace<'_>, rsp: u64) -> Option<Self> {
        let bytes = space.read::<48>(rsp)?;
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * index..][..8]);
            u64::from_le_bytes(word)
        };
        let (cs, ss) = (word(2) as u16, word(5) as u16);
        Some(Self { error_code: word(0), rip: word(1), cs, rflags: word(3), rsp: word(4), ss })
    }
}

/// The CPU behind an emulated instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Emulated {
    /// General registers, back in user mode.
    pub regs: kvm_regs,
    /// CS and SS are back in user mode too; the rest as it was.
    pub sregs: kvm_sregs,
    /// A debugger in the guest steps this program: #DB is due.
    pub single_stepped: bool,
}

/// Executes the instruction whose #GP has just reached the guest's handler, if it is a user's RDTSC
/// or RDTSCP and the counter is `tsc`. `regs` and `sregs` are those at the handler's first
/// instruction.
pub fn emulate(
    space: &AddressSpace<'_>,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    tsc: u64,
) -> Option<Emulated> {
    let frame = Frame::read(space, regs.rsp)?;
    if frame.error_code != 0 {
        return None;
    }
    let cs = segment::load(space, sregs, frame.cs, Purpose::Code)?;
    let ss = segment::load(space, sregs, frame.ss, Purpose::Stack)?;
    let bits = segment::code_bits(&cs);
    let (trapped, length) = decode(space, &frame, bits, cs.base, cs.limit)?;

    let next = frame.rip.wrapping_add(length);
    let mut regs = kvm_regs {
        rax: tsc & 0xffff_ffff,
        rdx: tsc >> 32,
        rip: if bits == 64 { next } else { next & (u64::MAX >> (64 - bits)) },
        rsp: frame.rsp,
        // RF protected the instruction from a breakpoint; behind it, it is clear.
        rflags: frame.rflags & !RFLAGS_RF | RFLAGS_ONE,
        ..*regs
    };
    match trapped {
        // IA32_TSC_AUX is hidden with RDTSCP and stays zero.
        Trapped::Rdtscp => regs.rcx = 0,
        Trapped::Rdtsc => {}
        Trapped::ReadCr4(_) | Trapped::WriteCr4(_) => return None,
    }
    let sregs = kvm_sregs { cs, ss, ..*sregs };
    Some(Emulated { regs, sregs, single_stepped: frame.rflags & RFLAGS_TF != 0 })
}

/// The instruction at the frame's RIP and its length, as far as user mode could have fetched it.
fn decode(
    space: &AddressSpace<'_>,
    frame: &Frame,
    bits: u32,
    base: u64,
    limit: u32,
) -> Option<(Trapped, u64)> {
    let mut bytes = [0; INSTRUCTION_BYTES_MAX];
    let (start, reachable) = if bits == 64 {
        (frame.rip, INSTRUCTION_BYTES_MAX)
    } else {
        let left = u64::from(limit).checked_sub(frame.rip)?.saturating_add(1);
        (base.wrapping_add(frame.rip) & 0xffff_ffff, left.min(bytes.len() as u64) as usize)
    };
    let fetchable = |page: &super::paging::Page| page.user && page.executable;
    let got = space.read_where(start, &mut bytes[..reachable], fetchable);
    let mut decoder = Decoder::new(bits, &bytes[..got], DecoderOptions::NONE);
    let instruction = decoder.decode();
    // An invalid instruction, one with LOCK among them, would have been #UD: it is no business of
    // ours.
    let trapped = Trapped::of(&instruction).filter(|trapped| trapped.reads_counter())?;
    Some((trapped, instruction.len() as u64))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_segment;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::paging::tests::{guest, map};
    use super::*;
    use crate::memory::Memory;

    const GDT: u64 = 0xffff_ffff_8200_0000;
    const STACK: u64 = 0xffff_ffff_8200_1000;
    /// The frame straddles two pages.
    const RSP: u64 = STACK + 0x1000 - 24;
    const CODE: u64 = 0x40_0000;
    const TSC: u64 = 0x1234_5678_9abc_def0;
    const NO_EXECUTE: u64 = 1 << 63;

    struct World {
        memory: Memory,
        sregs: kvm_sregs,
        frame: Frame,
    }

    impl World {
        /// A 64-bit program with two executable pages that lie apart in memory.
        fn new() -> Self {
            let (memory, mut sregs) = guest();
            map(&memory, GDT, 0x5000, 3);
            map(&memory, STACK, 0x6000, 3);
            map(&memory, STACK + 0x1000, 0x9000, 3);
            map(&memory, CODE, 0xb000, 7);
            map(&memory, CODE + 0x1000, 0xd000, 7);
            let table = [0x00cf_fb00_0000_ffffu64, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
            memory
                .write_slice(&table.map(u64::to_le_bytes).concat(), GuestAddress(0x5020))
                .unwrap();
            // 16-bit code of 0x1000 bytes from CODE + 0xf00 on.
            memory.write_obj(0x0000_fb40_0f00_0fffu64, GuestAddress(0x5038)).unwrap();
            sregs.gdt.base = GDT;
            sregs.gdt.limit = 0x7f;
            sregs.cs = kvm_segment { selector: 0x10, ..Default::default() };
            let frame = Frame {
                error_code: 0,
                rip: CODE,
                cs: 0x33,
                rflags: 0x1_0246,
                rsp: 0x7fff,
                ss: 0x2b,
            };
            Self { memory, sregs, frame }
        }

        fn put(&self, rip: u64, code: &[u8]) {
            for (at, byte) in (rip..).zip(code) {
                let gpa = AddressSpace::new(&self.memory, &self.sregs).translate(at).unwrap();
                self.memory.write_obj(*byte, GuestAddress(gpa)).unwrap();
            }
        }

        fn emulate(&self) -> Option<Emulated> {
            let Frame { error_code, rip, cs, rflags, rsp, ss } = self.frame;
            let words = [error_code, rip, cs.into(), rflags, rsp, ss.into()];
            self.put(RSP, &words.map(u64::to_le_bytes).concat());
            let regs = kvm_regs {
                rsp: RSP,
                rax: u64::MAX,
                rcx: u64::MAX,
                rdx: u64::MAX,
                ..Default::default()
            };
            emulate(&AddressSpace::new(&self.memory, &self.sregs), &regs, &self.sregs, TSC)
        }

        fn at(mut self, rip: u64, code: &[u8]) -> Option<Emulated> {
            self.put(rip, code);
            self.frame.rip = rip;
            self.emulate()
        }
    }

    #[test]
    fn the_registers_are_those_behind_the_instruction() {
        let done = World::new().at(CODE, &[0x0f, 0x31]).unwrap();
        let kvm_regs { rax, rcx, rdx, rip, rsp, rflags, .. } = done.regs;
        assert_eq!((rax, rdx, rcx), (0x9abc_def0, 0x1234_5678, u64::MAX));
        assert_eq!((rip, rsp, rflags), (CODE + 2, 0x7fff, 0x246));
        assert_eq!((done.sregs.cs.selector, done.sregs.cs.l, done.sregs.cs.dpl), (0x33, 1, 3));
        assert_eq!((done.sregs.ss.selector, done.sregs.ss.dpl), (0x2b, 3));
        assert!(!done.single_stepped);
        let done = World::new().at(CODE, &[0x0f, 0x01, 0xf9]).unwrap();
        assert_eq!((done.regs.rcx, done.regs.rip), (0, CODE + 3));
    }

    #[test]
    fn legal_prefixes_are_skipped_at_every_offset_from_a_page_boundary() {
        let prefixes: [&[u8]; 6] =
            [&[], &[0x66], &[0xf2], &[0x2e, 0x48], &[0x64, 0x67], &[0x3e; 12]];
        for prefix in prefixes {
            for opcode in [&[0x0f, 0x31][..], &[0x0f, 0x01, 0xf9]] {
                let code = [prefix, opcode].concat();
                for before in 0..=code.len() as u64 {
                    let rip = CODE + 0x1000 - before;
                    let done = World::new().at(rip, &code).unwrap();
                    assert_eq!(done.regs.rip, rip + code.len() as u64, "{code:02x?}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_rdtsc_of_a_user_is_left_to_the_guest() {
        for code in [
            &[0xf0, 0x0f, 0x31][..],                    // lock rdtsc
            &[0xf4],                                    // hlt
            &[0x0f, 0x22, 0xe0],                        // mov cr4, rax
            &[&[0x3e; 14][..], &[0x0f, 0x31]].concat(), // sixteen bytes
        ] {
            assert_eq!(World::new().at(CODE, code), None, "{code:02x?}");
        }
        let refused = |change: fn(&mut Frame)| {
            let mut world = World::new();
            world.put(CODE, &[0x0f, 0x31]);
            change(&mut world.frame);
            world.emulate()
        };
        assert!(refused(|_| {}).is_some());
        assert_eq!(refused(|frame| frame.error_code = 0x18), None);
        assert_eq!(refused(|frame| frame.cs = 0x30), None, "not from user mode");
        assert_eq!(refused(|frame| frame.ss = 0), None);
        assert_eq!(refused(|frame| frame.rip = 0x50_0000), None, "not mapped");
        assert_eq!(refused(|frame| frame.rip = GDT), None, "not the user's");
    }

    #[test]
    fn an_instruction_is_read_only_as_far_as_it_may_be_fetched() {
        let rip = CODE + 0xfff;
        for flags in [0, 3, 7 | NO_EXECUTE] {
            let mut world = World::new();
            world.put(rip, &[0x0f, 0x31]);
            map(&world.memory, CODE + 0x1000, 0xd000, flags);
            world.frame.rip = rip;
            assert_eq!(world.emulate(), None, "{flags:#x}");
            // The page behind does not matter to an instruction that ends before it.
            world.put(rip - 1, &[0x0f, 0x31]);
            world.frame.rip = rip - 1;
            assert!(world.emulate().is_some());
        }
    }

    #[test]
    fn narrow_code_wraps_and_ends_at_its_limit() {
        let mut world = World::new();
        world.frame.cs = 0x23;
        let done = world.at(CODE, &[0x48, 0x0f, 0x31]);
        assert_eq!(done, None, "0x48 is DEC EAX there");
        let mut world = World::new();
        world.frame.cs = 0x23;
        let done = world.at(CODE, &[0x66, 0x0f, 0x31]).unwrap();
        assert_eq!((done.regs.rip, done.sregs.cs.db, done.sregs.cs.l), (CODE + 3, 1, 0));

        let mut world = World::new();
        world.frame.cs = 0x3b;
        world.put(CODE + 0xf00 + 0x10, &[0x0f, 0x31]);
        world.frame.rip = 0x10;
        assert_eq!(world.emulate().unwrap().regs.rip, 0x12);
        // The last byte within the limit, and one beyond.
        world.put(CODE + 0xf00 + 0xffe, &[0x0f, 0x31, 0x31]);
        world.frame.rip = 0xffe;
        assert!(world.emulate().is_some());
        world.put(CODE + 0xf00 + 0xffe, &[0x90, 0x0f, 0x31]);
        world.frame.rip = 0xfff;
        assert_eq!(world.emulate(), None);
    }

    #[test]
    fn a_stepped_program_is_told() {
        let mut world = World::new();
        world.frame.rflags |= RFLAGS_TF;
        let done = world.at(CODE, &[0x0f, 0x31]).unwrap();
        assert!(done.single_stepped);
        assert_eq!(done.regs.rflags & (RFLAGS_TF | RFLAGS_RF), RFLAGS_TF);
    }
}
