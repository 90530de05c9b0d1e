//! One random instruction: random bytes that decode to something a guest may execute.
//!
//! Bytes are drawn until they decode to an instruction that passes the filter, so every form the
//! decoder knows comes up. What a guest with the CPU template could not rely on (features that are
//! hidden from it) and what no log could close from inside a stream (RDTSC, RDPMC) is left out; so
//! is what would take the stream away from its slots (branches). A ring-0 stream keeps to its own
//! memory, stack and privileges; in ring 3 the page tables and the #GP handler see to that.

use fastrand::Rng;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, FlowControl, Instruction,
    InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use super::layout::{SCRATCH_BYTES, UNMAPPED};

/// What holds the address of the scratch memory all through a stream.
pub const BASE: Register = Register::R15;

/// Privilege level of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// The guest's kernel.
    Zero,
    /// The guest's user mode.
    Three,
}

/// Features of the minimal template (`vmm/machine/templates`) that have instructions of their own.
/// MSR and what else is privileged is a #GP in ring 3 and refused in ring 0.
const FEATURES: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::CPUID,
    CpuidFeature::CX8,
    CpuidFeature::CLFSH,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FXSR,
    CpuidFeature::MMX,
    CpuidFeature::MSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
];

/// Needs ring 0 or IOPL, or changes what the rest of a ring-0 stream stands on.
const NOT_IN_RING_0: &[Mnemonic] = &[
    Mnemonic::In,
    Mnemonic::Out,
    Mnemonic::Insb,
    Mnemonic::Insw,
    Mnemonic::Insd,
    Mnemonic::Outsb,
    Mnemonic::Outsw,
    Mnemonic::Outsd,
    Mnemonic::Cli,
    Mnemonic::Sti,
    Mnemonic::Hlt,
    Mnemonic::Xlatb,
    Mnemonic::Maskmovq,
    Mnemonic::Maskmovdqu,
];

/// An instruction that reads one of these and faults, in the guest or in the host's nested page
/// tables, is left with other flags from run to run by QEMU 7.2's emulated CPU: they are computed
/// in place before the access, and whether that shows depends on where a host interrupt cut the
/// translated code.
const ARITHMETIC_FLAGS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Of these iced says that they read no flag, but the emulated CPU computes all: rotations by a
/// multiple of nine or seventeen bits change nothing, and CMPXCHG8B, which keeps all flags but ZF,
/// computes the others in the wrong way where an instruction before it in the translated code has
/// set them (docs/determinism.md, "The lab's emulated CPU").
const COMPUTE_FLAGS: &[Mnemonic] =
    &[Mnemonic::Rcl, Mnemonic::Rcr, Mnemonic::Cmpxchg8b, Mnemonic::Cmpxchg16b];

/// Stores the address of the last x87 instruction, which a switch to a host thread and back may
/// change: FXSAVE and XSAVE keep it only while an exception is pending on AMD's CPUs before Zen 2
/// (APM vol. 2 section 11.4.4), and never in QEMU.
const WITH_X87_POINTERS: &[Mnemonic] =
    &[Mnemonic::Fnstenv, Mnemonic::Fstenv, Mnemonic::Fnsave, Mnemonic::Fsave];

/// Loads MXCSR from the streams' random memory. A CPU answers reserved bits with #GP (SDM vol. 1
/// section 10.2.3), the lab's takes them, and its host's kernel then refuses the state of such a
/// guest (KVM_SET_XSAVE).
const WITH_MXCSR: &[Mnemonic] = &[Mnemonic::Ldmxcsr, Mnemonic::Fxrstor, Mnemonic::Fxrstor64];

/// With a register as bit offset these reach 2^60 bytes to either side.
const BIT_STRING: &[Mnemonic] = &[Mnemonic::Bt, Mnemonic::Bts, Mnemonic::Btr, Mnemonic::Btc];

/// Draws an instruction for a stream and encodes it for the address `ip`.
pub fn random_instruction(rng: &mut Rng, ring: Ring, ip: u64) -> Vec<u8> {
    loop {
        let bytes = random_bytes(rng);
        let mut instruction = Decoder::with_ip(64, &bytes, ip, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            continue;
        }
        if has_memory_operand(&instruction) {
            if reads_flags(&instruction) {
                continue;
            }
            let wild = ring == Ring::Three && rng.u8(0..6) == 0;
            if !wild {
                rebase(&mut instruction, rng);
            }
        }
        if !is_allowed(&instruction, ring) {
            continue;
        }
        let mut encoder = Encoder::new(64);
        if encoder.encode(&instruction, ip).is_ok() {
            return encoder.take_buffer();
        }
    }
}

/// Prefixes and opcode maps in proportions that give every group its share.
fn random_bytes(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    if rng.u8(0..5) == 0 {
        bytes.push(*pick(rng, &[0x66, 0xf2, 0xf3, 0xf0, 0x64, 0x65]));
    }
    if rng.bool() {
        bytes.push(0x40 | rng.u8(0..16));
    }
    match rng.u8(0..40) {
        // FXSAVE, STMXCSR, fences and their like.
        0 => bytes.extend([0x0f, 0xae]),
        1..16 => bytes.push(0x0f),
        _ => {}
    }
    bytes.extend(std::iter::repeat_with(|| rng.u8(..)).take(16));
    bytes
}

/// One of `all`.
pub fn pick<'a, T>(rng: &mut Rng, all: &'a [T]) -> &'a T {
    &all[rng.usize(0..all.len())]
}

fn reads_flags(instruction: &Instruction) -> bool {
    COMPUTE_FLAGS.contains(&instruction.mnemonic())
        || instruction.rflags_read() & ARITHMETIC_FLAGS != 0
}

fn has_memory_operand(instruction: &Instruction) -> bool {
    instruction.op_kinds().any(|kind| kind == OpKind::Memory)
}

/// Points the memory operand into the scratch memory, seldom to where nothing is mapped.
fn rebase(instruction: &mut Instruction, rng: &mut Rng) {
    let mut offset = match rng.u8(0..40) {
        0 => UNMAPPED + u64::from(rng.u16(..)),
        _ => rng.u64(0..SCRATCH_BYTES - 1024),
    };
    if rng.u8(0..10) < 8 {
        offset &= !15;
    }
    instruction.set_segment_prefix(Register::None);
    instruction.set_memory_base(BASE);
    instruction.set_memory_index(Register::None);
    instruction.set_memory_index_scale(1);
    instruction.set_memory_displ_size(8);
    instruction.set_memory_displacement64(offset);
}

fn is_allowed(instruction: &Instruction, ring: Ring) -> bool {
    let known = instruction.cpuid_features().iter().all(|feature| FEATURES.contains(feature));
    let int3 = instruction.code() == Code::Int3;
    let stays = matches!(instruction.flow_control(), FlowControl::Next | FlowControl::Exception);
    let mnemonic = instruction.mnemonic();
    let odd = WITH_X87_POINTERS.contains(&mnemonic) || WITH_MXCSR.contains(&mnemonic);
    if !known || odd || !(stays || int3) || instruction.is_ip_rel_memory_operand() {
        return false;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let writes = |register: Register| {
        info.used_registers().iter().any(|used| {
            used.register().full_register() == register
                && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
        })
    };
    if writes(BASE) {
        return false;
    }
    if ring == Ring::Three {
        return true;
    }
    let to_segment = instruction.op_count() > 0 && instruction.op0_register().is_segment_register();
    let bit_string = BIT_STRING.contains(&instruction.mnemonic())
        && instruction.op0_kind() == OpKind::Memory
        && instruction.op1_kind() == OpKind::Register;
    let implicit = |kind| {
        !matches!(kind, OpKind::Register | OpKind::Memory)
            && !(OpKind::Immediate8..=OpKind::Immediate32to64).contains(&kind)
    };
    !(to_segment
        || bit_string
        || writes(Register::RSP)
        || instruction.is_privileged()
        || instruction.is_stack_instruction()
        || NOT_IN_RING_0.contains(&instruction.mnemonic())
        || instruction.op_kinds().any(implicit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn mnemonics(ring: Ring) -> BTreeSet<Mnemonic> {
        let mut rng = Rng::with_seed(7);
        let mut one = || {
            let bytes = random_instruction(&mut rng, ring, 0x1000);
            Decoder::new(64, &bytes, DecoderOptions::NONE).decode().mnemonic()
        };
        (0..20_000).map(|_| one()).collect()
    }

    #[test]
    fn streams_are_varied_and_keep_to_their_ring() {
        let (kernel, user) = (mnemonics(Ring::Zero), mnemonics(Ring::Three));
        assert!(kernel.len() > 250 && user.len() > kernel.len(), "{} {}", kernel.len(), user.len());
        assert!(!user.contains(&Mnemonic::Cmpxchg8b));
        for here in [Mnemonic::Div, Mnemonic::Fxsave, Mnemonic::Mulsd, Mnemonic::Shld] {
            assert!(kernel.contains(&here), "{here:?}");
        }
        for (which, not_here) in [
            (&kernel, Mnemonic::Hlt),
            (&kernel, Mnemonic::Popfq),
            (&kernel, Mnemonic::Wrmsr),
            (&user, Mnemonic::Rdtsc),
            (&user, Mnemonic::Rdpmc),
            (&user, Mnemonic::Rdrand),
            (&user, Mnemonic::Jmp),
        ] {
            assert!(!which.contains(&not_here), "{not_here:?}");
        }
        assert!(user.contains(&Mnemonic::Hlt) && user.contains(&Mnemonic::Wrmsr));
    }

    #[test]
    fn nothing_in_memory_computes_flags() {
        let decode = |bytes: &[u8]| Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let rotations = [&[0xc0, 0x17, 0x49][..], &[0xc0, 0x17, 0x48], &[0xd1, 0x1f]];
        let exchanges = [&[0x0f, 0xc7, 0x0f][..], &[0x48, 0x0f, 0xc7, 0x0f]];
        for bytes in rotations.into_iter().chain(exchanges) {
            assert!(reads_flags(&decode(bytes)), "{bytes:x?}");
        }
        assert!(!reads_flags(&decode(&[0xc0, 0x07, 0x49])), "ROL reads none");
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let draw = || random_instruction(&mut Rng::with_seed(1), Ring::Zero, 0);
        assert_eq!(draw(), draw());
    }
}
