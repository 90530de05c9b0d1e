//! The kinds of blocks a bare guest is made of.

use fastrand::Rng;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::Builder;
use super::code::label_here;
use super::instruction::{Ring, pick};
use super::kernel::state;
use super::layout::*;
use super::paging::games;

/// A kind of block, how often it comes up, and how it is added.
pub struct Kind {
    /// What it is called in listings.
    pub name: &'static str,
    /// Tickets in the draw.
    pub weight: usize,
    /// Adds one to the guest.
    pub add: fn(&mut Builder, &mut Rng) -> Result<(), IcedError>,
}

const fn kind(
    name: &'static str,
    weight: usize,
    add: fn(&mut Builder, &mut Rng) -> Result<(), IcedError>,
) -> Kind {
    Kind { name, weight, add }
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    kind("ring-0 stream", 8, |b, rng| stream(b, rng, Ring::Zero)),
    kind("ring-3 stream", 8, |b, rng| stream(b, rng, Ring::Three)),
    kind("self-modifying code", 4, self_modifying),
    kind("string I/O", 3, string_io),
    kind("string moves", 3, string_moves),
    kind("page tables", 5, games),
    kind("halt", 3, halt),
    kind("compute", 3, compute),
    kind("ports", 4, ports),
    kind("flags", 4, flags),
    kind("poll", 1, poll),
    kind("timer", 1, timer),
];

/// Rounds of seven instructions; the emulated host runs some 300 million instructions a second, so
/// up to 50 ms.
const COMPUTE_ROUNDS_MAX: &[u32] = &[100_000, 500_000, 2_000_000];
const COM1: u32 = 0x3f8;

fn stream(b: &mut Builder, rng: &mut Rng, ring: Ring) -> Result<(), IcedError> {
    let stream = b.random_stream(rng, ring)?;
    for _ in 0..rng.u8(1..4) {
        b.run(rng, &stream)?;
    }
    Ok(())
}

/// A function at a random place is written, called, changed and called again; an alias of its page
/// takes some of the changes.
fn self_modifying(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    // mov eax, imm32; xor ebx, imm32; rol rbx, imm8; add rbx, rax; ret
    const FUNCTION: [u8; 18] =
        [0xb8, 0, 0, 0, 0, 0x81, 0xf3, 0, 0, 0, 0, 0x48, 0xc1, 0xc3, 7, 0x48, 0x01, 0xc3];
    const RETURN: u8 = 0xc3;
    const IMMEDIATES: [u64; 3] = [1, 7, 14];
    let stir = b.kernel.stir;
    for _ in 0..rng.u8(1..6) {
        let page = SMC + 0x1000 * rng.u64(1..32);
        let at = if rng.bool() { page - rng.u64(1..18) } else { page + rng.u64(0..0xf00) };
        let changed = at + *pick(rng, &IMMEDIATES);
        let (rounds, interruptible) = (rng.u32(1..60), rng.bool());
        b.code.text.assemble(|a| {
            for (offset, byte) in FUNCTION.iter().chain([&RETURN]).enumerate() {
                a.mov(byte_ptr(at + offset as u64), i32::from(*byte as i8))?;
            }
            if interruptible {
                a.sti()?
            } else {
                a.cli()?
            }
            a.mov(rbx, state(field::STIR))?;
            a.mov(ecx, rounds)?;
            let next = label_here(a)?;
            a.mov(rax, at)?;
            a.call(rax)?;
            a.mov(byte_ptr(changed), bl)?;
            // The next instruction but one changes, too.
            let mut patched = a.create_label();
            a.lea(rdi, ptr(patched))?;
            a.mov(dword_ptr(rdi + 2), ebx)?;
            a.jmp(patched)?;
            a.set_label(&mut patched)?;
            a.xor(esi, 0x1234_5678)?;
            a.add(rbx, rsi)?;
            a.dec(ecx)?;
            a.jnz(next)?;
            a.call(stir)
        })?;
    }
    Ok(())
}

fn string_io(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    const PORTS_OUT: &[u32] = &[0x80, COM1 + 7, 0x2f8];
    const PORTS_IN: &[u32] = &[0x80, COM1 + 7, COM1 + 5, 0x71, 0x40, 0x61, 0x2f8];
    let stir = b.kernel.stir;
    for _ in 0..rng.u8(1..5) {
        let longest = *pick(rng, &[4, 40, 400, 3000]);
        let count = rng.u32(1..longest);
        let address = SCRATCH + rng.u64(0x3000..SCRATCH_BYTES - 0x4000);
        let (outwards, backwards, width) = (rng.bool(), rng.u8(0..6) == 0, rng.u8(0..3));
        let port = *pick(rng, if outwards { PORTS_OUT } else { PORTS_IN });
        // A port of a device takes its bytes one by one: 75 us each in the lab.
        let count = if port == 0x80 || outwards { count } else { count.min(60) };
        b.code.text.assemble(|a| {
            if rng.bool() {
                a.sti()?
            } else {
                a.cli()?
            }
            a.mov(edx, port)?;
            a.mov(ecx, count)?;
            a.mov(esi, address as u32)?;
            a.mov(edi, address as u32)?;
            if backwards {
                a.std()?;
            }
            let a = a.rep();
            match (outwards, width) {
                (true, 0) => a.outsb()?,
                (true, 1) => a.outsw()?,
                (true, _) => a.outsd()?,
                (false, 0) => a.insb()?,
                (false, 1) => a.insw()?,
                (false, _) => a.insd()?,
            }
            a.cld()?;
            a.mov(rbx, qword_ptr(address))?;
            a.call(stir)
        })?;
    }
    Ok(())
}

fn string_moves(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    let stir = b.kernel.stir;
    for _ in 0..rng.u8(1..8) {
        let bytes = rng.u32(1..0x6000);
        let mut place = || FRAMES + rng.u64(0..0x8000);
        let (from, to) = (place(), place());
        let (what, backwards) = (rng.u8(0..6), rng.u8(0..5) == 0);
        b.code.text.assemble(|a| {
            a.mov(rax, state(field::STIR))?;
            a.mov(esi, from as u32)?;
            a.mov(edi, to as u32)?;
            a.mov(ecx, bytes / 8)?;
            if backwards {
                a.add(rsi, bytes as i32)?;
                a.add(rdi, bytes as i32)?;
                a.std()?;
            }
            let a = a.rep();
            match what {
                0 => a.movsb()?,
                1 => a.movsq()?,
                2 => a.stosq()?,
                3 => a.stosw()?,
                4 => a.lodsb()?,
                _ => a.cmpsb()?,
            }
            a.cld()?;
            a.call(stir)
        })?;
    }
    Ok(())
}

fn halt(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    let (times, stir) = (rng.u32(1..5), b.kernel.stir);
    b.code.text.assemble(|a| {
        a.mov(ebx, times)?;
        let next = label_here(a)?;
        a.sti()?;
        a.hlt()?;
        a.dec(ebx)?;
        a.jnz(next)?;
        a.call(stir)
    })?;
    Ok(())
}

/// Computes for long without an exit, with interrupts enabled or not.
fn compute(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    let longest = *pick(rng, COMPUTE_ROUNDS_MAX);
    let rounds = rng.u32(longest / 4..longest);
    let (interruptible, writes, stir) = (rng.bool(), rng.bool(), b.kernel.stir);
    b.code.text.assemble(|a| {
        if interruptible {
            a.sti()?
        } else {
            a.cli()?
        }
        a.mov(rax, state(field::STIR))?;
        a.mov(r15, SCRATCH)?;
        a.mov(ecx, rounds)?;
        let next = label_here(a)?;
        a.mov(edx, eax)?;
        a.and(edx, (SCRATCH_BYTES - 8) as i32)?;
        a.add(rax, qword_ptr(r15 + rdx))?;
        a.rol(rax, 17)?;
        if writes {
            a.xor(qword_ptr(r15 + rdx), rcx)?;
        }
        a.dec(ecx)?;
        a.jnz(next)?;
        a.call(stir)
    })?;
    Ok(())
}

/// Clocks and interrupt controllers are read into registers.
fn ports(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    const READS: &[u32] =
        &[0x40, 0x41, 0x42, 0x61, 0x71, 0x20, 0x21, 0xa0, 0xa1, COM1 + 2, COM1 + 5, 0x64, 0x4d0];
    let (times, stir) = (rng.u8(2..30), b.kernel.stir);
    b.code.text.assemble(|a| {
        if rng.bool() {
            a.sti()?
        } else {
            a.cli()?
        }
        for _ in 0..times {
            match rng.u8(0..8) {
                // Latch counter 0; set the index of the RTC; choose IRR or ISR.
                0 => latch(a, 0x43, 0)?,
                1 => latch(a, 0x70, rng.u32(0..14))?,
                2 => latch(a, 0x20, 0x0a | rng.u32(0..2))?,
                _ => {
                    a.mov(edx, *pick(rng, READS))?;
                    a.in_(al, dx)?;
                    a.movzx(eax, al)?;
                    a.add(rbx, rax)?;
                    a.rol(rbx, 8)?;
                }
            }
        }
        a.call(stir)
    })?;
    Ok(())
}

fn latch(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

/// The interrupt flag in all its ways, with exits beside its shadow. None is inside: QEMU's
/// emulated VMRUN does not load the shadow (VMCB offset 68h), so a host interrupt there loses it.
fn flags(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    let (times, stir) = (rng.u8(4..40), b.kernel.stir);
    b.code.text.assemble(|a| {
        a.sti()?;
        for _ in 0..times {
            match rng.u8(0..10) {
                0 => a.cli()?,
                1 => {
                    a.sti()?;
                    a.nop()?;
                }
                2 => a.in_(al, 0x80)?,
                3 => a.nop()?,
                4 => {
                    a.pushfq()?;
                    a.pop(rcx)?;
                    a.add(rbx, rcx)?;
                }
                5 => {
                    a.pushfq()?;
                    a.cli()?;
                    a.out(0x80, al)?;
                    a.popfq()?;
                }
                6 => {
                    a.mov(eax, ss)?;
                    a.mov(ss, eax)?;
                    a.nop()?;
                    a.in_(al, 0x80)?;
                }
                7 => {
                    a.pushfq()?;
                    a.xor(qword_ptr(rsp), 0x200)?;
                    a.popfq()?;
                }
                8 => {
                    a.sti()?;
                    a.nop()?;
                    a.out(0x80, al)?;
                    a.cli()?;
                }
                _ => a.rol(rbx, 3)?,
            }
        }
        a.sti()?;
        a.call(stir)
    })?;
    Ok(())
}

/// Asks a port until the next tick.
fn poll(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    let (port, stir) = (*pick(rng, &[0x80_u32, 0x61, 0x40]), b.kernel.stir);
    b.code.text.assemble(|a| {
        a.sti()?;
        a.mov(rbx, state(field::TICKS))?;
        a.mov(edx, port)?;
        let next = label_here(a)?;
        a.in_(al, dx)?;
        a.inc(rcx)?;
        a.cmp(rbx, state(field::TICKS))?;
        a.je(next)?;
        a.call(stir)
    })?;
    Ok(())
}

/// Another rate or mode of the timer; it goes on ticking.
fn timer(b: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    let counts = rng.u16(600..12_000);
    let control = *pick(rng, &[0x34, 0x36]);
    b.code.text.assemble(|a| {
        let [low, high] = counts.to_le_bytes().map(u32::from);
        for (port, value) in [(0x43, control), (0x40, low), (0x40, high)] {
            latch(a, port, value)?;
        }
        Ok(())
    })?;
    Ok(())
}
