//! The kernel of a bare guest: entry, handlers for all vectors, and the end.
//!
//! Every handler stirs what it can see of the interrupted code (address, flags, all registers) into
//! one hash and writes part of it into the scratch memory. So an interrupt or a fault that comes
//! one instruction early or late in a replay changes all that is computed from then on.
//!
//! A fault in a stream is repaired by going on with the next 16-byte slot; when the stream's
//! patience is at its end, or the fault is anywhere else, the stream is given up.

use fastrand::Rng;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::code::{Code, Section, label_here};
use super::layout::*;

/// Slots of a stream, in bytes.
pub const SLOT_BYTES: u64 = 16;
/// Vectors to which the interrupt controllers are set.
const FIRST_IRQ: i32 = 0x20;
const BEHIND_IRQS: i32 = 0x30;
/// Bytes pushed below the vector: all registers but RSP.
const SAVED_BYTES: i32 = 15 * 8;
/// The resume flag.
const RF: i32 = 1 << 16;
/// An odd constant that mixes well (that of Fibonacci hashing).
const MIXER: u64 = 0x9e37_79b9_7f4a_7c15;

const IA32_EFER: u32 = 0xc000_0080;
const EFER_SCE_NXE: i32 = 1 | 1 << 11;
const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;
const IA32_FMASK: u32 = 0xc000_0084;
const CR4_OSFXSR_OSXMMEXCPT: i32 = 3 << 9;
const CR0_AM: i32 = 1 << 18;
/// Exceptions that push an error code (AMD APM vol. 2 section 8.2).
const WITH_ERROR_CODE: &[u8] = &[8, 10, 11, 12, 13, 14, 17, 21, 29, 30];

const COM1: i32 = 0x3f8;
const RESET_PORT: i32 = 0x64;
const PULSE_RESET: i32 = 0xfe;

/// What a case decides once.
#[derive(Clone, Copy, Debug)]
pub struct Choices {
    /// Counts of the 8254 between two timer interrupts.
    pub timer_counts: u16,
    /// The interrupt controllers end interrupts themselves.
    pub auto_eoi: bool,
    /// IRQ 4 comes for what is typed.
    pub listens: bool,
}

impl Choices {
    /// 2000 to 100 interrupts a second.
    pub fn random(rng: &mut Rng) -> Self {
        Self { timer_counts: rng.u16(600..12_000), auto_eoi: rng.bool(), listens: rng.bool() }
    }
}

/// A field of the state by its absolute address.
pub fn state(offset: u64) -> AsmMemoryOperand {
    qword_ptr(STATE + offset)
}

/// Entry points the blocks need.
pub struct Kernel {
    /// Mixes all registers into the hash; to be called, keeps all but the flags.
    pub stir: u64,
    /// Where SYSCALL leads: the stream is over.
    pub syscall: u64,
    /// Handlers by vector.
    pub vectors: [u64; 256],
}

/// Adds handlers to the text.
///
/// # Errors
/// What cannot be encoded.
pub fn handlers(text: &mut Section, choices: Choices) -> Result<Kernel, IcedError> {
    let stir = text.assemble(|a| {
        a.pushfq()?;
        push_all(a)?;
        stir_pushed(a, &[SAVED_BYTES])?;
        pop_all(a)?;
        a.popfq()?;
        a.ret()
    })?;
    let common = text.assemble(|a| common(a, choices))?;
    let mut vectors = [0; 256];
    for (vector, place) in (0_u8..=255).zip(&mut vectors) {
        *place = text.assemble(|a| {
            if !WITH_ERROR_CODE.contains(&vector) {
                a.push(0)?;
            }
            a.push(i32::from(vector))?;
            a.jmp(common)
        })?;
    }
    // SYSCALL leaves the stack to the kernel.
    let syscall = text.assemble(|a| {
        a.mov(rsp, KERNEL_STACK)?;
        a.call(stir)?;
        a.jmp(state(field::AFTER))
    })?;
    Ok(Kernel { stir, syscall, vectors })
}

fn push_all(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for register in [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15] {
        a.push(register)?;
    }
    Ok(())
}

fn pop_all(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for register in [r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax] {
        a.pop(register)?;
    }
    Ok(())
}

/// Mixes the pushed registers and the words at these offsets from RSP into the hash, which is in
/// RAX afterwards.
fn stir_pushed(a: &mut CodeAssembler, more: &[i32]) -> Result<(), IcedError> {
    a.mov(rax, state(field::STIR))?;
    a.mov(rdx, MIXER)?;
    for &offset in more {
        a.xor(rax, qword_ptr(rsp + offset))?;
        a.imul_2(rax, rdx)?;
        a.rol(rax, 23)?;
    }
    a.mov(ecx, SAVED_BYTES / 8)?;
    let next = label_here(a)?;
    a.add(rax, qword_ptr(rsp + rcx * 8 - 8))?;
    a.imul_2(rax, rdx)?;
    a.rol(rax, 29)?;
    a.dec(ecx)?;
    a.jnz(next)?;
    a.mov(state(field::STIR), rax)
}

/// Where every vector ends up, with vector and error code on the stack.
fn common(a: &mut CodeAssembler, choices: Choices) -> Result<(), IcedError> {
    const VECTOR: i32 = SAVED_BYTES;
    const RIP: i32 = VECTOR + 16;
    const FLAGS: i32 = VECTOR + 32;
    let mut back = a.create_label();
    let mut interrupt = a.create_label();
    let mut give_up = a.create_label();
    let mut trap = a.create_label();
    let mut precise = a.create_label();

    push_all(a)?;
    a.cld()?;
    // RF should last for one instruction. QEMU 7.2's emulated CPU keeps it to the end of a
    // translated block, wherever a host interrupt has cut that, so who pushes it (INT n, an
    // interrupt) has another one from run to run.
    a.and(dword_ptr(rsp + FLAGS), !RF)?;
    a.mov(rbx, qword_ptr(rsp + VECTOR))?;
    a.cmp(ebx, FIRST_IRQ)?;
    a.jae(precise)?;
    // The arithmetic flags of a fault vary from run to run on QEMU 7.2's emulated CPU, which the
    // lab is made of: they are computed in place before an access that faults. TF goes too: it
    // would come again after each instruction.
    a.and(dword_ptr(rsp + FLAGS), !0x9d5)?;
    a.set_label(&mut precise)?;
    a.inc(qword_ptr(rbx * 8 + (STATE + field::COUNTS) as i32))?;
    stir_pushed(a, &[VECTOR, VECTOR + 8, RIP, FLAGS])?;
    a.mov(ecx, eax)?;
    a.and(ecx, (SCRATCH_BYTES / 4 - 8) as i32)?;
    a.mov(qword_ptr(rcx + SCRATCH as i32), rax)?;
    a.cmp(ebx, FIRST_IRQ)?;
    a.jb(trap)?;
    a.cmp(ebx, BEHIND_IRQS)?;
    a.jb(interrupt)?;
    a.jmp(give_up)?;

    a.set_label(&mut trap)?;
    a.mov(rax, cr2)?;
    a.xor(state(field::STIR), rax)?;
    for after_the_instruction in [1, 3, 4] {
        a.cmp(ebx, after_the_instruction)?;
        a.je(back)?;
    }
    a.dec(state(field::PATIENCE))?;
    a.js(give_up)?;
    a.mov(rax, qword_ptr(rsp + RIP))?;
    a.sub(rax, state(field::START))?;
    a.cmp(rax, state(field::LENGTH))?;
    a.jae(give_up)?;
    a.and(rax, -(SLOT_BYTES as i32))?;
    a.add(rax, SLOT_BYTES as i32)?;
    a.add(rax, state(field::START))?;
    a.mov(qword_ptr(rsp + RIP), rax)?;
    a.jmp(back)?;

    a.set_label(&mut interrupt)?;
    handle_interrupt(a, choices)?;

    a.set_label(&mut back)?;
    pop_all(a)?;
    a.add(rsp, 16)?;
    a.iretq()?;

    a.set_label(&mut give_up)?;
    a.mov(rsp, KERNEL_STACK)?;
    a.jmp(state(field::AFTER))
}

fn handle_interrupt(a: &mut CodeAssembler, choices: Choices) -> Result<(), IcedError> {
    let mut known = a.create_label();
    let mut silent = a.create_label();
    a.cmp(ebx, FIRST_IRQ)?;
    a.jne(known)?;
    a.inc(state(field::TICKS))?;
    a.set_label(&mut known)?;
    a.nop()?;
    if choices.listens {
        a.cmp(ebx, FIRST_IRQ + 4)?;
        a.jne(silent)?;
        let more = label_here(a)?;
        a.mov(edx, COM1 + 5)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.jz(silent)?;
        a.mov(edx, COM1)?;
        a.in_(al, dx)?;
        a.movzx(eax, al)?;
        a.add(state(field::STIR), rax)?;
        a.rol(state(field::STIR), 11)?;
        a.jmp(more)?;
    }
    a.set_label(&mut silent)?;
    // Each label wants an instruction of its own.
    a.nop()?;
    if !choices.auto_eoi {
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
    }
    Ok(())
}

/// Sets up the CPU and the devices; execution falls through into what follows.
///
/// # Errors
/// What cannot be encoded.
pub fn entry(text: &mut Section, kernel: &Kernel, choices: Choices) -> Result<u64, IcedError> {
    let icw4 = if choices.auto_eoi { 3 } else { 1 };
    let irqs = if choices.listens { 0xee } else { 0xfe };
    let [low, high] = choices.timer_counts.to_le_bytes();
    // ICW1 to ICW4 and masks of both 8259, rate generator of the 8254, receive interrupt of the
    // 8250.
    let writes: [(i32, u8); 15] = [
        (0x20, 0x11),
        (0x21, FIRST_IRQ as u8),
        (0x21, 4),
        (0x21, icw4),
        (0xa0, 0x11),
        (0xa1, FIRST_IRQ as u8 + 8),
        (0xa1, 2),
        (0xa1, icw4),
        (0xa1, 0xff),
        (0x43, 0x34),
        (0x40, low),
        (0x40, high),
        (COM1 + 1, u8::from(choices.listens)),
        (COM1 + 4, 0x0b),
        (0x21, irqs),
    ];
    text.assemble(|a| {
        a.mov(rsp, KERNEL_STACK)?;
        a.lgdt(byte_ptr(GDT_POINTER))?;
        a.lidt(byte_ptr(IDT_POINTER))?;
        for (number, value) in [
            (IA32_EFER, None),
            (IA32_STAR, Some(STAR)),
            (IA32_LSTAR, Some(kernel.syscall)),
            (IA32_FMASK, Some(0x4_7700)),
        ] {
            a.mov(ecx, number)?;
            a.rdmsr()?;
            match value {
                None => a.or(eax, EFER_SCE_NXE)?,
                Some(value) => {
                    a.mov(eax, value as u32)?;
                    a.mov(edx, (value >> 32) as u32)?;
                }
            }
            a.wrmsr()?;
        }
        a.mov(eax, PML4 as u32)?;
        a.mov(cr3, rax)?;
        a.mov(rax, cr4)?;
        a.or(eax, CR4_OSFXSR_OSXMMEXCPT)?;
        a.mov(cr4, rax)?;
        a.mov(rax, cr0)?;
        a.or(eax, CR0_AM)?;
        a.mov(cr0, rax)?;
        a.mov(eax, i32::from(TASK))?;
        a.ltr(ax)?;
        for (port, value) in writes {
            a.mov(edx, port)?;
            a.mov(al, i32::from(value))?;
            a.out(dx, al)?;
        }
        a.sti()
    })
}

/// Sums the scratch memory up, prints hash and sum, and switches the machine off.
///
/// # Errors
/// What cannot be encoded.
pub fn finish(code: &mut Code) -> Result<(), IcedError> {
    code.text.assemble(|a| {
        a.cli()?;
        a.xor(ebx, ebx)?;
        a.mov(esi, SCRATCH as u32)?;
        a.mov(ecx, (SCRATCH_BYTES / 8) as u32)?;
        let next = label_here(a)?;
        a.lodsq()?;
        a.rol(rbx, 5)?;
        a.xor(rbx, rax)?;
        a.dec(ecx)?;
        a.jnz(next)?;
        a.mov(edi, (STATE + field::TEXT) as u32)?;
        for value in [Some(field::STIR), None] {
            match value {
                Some(offset) => a.mov(rdx, state(offset))?,
                None => a.mov(rdx, rbx)?,
            }
            a.mov(ecx, 16)?;
            let digit = label_here(a)?;
            let mut decimal = a.create_label();
            a.rol(rdx, 4)?;
            a.mov(eax, edx)?;
            a.and(eax, 15)?;
            a.cmp(al, 10)?;
            a.jb(decimal)?;
            a.add(al, i32::from(b'a' - b'0' - 10))?;
            a.set_label(&mut decimal)?;
            a.add(al, i32::from(b'0'))?;
            a.stosb()?;
            a.dec(ecx)?;
            a.jnz(digit)?;
        }
        a.mov(al, i32::from(b'\n'))?;
        a.stosb()?;
        a.mov(esi, (STATE + field::TEXT) as u32)?;
        a.mov(edx, COM1)?;
        a.mov(ecx, 33)?;
        a.rep().outsb()?;
        a.mov(al, PULSE_RESET)?;
        a.out(RESET_PORT, al)?;
        let forever = label_here(a)?;
        a.hlt()?;
        a.jmp(forever)
    })?;
    Ok(())
}
