//! The property everything rests on: the same program with the same answers at the same exits is in
//! the same state at every exit, whatever the host's signals do in between.

use ftvmm_machine::Cpu;
use ftvmm_machine::cpu_state::CpuState;

use super::host::Host;
use crate::micro_guest::programs::{self, layout};
use crate::micro_guest::{Findings, ProbeFailure, Ring, Stop, same_bytes};

/// In each ring, so fifty in all.
const RUNS: u32 = 25;
/// Pairs of a port read and a port write in each run.
const ROUNDS: u32 = 20;
/// Rounds in which an interrupt is injected at the port read.
const INTERRUPTED_ROUNDS: [u32; 2] = [7, 12];

/// Everything that must repeat.
struct Trace {
    exits: Vec<CpuState>,
    memory: Vec<u8>,
}

/// Runs the program again and again and compares each run with the first.
pub fn repeats(host: &Host, ring: Ring) -> Findings {
    let first = run(host, ring)?;
    for number in 2..=RUNS {
        compare(number, &first, &run(host, ring)?)?;
    }
    Ok(format!("{RUNS} runs: same registers at {} exits, same memory", first.exits.len()))
}

fn run(host: &Host, ring: Ring) -> Result<Trace, ProbeFailure> {
    let mut guest = host.guest(programs::mix(), ring)?;
    let mut exits = Vec::new();
    for round in 0..ROUNDS {
        guest.run_to(Stop::Ask)?;
        exits.push(CpuState::of(&guest.vcpu.state()?));
        guest.answer(round.wrapping_mul(0x9e37_79b9));
        if INTERRUPTED_ROUNDS.contains(&round) {
            guest.vcpu.inject(layout::INTERRUPT_VECTOR)?;
        }
        guest.run_to(Stop::Report)?;
        exits.push(CpuState::of(&guest.vcpu.state()?));
    }
    let memory = guest.read(0, layout::MEMORY_BYTES as usize)?;
    Ok(Trace { exits, memory })
}

fn compare(number: u32, first: &Trace, other: &Trace) -> Result<(), ProbeFailure> {
    for (ordinal, (expected, got)) in first.exits.iter().zip(&other.exits).enumerate() {
        for ((part, expected), (_, got)) in expected.parts().zip(got.parts()) {
            same_bytes(
                |at| format!("{part}, byte {at}, at exit {ordinal} of run {number}"),
                expected,
                got,
            )?;
        }
    }
    same_bytes(|at| format!("memory at {at:#x} after run {number}"), &first.memory, &other.memory)
}
