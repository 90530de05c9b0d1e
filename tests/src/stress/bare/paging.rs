//! Page-table games: pages of a window are mapped, moved, protected and used, and their entries
//! read back.
//!
//! Every change of an entry is followed by INVLPG before its page is used: what a stale translation
//! shows is not defined by the architecture.

use fastrand::Rng;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::Builder;
use super::instruction::{Ring, pick};
use super::kernel::SLOT_BYTES;
use super::layout::*;
use super::stream::Slot;

/// Port of the 8250's scratch register.
const SCRATCH_PORT: u32 = 0x3ff;

/// Assembles one slot.
fn one(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Result<Slot, IcedError> {
    let mut assembler = CodeAssembler::new(64)?;
    write(&mut assembler)?;
    assembler.assemble(0)
}

/// An entry that maps some frame somehow, or nothing.
fn entry(rng: &mut Rng) -> u64 {
    let frame = FRAMES + 0x1000 * rng.u64(0..GAME_PAGES);
    // Present, writable, user; accessed and dirty as the software likes.
    let flags = rng.u64(0..8) | (rng.u64(0..4) << 5) | 1;
    let no_execute = if rng.bool() { NO_EXECUTE } else { 0 };
    if rng.u8(0..5) == 0 { frame } else { frame | flags | no_execute }
}

fn game(rng: &mut Rng) -> Result<Vec<Slot>, IcedError> {
    let page = rng.u64(0..GAME_PAGES);
    let (window, place) = (GAMES + 0x1000 * page, GAMES_PT + 8 * page);
    // Near the end of a page an access reaches into the next.
    let within = *pick(rng, &[0, 8, 0x7f8, 0xff8, 0xffc]);
    let used = window + within;
    let value = entry(rng);
    Ok(match rng.u8(0..16) {
        0..4 => vec![
            one(|a| a.mov(rax, value))?,
            one(|a| a.mov(qword_ptr(place), rax))?,
            one(|a| a.invlpg(byte_ptr(window)))?,
        ],
        4 => vec![
            one(|a| a.and(byte_ptr(place), 0x9f - 0x100))?,
            one(|a| a.invlpg(byte_ptr(window)))?,
        ],
        5 | 6 => vec![one(|a| a.add(rbx, qword_ptr(place)))?, one(|a| a.rol(rbx, 9))?],
        7..10 => vec![one(|a| a.add(rbx, qword_ptr(used)))?],
        10..12 => {
            vec![one(|a| a.mov(qword_ptr(used), rbx))?, one(|a| a.add(dword_ptr(used), ebx))?]
        }
        12 => vec![
            // RET at the end of the page; called only where it really stands.
            one(|a| a.mov(byte_ptr(window + 0xfff), 0xc3 - 0x100))?,
            one(|a| a.xor(eax, eax))?,
            one(|a| a.mov(al, byte_ptr(window + 0xfff)))?,
            one(|a| {
                a.cmp(al, 0xc3 - 0x100)?;
                // Over the rest of this slot and the next.
                a.jne(2 * SLOT_BYTES)
            })?,
            one(|a| a.call(qword_ptr(CALLEES + 8 * page)))?,
        ],
        13 => {
            let toggle = rng.bool();
            vec![
                one(|a| a.mov(rax, cr0))?,
                one(|a| if toggle { a.btc(eax, 16) } else { a.bts(eax, 16) })?,
                one(|a| a.mov(cr0, rax))?,
            ]
        }
        14 => vec![one(|a| a.mov(rax, cr3))?, one(|a| a.mov(cr3, rax))?],
        _ => {
            let (count, back) = (rng.u32(1..40), rng.u64(1..40));
            vec![
                one(|a| a.mov(edx, SCRATCH_PORT))?,
                one(|a| a.mov(ecx, count))?,
                one(|a| a.mov(edi, (window + 0x1000 - back) as u32))?,
                if rng.bool() { one(|a| a.rep().insb())? } else { one(|a| a.rep().stosb())? },
            ]
        }
    })
}

/// Where the last byte's address of each page of the window lies, for calls.
const CALLEES: u64 = STATE + 0xe00;

/// Adds a round of games.
pub fn games(builder: &mut Builder, rng: &mut Rng) -> Result<(), IcedError> {
    let mut slots = Vec::new();
    for _ in 0..rng.usize(10..80) {
        slots.extend(game(rng)?);
    }
    let count = slots.len() as u64;
    let mut slots = slots.into_iter();
    let stream = builder.lay(rng, Ring::Zero, count, |_, _, _| slots.next().unwrap_or_default())?;
    builder.code.text.assemble(|a| {
        for page in 0..GAME_PAGES {
            a.mov(qword_ptr(CALLEES + 8 * page), (GAMES + 0x1000 * page + 0xfff) as i32)?;
        }
        Ok(())
    })?;
    builder.run(rng, &stream)?;
    builder.code.text.assemble(|a| {
        a.mov(rax, cr0)?;
        a.bts(eax, 16)?;
        a.mov(cr0, rax)
    })?;
    Ok(())
}
