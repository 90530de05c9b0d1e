//! How fast guest code runs. Hypervisors that interpret guest code give themselves away here even
//! when they do it without a fault.

use ftvmm_machine::Cpu;

use super::host::Host;
use crate::micro_guest::{Findings, ProbeFailure, Ring, Stop, programs};

/// The checks that look at nothing but speed, ring 0 first.
pub const NAMES: [&str; 2] = ["speed (ring 0)", "speed (ring 3)"];

/// Below this, guest code is interpreted. Hardware runs the loop at more than 1,000 million
/// instructions a second, the lab (KVM inside software emulation, which translates) at 100 or more,
/// and an interpreter at about one; ten is a factor of ten from both of the neighbours.
pub const MIPS_MIN: f64 = 10.0;

/// Watchdog periods a speed measurement lasts: about 100 ms.
const KICKS: u32 = 4;
/// Instructions in a round of the counting loop: DEC and JNZ.
const INSTRUCTIONS_PER_ROUND: f64 = 2.0;
/// Port exits measured at most, and for how long at most.
const EXITS_MAX: usize = 2000;
const EXITS_TIME_MAX_NS: u64 = 300_000_000;

/// Runs a loop for a while and counts its rounds.
pub fn instructions(host: &Host, ring: Ring) -> Findings {
    // RCX starts at zero, so the loop is 2^64 rounds long.
    let mut guest = host.guest(programs::count_down(), ring)?;
    guest.run_to_kick(1)?;
    let (start_ns, rounds_before) = ((host.now_ns)(), guest.vcpu.regs()?.rcx.wrapping_neg());
    guest.run_to_kick(KICKS)?;
    let (end_ns, rounds_after) = ((host.now_ns)(), guest.vcpu.regs()?.rcx.wrapping_neg());
    let time_ns = end_ns - start_ns;
    let instructions = (rounds_after - rounds_before) as f64 * INSTRUCTIONS_PER_ROUND;
    let mips = instructions / time_ns as f64 * 1e3;
    if mips < MIPS_MIN {
        return Err(ProbeFailure::Slow { mips, mips_min: MIPS_MIN });
    }
    Ok(format!("{mips:.0} million instructions a second"))
}

/// The price of an exit, there and back.
pub fn port_exit(host: &Host) -> Findings {
    let mut guest = host.guest(programs::report_for_ever(), Ring::Kernel)?;
    guest.run_to(Stop::Report)?;
    let until_ns = (host.now_ns)() + EXITS_TIME_MAX_NS;
    let mut costs_ns = Vec::new();
    while costs_ns.len() < EXITS_MAX && (host.now_ns)() < until_ns {
        let start_ns = (host.now_ns)();
        guest.run_to(Stop::Report)?;
        costs_ns.push((host.now_ns)() - start_ns);
    }
    Ok(format!("{:.1} µs", median(&mut costs_ns) as f64 / 1e3))
}

/// The middle one, which a busy host does not distort; zero of nothing.
fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_does_not_care_for_outliers() {
        assert_eq!(median(&mut [900_000, 2, 1, 3, 2]), 2);
        assert_eq!(median(&mut []), 0);
    }
}
