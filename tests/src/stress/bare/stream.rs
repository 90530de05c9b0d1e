//! Streams of random instructions in ring 0 and ring 3.
//!
//! Each instruction has a slot of 16 bytes, so that a handler knows where the next one begins.
//! Slots do not begin at multiples of 16, so instructions cross cache lines and pages. A stream
//! ends by itself, by a software interrupt or SYSCALL in ring 3, or is given up by the fault
//! handler.

use fastrand::Rng;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::Builder;
use super::instruction::{Ring, pick, random_instruction};
use super::kernel::{SLOT_BYTES, state};
use super::layout::*;

/// Registers a stream starts with; R15 has the base of the scratch memory and RSP a stack.
const REGISTERS: [AsmRegister64; 14] =
    [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14];
const EDGES: &[u64] = &[
    0,
    1,
    2,
    7,
    31,
    63,
    64,
    0x7f,
    0x80,
    0xff,
    0x8000,
    0x7fff_ffff,
    0x8000_0000,
    u64::MAX,
    1 << 63,
];
/// Most faults of a stream; each costs a page of handler.
const PATIENCE: i32 = 60;
/// Offset of a stream's loop counter in the state.
const ROUNDS: u64 = 0x30;
/// Offset of a word in the state for MXCSR and the x87 control word.
const CONTROL_WORDS: u64 = 0x38;
const MXCSR_MASKED: u32 = 0x1f80;
const X87_MASKED: u32 = 0x37f;
const RDTSC: &[u8] = &[0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];

/// One slot: at most 16 bytes.
pub type Slot = Vec<u8>;

/// A stream that lies where it is run.
pub struct Stream {
    ring: Ring,
    start: u64,
    slots: u64,
}

impl Builder {
    fn section(&mut self, ring: Ring) -> &mut super::code::Section {
        match ring {
            Ring::Zero => &mut self.code.streams,
            Ring::Three => &mut self.code.user,
        }
    }

    /// Lays a stream down; `slot` is asked for each by its number and address.
    pub fn lay(
        &mut self,
        rng: &mut Rng,
        ring: Ring,
        count: u64,
        mut slot: impl FnMut(&mut Rng, u64, u64) -> Slot,
    ) -> Result<Stream, IcedError> {
        let shift = rng.usize(0..16);
        let section = self.section(ring);
        section.add(&nops(shift));
        let start = section.here();
        for number in 0..count {
            let mut bytes = slot(rng, number, section.here());
            bytes.extend(nops(SLOT_BYTES as usize - bytes.len()));
            section.add(&bytes);
        }
        let by_syscall = rng.bool();
        let rounds = rng.bool();
        section.assemble(|a| match ring {
            Ring::Three if by_syscall => a.syscall(),
            Ring::Three => a.int(i32::from(LEAVE)),
            Ring::Zero => {
                if rounds {
                    a.dec(state(ROUNDS))?;
                    a.jg(start)?;
                }
                a.jmp(state(field::AFTER))
            }
        })?;
        // Whoever gets here goes on as at the end.
        section.add(&nops(SLOT_BYTES as usize));
        section.assemble(|a| match ring {
            Ring::Three => a.int(i32::from(LEAVE)),
            Ring::Zero => a.jmp(state(field::AFTER)),
        })?;
        Ok(Stream { ring, start, slots: count + 1 })
    }

    /// Adds to the text what runs `stream`, and stirs the registers it leaves.
    pub fn run(&mut self, rng: &mut Rng, stream: &Stream) -> Result<(), IcedError> {
        let Stream { ring, start, slots } = *stream;
        let length = slots * SLOT_BYTES;
        let rounds = rng.i32(1..20);
        let (mxcsr, x87) = control_words(rng);
        let interruptible = rng.u8(0..4) > 0;
        let stir = self.kernel.stir;
        self.code.text.assemble(|a| {
            let mut after = a.create_label();
            for (offset, value) in [
                (field::START, start as i32),
                (field::LENGTH, length as i32),
                (field::PATIENCE, PATIENCE),
                (ROUNDS, rounds),
            ] {
                a.mov(state(offset), value)?;
            }
            a.lea(rax, ptr(after))?;
            a.mov(state(field::AFTER), rax)?;
            a.fninit()?;
            a.mov(dword_ptr(STATE + CONTROL_WORDS), mxcsr as i32)?;
            a.mov(dword_ptr(STATE + CONTROL_WORDS + 4), x87 as i32)?;
            a.ldmxcsr(dword_ptr(STATE + CONTROL_WORDS))?;
            a.fldcw(word_ptr(STATE + CONTROL_WORDS + 4))?;
            load_registers(a, rng)?;
            match ring {
                Ring::Zero => {
                    if interruptible {
                        a.sti()?
                    } else {
                        a.cli()?
                    }
                    a.jmp(start)?;
                }
                Ring::Three => {
                    let flags = if interruptible { 0x202 } else { 2 };
                    // Arithmetic flags.
                    let flags = flags | rng.i32(0..0x1000) & 0x8d5;
                    a.push(i32::from(USER_DATA))?;
                    a.push(USER_STACK as i32)?;
                    a.push(flags)?;
                    a.push(i32::from(USER_CODE))?;
                    a.push(start as i32)?;
                    a.iretq()?;
                }
            }
            a.set_label(&mut after)?;
            a.mov(rsp, KERNEL_STACK)?;
            a.cld()?;
            if interruptible {
                a.sti()?
            } else {
                a.cli()?
            }
            a.call(stir)
        })?;
        Ok(())
    }

    /// A stream of random instructions.
    pub fn random_stream(&mut self, rng: &mut Rng, ring: Ring) -> Result<Stream, IcedError> {
        let with_rdtsc = match ring {
            Ring::Zero => self.features.kernel_rdtsc,
            Ring::Three => self.features.user_rdtsc,
        } && rng.u8(0..3) == 0;
        let count = rng.u64(8..250);
        self.lay(rng, ring, count, |rng, number, address| match rng.u8(0..100) {
            0..8 => forward_branch(rng, count - number),
            8..10 if with_rdtsc => pick(rng, &[RDTSC, RDTSCP]).to_vec(),
            10..12 if ring == Ring::Three => vec![0x9d], // POPFQ: TF, NT, AC
            _ => random_instruction(rng, ring, address),
        })
    }
}

/// JCC over some slots; `left` are the slots from this one on.
fn forward_branch(rng: &mut Rng, left: u64) -> Slot {
    let over = rng.u64(1..=left.min(8));
    let distance = (over * SLOT_BYTES - 6) as u32;
    let mut bytes = vec![0x0f, 0x80 | rng.u8(0..16)];
    bytes.extend(distance.to_le_bytes());
    bytes
}

/// MXCSR and x87 control word; mostly as after a reset.
fn control_words(rng: &mut Rng) -> (u32, u32) {
    match rng.u8(0..4) {
        0 => (u32::from(rng.u16(..)), X87_MASKED),
        1 => (MXCSR_MASKED, rng.u32(0..0x1000) | 0x40),
        _ => (MXCSR_MASKED, X87_MASKED),
    }
}

fn load_registers(a: &mut CodeAssembler, rng: &mut Rng) -> Result<(), IcedError> {
    const SSE: [AsmRegisterXmm; 8] = [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7];
    for register in SSE {
        a.movups(register, xmmword_ptr(SCRATCH + rng.u64(0..SCRATCH_BYTES / 2)))?;
    }
    for register in REGISTERS {
        match rng.u8(0..5) {
            0 => a.mov(register, *pick(rng, EDGES))?,
            1 => a.mov(register, rng.u64(..))?,
            2 => a.mov(register, SCRATCH + rng.u64(0..SCRATCH_BYTES))?,
            3 => a.mov(register, qword_ptr(SCRATCH + rng.u64(0..SCRATCH_BYTES - 8)))?,
            _ => a.mov(register, state(field::STIR))?,
        }
    }
    a.mov(r15, SCRATCH)
}

/// `count` bytes of NOP.
pub fn nops(count: usize) -> Vec<u8> {
    vec![0x90; count]
}
