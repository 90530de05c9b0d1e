//! The timer of a PC: an Intel 8254 (data sheet 231164, "8254 Programmable Interval Timer") and the
//! bits of port 0x61 that belong to it (IBM PC/AT Technical Reference, "system control port B").
//!
//! | port | name | access | reset | meaning |
//! |------|------|--------|-------|---------|
//! | 0x40..=0x42 | counter 0..2 | rw | no count | count registers through the access mode's byte flip-flop |
//! | 0x43 | control word | w | | mode, counter latch, read-back command |
//! | 0x61 | system control B | rw | 0 | 0 gate of counter 2, 1 speaker, 4 refresh toggle (r), 5 OUT2 (r) |
//!
//! Time is never accumulated: a counter remembers the tick at which it was loaded, and everything
//! it shows is computed from that tick and the current one. Tick k of the 1 193 182 Hz clock is
//! nanosecond ceil(k·10⁹/1 193 182), so no rounding error grows.
//!
//! **Ticks are not lost.** OUT0's rising edge is IRQ0. An edge that comes due while the last one is
//! still requested or in service is owed, and raised when that one has been ended, at most
//! [`OWED_TICKS_MAX`] of them (more are counted as lost): a guest that counts IRQ0 keeps time
//! although it was not scheduled. Programming counter 0 anew forgets what is owed. Whether the
//! guest masks IRQ0 does not matter: Linux masks it around every tick. A tick the guest has not
//! taken is owed again while any other interrupt waits.
//!
//! Not emulated: BCD counting (Linux never asks for it; the bit is kept for read-back, counting
//! stays binary). A new count in modes 2 and 3 is taken at the end of the full period (mode 3: the
//! chip does so at the half). Counters 0 and 1 have their gates tied high, as in a PC.
//!
//! From outside: time, through [`Pit::advance`].

use serde::{Deserialize, Serialize};

use crate::pit_counter::{Counter, PitCounterState};
use crate::state::InvalidState;

/// The frequency of the counters' clock input.
pub const PIT_HZ: u64 = 1_193_182;
/// Most IRQ0 edges that are owed at a time: ten seconds at 1000 Hz.
pub const OWED_TICKS_MAX: u32 = 10_000;
const NS_PER_S: u64 = 1_000_000_000;
/// Half a period of the refresh toggle in port 0x61 bit 4 (the PC/AT refreshes about every 15.09
/// µs).
const REFRESH_TOGGLE_NS: u64 = 15_085;

const PORT_B_GATE2: u8 = 0x01;
const PORT_B_WRITABLE: u8 = 0x0f;

/// Number of clock ticks that have passed at `now_ns`; exact.
pub(crate) fn ticks_at(now_ns: u64) -> u64 {
    let (seconds, rest_ns) = (now_ns / NS_PER_S, now_ns % NS_PER_S);
    seconds * PIT_HZ + rest_ns * PIT_HZ / NS_PER_S
}

/// The first nanosecond at which `tick` ticks have passed; exact. `None` beyond the end of guest
/// time.
fn ns_of_tick(tick: u64) -> Option<u64> {
    let (seconds, rest) = (tick / PIT_HZ, tick % PIT_HZ);
    seconds.checked_mul(NS_PER_S)?.checked_add((rest * NS_PER_S).div_ceil(PIT_HZ))
}

/// What the timer remembers; plain data, checked when it becomes a [`Pit`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    now_ns: u64,
    counters: [PitCounterState; 3],
    port_b: u8,
    owed_ticks: u32,
    lost_ticks: u64,
}

/// The 8254 and port 0x61.
#[derive(Debug)]
pub(crate) struct Pit {
    now_ns: u64,
    now_tick: u64,
    counters: [Counter; 3],
    port_b: u8,
    owed_ticks: u32,
    lost_ticks: u64,
}

impl TryFrom<PitState> for Pit {
    type Error = InvalidState;

    fn try_from(state: PitState) -> Result<Self, InvalidState> {
        let PitState { now_ns, counters, port_b, owed_ticks, lost_ticks } = state;
        let now_tick = ticks_at(now_ns);
        InvalidState::check(port_b & !PORT_B_WRITABLE == 0, "pit.port_b")?;
        InvalidState::check(owed_ticks <= OWED_TICKS_MAX, "pit.owed_ticks")?;
        let [c0, c1, c2] = counters;
        let gates = [true, true, port_b & PORT_B_GATE2 != 0];
        let counters = [
            Counter::restore(c0, now_tick, gates[0])?,
            Counter::restore(c1, now_tick, gates[1])?,
            Counter::restore(c2, now_tick, gates[2])?,
        ];
        Ok(Pit { now_ns, now_tick, counters, port_b, owed_ticks, lost_ticks })
    }
}

impl Pit {
    pub(crate) fn new() -> Self {
        Pit {
            now_ns: 0,
            now_tick: 0,
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            port_b: 0,
            owed_ticks: 0,
            lost_ticks: 0,
        }
    }

    pub(crate) fn save(&self) -> PitState {
        let Pit { now_ns, now_tick: _, counters, port_b, owed_ticks, lost_ticks } = self;
        PitState {
            now_ns: *now_ns,
            counters: counters.each_ref().map(Counter::save),
            port_b: *port_b,
            owed_ticks: *owed_ticks,
            lost_ticks: *lost_ticks,
        }
    }

    /// Guest time moves on to `now_ns`; the caller guarantees that it never goes back.
    pub(crate) fn advance(&mut self, now_ns: u64) {
        let tick = ticks_at(now_ns);
        let [edges, ..] = self.counters.each_mut().map(|c| c.advance(self.now_tick, tick));
        self.now_ns = now_ns;
        self.now_tick = tick;
        self.owe(edges);
    }

    fn owe(&mut self, edges: u64) {
        let total = edges.saturating_add(u64::from(self.owed_ticks));
        let kept = total.min(u64::from(OWED_TICKS_MAX));
        self.lost_ticks = self.lost_ticks.saturating_add(total - kept);
        self.owed_ticks = kept as u32;
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Takes one owed edge of IRQ0, if there is one.
    pub(crate) fn take_owed_tick(&mut self) -> bool {
        let owed = self.owed_ticks > 0;
        self.owed_ticks -= u32::from(owed);
        owed
    }

    /// An edge the guest has not seen is owed again.
    pub(crate) fn take_back_tick(&mut self) {
        self.owe(1);
    }

    pub(crate) fn owes_tick(&self) -> bool {
        self.owed_ticks > 0
    }

    /// IRQ0 edges that were dropped because [`OWED_TICKS_MAX`] were owed already.
    pub(crate) fn lost_ticks(&self) -> u64 {
        self.lost_ticks
    }

    /// Guest time of the next rising edge of OUT0.
    pub(crate) fn next_edge_ns(&self) -> Option<u64> {
        ns_of_tick(self.counters[0].next_rising_edge(self.now_tick)?)
    }

    pub(crate) fn read_counter(&mut self, index: usize) -> u8 {
        self.counters[index].read(self.now_tick)
    }

    pub(crate) fn write_counter(&mut self, index: usize, value: u8) {
        let out0 = self.counters[0].out(self.now_tick);
        if self.counters[index].write(value, self.now_tick) && index == 0 {
            self.owed_ticks = 0;
        }
        self.note_out0_edge(out0);
    }

    pub(crate) fn write_control(&mut self, value: u8) {
        let select = usize::from(value >> 6);
        if select == 3 {
            return self.read_back(value);
        }
        if value & 0x30 == 0 {
            return self.counters[select].latch_count(self.now_tick);
        }
        let out0 = self.counters[0].out(self.now_tick);
        self.counters[select].program(value);
        if select == 0 {
            self.owed_ticks = 0;
        }
        self.note_out0_edge(out0);
    }

    /// Data sheet, "Read-Back Command": bits 5 and 4 are active low.
    fn read_back(&mut self, value: u8) {
        for (index, counter) in self.counters.iter_mut().enumerate() {
            if value >> (index + 1) & 1 == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch_count(self.now_tick);
            }
            if value & 0x10 == 0 {
                counter.latch_status(self.now_tick);
            }
        }
    }

    /// Writing a control word or count can raise OUT0 at once; the PIC sees that edge as any other.
    fn note_out0_edge(&mut self, out0_before: bool) {
        if !out0_before && self.counters[0].out(self.now_tick) {
            self.owe(1);
        }
    }

    pub(crate) fn read_port_b(&self) -> u8 {
        let refresh = ((self.now_ns / REFRESH_TOGGLE_NS) & 1) as u8;
        let out2 = u8::from(self.counters[2].out(self.now_tick));
        self.port_b | refresh << 4 | out2 << 5
    }

    pub(crate) fn write_port_b(&mut self, value: u8) {
        self.port_b = value & PORT_B_WRITABLE;
        self.counters[2].set_gate(value & PORT_B_GATE2 != 0, self.now_tick);
    }
}

#[cfg(test)]
mod tests;
