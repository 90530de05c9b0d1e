//! The instructions of a kernel that are not left to the CPU, and the port accesses put in their
//! place.
//!
//! Every KVM hands a port access to the VMM, at any privilege and before there is paging, so
//! nothing but the port number names what was there:
//!
//! | instruction | becomes | port, width |
//! |---|---|---|
//! | `RDTSC` | `IN EAX, imm8` | 0x55, 4 bytes |
//! | `RDTSCP` | `IN EAX, imm8`; `NOP` | 0x56, 4 bytes |
//! | first two bytes of the #GP handler | `IN AL, imm8` | 0x57, 1 byte |
//! | an instruction of a function that makes memory executable ([`super::hook`]) | `IN AL, imm8` | 0x58, 1 byte |
//! | `MOV reg, CR4` | `IN AL, imm8`; `NOP`s | 0x10 + reg, 1 byte |
//! | `MOV CR4, reg` | `OUT imm8, AL`; `NOP`s | 0x10 + reg, 1 byte |
//!
//! `reg` is the register's number in an instruction, 0 for RAX to 15 for R15. No device of the
//! machine answers at these ports, and Linux touches none of them (0x10 to 0x1f are aliases of the
//! first DMA controller, whose driver stops at 0x0f). The one byte wide `IN` leaves the upper bits
//! of RAX alone, as `MOV reg, CR4` does.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

/// A 4-byte read here was `RDTSC`.
pub const RDTSC_PORT: u16 = 0x55;
/// A 4-byte read here was `RDTSCP`.
pub const RDTSCP_PORT: u16 = 0x56;
/// A 1-byte read here is the start of the guest's #GP handler.
pub const GP_PORT: u16 = 0x57;
/// A 1-byte read here is the call of a function that makes memory executable.
pub const HOOK_PORT: u16 = 0x58;
/// Accesses of one byte from here on, one port for each register, were `MOV` from or to CR4.
pub const CR4_PORTS: std::ops::Range<u16> = 0x10..0x20;

/// `IN EAX, imm8`, `IN AL, imm8` and `OUT imm8, AL` (AMD APM vol. 3, IN and OUT).
const IN_EAX_IMM8: u8 = 0xe5;
const IN_AL_IMM8: u8 = 0xe4;
const OUT_IMM8_AL: u8 = 0xe6;
const NOP: u8 = 0x90;

/// What the first two bytes of the #GP handler become.
pub const GP_ENTRY: [u8; 2] = [IN_AL_IMM8, GP_PORT as u8];

/// What the first two bytes of a hooked instruction become.
pub const HOOK: [u8; 2] = [IN_AL_IMM8, HOOK_PORT as u8];

/// An instruction that traps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trapped {
    /// `RDTSC`.
    Rdtsc,
    /// `RDTSCP`.
    Rdtscp,
    /// `MOV reg, CR4`.
    ReadCr4(u8),
    /// `MOV CR4, reg`.
    WriteCr4(u8),
}

impl Trapped {
    /// What `instruction` is, if it is one that traps.
    pub fn of(instruction: &Instruction) -> Option<Self> {
        let operands = (instruction.op0_register(), instruction.op1_register());
        match (instruction.code(), operands) {
            (Code::Rdtsc, _) => Some(Self::Rdtsc),
            (Code::Rdtscp, _) => Some(Self::Rdtscp),
            (Code::Mov_r64_cr, (register, Register::CR4)) => {
                Some(Self::ReadCr4(register.number() as u8))
            }
            (Code::Mov_cr_r64, (Register::CR4, register)) => {
                Some(Self::WriteCr4(register.number() as u8))
            }
            _ => None,
        }
    }

    /// True for the two that read the counter.
    pub fn reads_counter(self) -> bool {
        matches!(self, Self::Rdtsc | Self::Rdtscp)
    }

    /// Opcode and port of its replacement.
    pub fn replacement(self) -> [u8; 2] {
        match self {
            Self::Rdtsc => [IN_EAX_IMM8, RDTSC_PORT as u8],
            Self::Rdtscp => [IN_EAX_IMM8, RDTSCP_PORT as u8],
            Self::ReadCr4(register) => [IN_AL_IMM8, CR4_PORTS.start as u8 + register],
            Self::WriteCr4(register) => [OUT_IMM8_AL, CR4_PORTS.start as u8 + register],
        }
    }

    /// Overwrites the whole instruction, prefixes too: one before a port access would mean
    /// something else.
    pub fn replace(self, instruction: &mut [u8]) {
        instruction.fill(NOP);
        instruction[..2].copy_from_slice(&self.replacement());
    }
}

/// A place in code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Bytes of the instruction, counted from the start of the code.
    pub range: std::ops::Range<usize>,
    /// The instruction.
    pub trapped: Trapped,
}

/// Instructions that must decode one after the other behind an invalid one before a site is
/// believed.
const IN_SYNC_INSTRUCTIONS: u32 = 16;
/// Functions start at multiples of this in every kernel: where decoding begins again.
const FUNCTION_ALIGNMENT: usize = 16;

/// So many sites are found in one piece of code; a Linux kernel has some hundreds. Beyond, the
/// guest's own code is not trapped: it bounds what a guest that is full of them makes its host
/// remember.
pub const SITES_MAX: usize = 16_384;

/// Finds the first [`SITES_MAX`] sites in `code`, which starts with an instruction. A linear sweep:
/// behind bytes that are none it goes on at the next function boundary and believes nothing until
/// it is in step again.
pub fn find(code: &[u8]) -> Vec<Site> {
    let mut sites = Vec::new();
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut doubtful = 0;
    let mut instruction = Instruction::default();
    while decoder.can_decode() && sites.len() < SITES_MAX {
        let start = decoder.position();
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() {
            doubtful = IN_SYNC_INSTRUCTIONS;
            let next = (start / FUNCTION_ALIGNMENT + 1) * FUNCTION_ALIGNMENT;
            if decoder.set_position(next.min(code.len())).is_err() {
                break;
            }
            continue;
        }
        if let Some(trapped) = Trapped::of(&instruction)
            && doubtful == 0
        {
            sites.push(Site { range: start..decoder.position(), trapped });
        }
        doubtful = doubtful.saturating_sub(1);
    }
    sites
}

/// Where bytes may be one of the trapped instructions, which is where decoding is worth its while:
/// the offsets of their 0F byte.
pub fn candidates(code: &[u8]) -> impl Iterator<Item = usize> {
    let opcodes = code.iter().enumerate().filter(|&(_, &byte)| byte == 0x0f).map(|(at, _)| at);
    opcodes.filter(|&at| match (code.get(at + 1), code.get(at + 2)) {
        (Some(0x31), _) | (Some(0x01), Some(0xf9)) => true,
        // MOV from and to a control register; /4 is CR4.
        (Some(0x20 | 0x22), Some(modrm)) => modrm >> 3 & 7 == 4,
        _ => false,
    })
}

/// Whether the handler's own first instructions can be stepped over one at a time when they are
/// due: none may make an exit, store the trap flag or leave the straight path. Tells so of the
/// instructions that hold the first two of these bytes.
pub fn can_displace(handler: &[u8]) -> bool {
    let mut decoder = Decoder::new(64, handler, DecoderOptions::NONE);
    while decoder.position() < GP_ENTRY.len() {
        let instruction = decoder.decode();
        let strange = matches!(
            instruction.mnemonic(),
            Mnemonic::In | Mnemonic::Out | Mnemonic::Hlt | Mnemonic::Pushfq | Mnemonic::Pushf
        );
        // A long NOP has a memory operand and leaves it alone.
        let touches_memory = instruction.mnemonic() != Mnemonic::Nop
            && (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
        if instruction.is_invalid()
            || instruction.flow_control() != FlowControl::Next
            || strange
            || touches_memory
            || instruction.is_string_instruction()
        {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patched(code: &[u8]) -> Vec<u8> {
        let mut code = code.to_vec();
        for site in find(&code) {
            site.trapped.replace(&mut code[site.range]);
        }
        code
    }

    #[test]
    fn code_that_is_full_of_them_is_not_remembered_whole() {
        let code = [0x0f, 0x31].repeat(SITES_MAX + 1);
        assert_eq!(find(&code).len(), SITES_MAX);
    }

    #[test]
    fn replaces_instructions_and_nothing_that_only_looks_like_one() {
        // mov eax,0x310f ; rdtsc ; lfence ; rdtscp ; ret
        let code = [0xb8, 0x0f, 0x31, 0, 0, 0x0f, 0x31, 0x0f, 0xae, 0xe8, 0x0f, 0x01, 0xf9, 0xc3];
        let wanted = [0xb8, 0x0f, 0x31, 0, 0, 0xe5, 0x55, 0x0f, 0xae, 0xe8, 0xe5, 0x56, 0x90, 0xc3];
        assert_eq!(patched(&code), wanted);
    }

    #[test]
    fn every_register_has_its_port_in_both_directions() {
        for register in 0..16u8 {
            for (opcode, replaced) in [(0x22, OUT_IMM8_AL), (0x20, IN_AL_IMM8)] {
                let mov = [0x0f, opcode, 0xe0 | register & 7];
                let rex = [0x41];
                let code = [if register < 8 { &[][..] } else { &rex }, &mov, &[0xc3]].concat();
                let got = patched(&code);
                assert_eq!(got[..2], [replaced, 0x10 + register]);
                assert!(got[2..got.len() - 1].iter().all(|&byte| byte == NOP));
                assert_eq!(got.last(), Some(&0xc3));
                assert_eq!(got.len(), code.len());
            }
        }
        // mov cr3, rax ; mov rax, cr0 ; mov cr8, rax
        let others = [0x0f, 0x22, 0xd8, 0x0f, 0x20, 0xc0, 0x44, 0x0f, 0x22, 0xc0];
        assert_eq!(patched(&others), others);
    }

    #[test]
    fn prefixes_go_with_the_instruction() {
        // rep rdtsc ; REX.W rdtsc ; ret
        let code = [0xf3, 0x0f, 0x31, 0x48, 0x0f, 0x31, 0xc3];
        assert_eq!(patched(&code), [0xe5, 0x55, 0x90, 0xe5, 0x55, 0x90, 0xc3]);
    }

    #[test]
    fn after_bytes_that_are_no_code_a_site_is_not_believed_at_once() {
        let mut code = vec![0x06; 16];
        code.extend([0x0f, 0x31]);
        assert_eq!(find(&code), []);
        code.truncate(16);
        code.extend([0x90; IN_SYNC_INSTRUCTIONS as usize]);
        code.extend([0x0f, 0x31]);
        assert_eq!(find(&code).len(), 1);
    }

    #[test]
    fn every_site_is_a_candidate() {
        // The same bytes at every offset, within other instructions too.
        let mut state = 1u64;
        let code: Vec<u8> = (0..200_000)
            .map(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                [0x0f, 0x31, 0x01, 0xf9, 0x20, 0x22, 0xe3, 0x41, 0x90, 0xc3]
                    [(state >> 33) as usize % 10]
            })
            .collect();
        let candidates: std::collections::BTreeSet<usize> = candidates(&code).collect();
        let sites = find(&code);
        assert!(sites.len() > 100);
        for Site { range, .. } in sites {
            assert!(range.clone().any(|at| candidates.contains(&at)), "{:02x?}", &code[range]);
        }
    }

    #[test]
    fn only_straight_harmless_code_is_displaced() {
        for code in [
            &[0x0f, 0x1f, 0x00][..],   // nop
            &[0xf3, 0x0f, 0x1e, 0xfa], // endbr64
            &[0x0f, 0x01, 0xca],       // clac
            &[0xfc, 0x6a, 0x0d],       // cld ; push 13
            &[0x90, 0x90],
        ] {
            assert!(can_displace(code), "{code:02x?}");
        }
        for code in [
            &[0xe6, 0x8d][..],         // out 0x8d, al
            &[0xfc, 0xf4],             // cld ; hlt
            &[0x9c, 0x90],             // pushf
            &[0xeb, 0xfe],             // jmp $
            &[0x48, 0x89, 0x04, 0x24], // mov [rsp], rax
            &[0x06, 0x06],
        ] {
            assert!(!can_displace(code), "{code:02x?}");
        }
    }
}
