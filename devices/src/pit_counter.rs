//! One counter of the 8254 (data sheet 231164, "Mode Definitions"), as a function of the clock tick
//! it is looked at.
//!
//! Register table, what is not emulated and what enters from outside: see [`crate::pit`]. The
//! current tick is an argument of every function; a counter never moves by itself.
//!
//! A count written at tick t is loaded at the next clock, t + 1 (`Run::at_tick`). From there
//! `elapsed` ticks have passed, and with a count of N:
//!
//! | mode | counting element | OUT | rising edges of OUT after `at_tick` |
//! |------|------------------|-----|-------------------------------------|
//! | 0 interrupt on terminal count | N − elapsed | low until N | N |
//! | 1 one-shot, started by the gate | N − elapsed | low until N | N |
//! | 2 rate generator | N − elapsed mod N | low for the last tick of each period | every N |
//! | 3 square wave | steps of two, twice per period | high for ⌈N/2⌉, low for ⌊N/2⌋ | every N |
//! | 4 strobe, started by software | N − elapsed | low at N for one tick | N + 1 |
//! | 5 strobe, started by the gate | N − elapsed | low at N for one tick | N + 1 |

use serde::{Deserialize, Serialize};

use crate::state::InvalidState;

/// The count that 0 stands for.
const COUNT_MAX: u32 = 0x1_0000;

/// How the 16-bit count passes through the 8-bit port (control word bits 5 and 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

impl Access {
    fn bits(self) -> u8 {
        match self {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        }
    }
}

/// A count that is being counted down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    at_tick: u64,
    count: u32,
}

/// Everything one counter remembers; plain data, checked when it becomes a [`Counter`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitCounterState {
    /// Control word bits 5..0 as written, except the access mode.
    mode_bits: u8,
    bcd: bool,
    access: Access,
    /// The count register (1..=0x10000); `None` until a count has been written.
    count: Option<u32>,
    /// First byte of a two-byte write.
    first_byte: Option<u8>,
    read_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    run: Option<Run>,
    /// Modes 2 and 3: the count that takes over at the end of the current period.
    successor: Option<Run>,
    /// Elapsed ticks at the moment the gate stopped the counting (modes 0, 2, 3, 4).
    stopped_at_elapsed: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Counter {
    state: PitCounterState,
    gate: bool,
}

impl Counter {
    /// A counter that has not been programmed: the data sheet leaves this undefined; here OUT is
    /// high, no count.
    pub(crate) fn new(gate: bool) -> Self {
        let state = PitCounterState {
            mode_bits: 2,
            bcd: false,
            access: Access::LowThenHigh,
            count: None,
            first_byte: None,
            read_high_next: false,
            latched_count: None,
            latched_status: None,
            run: None,
            successor: None,
            stopped_at_elapsed: None,
        };
        Counter { state, gate }
    }

    pub(crate) fn save(&self) -> PitCounterState {
        self.state.clone()
    }

    pub(crate) fn restore(
        state: PitCounterState,
        now_tick: u64,
        gate: bool,
    ) -> Result<Self, InvalidState> {
        let count_ok = |count: u32| (1..=COUNT_MAX).contains(&count);
        InvalidState::check(state.mode_bits < 8, "pit.counter.mode_bits")?;
        InvalidState::check(state.count.is_none_or(count_ok), "pit.counter.count")?;
        for run in [state.run, state.successor].into_iter().flatten() {
            InvalidState::check(count_ok(run.count), "pit.counter.run.count")?;
        }
        let run_at = state.run.map(|run| run.at_tick);
        InvalidState::check(run_at.is_none_or(|at| at <= now_tick + 1), "pit.counter.run.at_tick")?;
        let counter = Counter { state, gate };
        if let Some(successor) = counter.state.successor {
            let boundary = counter.next_boundary(now_tick);
            let free_running = counter.is_periodic() && counter.state.stopped_at_elapsed.is_none();
            InvalidState::check(
                free_running && boundary == Some(successor.at_tick),
                "pit.counter.successor.at_tick",
            )?;
        }
        let stopped = counter.state.stopped_at_elapsed;
        InvalidState::check(
            stopped.is_none_or(|elapsed| !gate && run_at.is_some() && elapsed <= now_tick)
                && !(stopped.is_some() && counter.is_gate_started()),
            "pit.counter.stopped_at_elapsed",
        )?;
        Ok(counter)
    }

    /// Modes 6 and 7 are other spellings of 2 and 3.
    fn mode(&self) -> u8 {
        if self.state.mode_bits > 5 { self.state.mode_bits & 3 } else { self.state.mode_bits }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode(), 2 | 3)
    }

    fn is_gate_started(&self) -> bool {
        matches!(self.mode(), 1 | 5)
    }

    fn elapsed(&self, run: Run, tick: u64) -> u64 {
        self.state.stopped_at_elapsed.unwrap_or(tick.saturating_sub(run.at_tick))
    }

    /// Control word with an access mode: forgets the count, keeps only the gate (data sheet,
    /// "Programming").
    pub(crate) fn program(&mut self, control: u8) {
        let access = match control >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        self.state = PitCounterState {
            mode_bits: control >> 1 & 7,
            bcd: control & 1 != 0,
            access,
            ..Counter::new(self.gate).state
        };
    }

    /// Writes one byte of the count. Returns whether counting started over.
    pub(crate) fn write(&mut self, value: u8, tick: u64) -> bool {
        let count = match (self.state.access, self.state.first_byte.take()) {
            (Access::Low, _) => u32::from(value),
            (Access::High, _) => u32::from(value) << 8,
            (Access::LowThenHigh, Some(low)) => u32::from(value) << 8 | u32::from(low),
            (Access::LowThenHigh, None) => {
                self.state.first_byte = Some(value);
                // Mode 0: the first byte stops the counting and OUT goes low.
                if self.mode() == 0 {
                    self.state.run = None;
                    self.state.stopped_at_elapsed = None;
                }
                return false;
            }
        };
        let count = if count == 0 { COUNT_MAX } else { count };
        self.state.count = Some(count);
        if self.is_gate_started() {
            return false;
        }
        if self.is_periodic() && self.state.run.is_some() && self.gate {
            let boundary = self.next_boundary(tick);
            self.state.successor = boundary.map(|at_tick| Run { at_tick, count });
            return false;
        }
        self.start(count, tick);
        true
    }

    /// Loads `count` at the next clock.
    fn start(&mut self, count: u32, tick: u64) {
        self.state.run = Some(Run { at_tick: tick + 1, count });
        self.state.successor = None;
        self.state.stopped_at_elapsed = (!self.gate && !self.is_gate_started()).then_some(0);
    }

    pub(crate) fn set_gate(&mut self, gate: bool, tick: u64) {
        if gate == std::mem::replace(&mut self.gate, gate) {
            return;
        }
        let elapsed = self.state.run.map(|run| self.elapsed(run, tick));
        match (self.mode(), gate) {
            (1 | 5, true) | (2 | 3, true) => {
                if let Some(count) = self.state.count {
                    self.start(count, tick);
                }
            }
            (1 | 5, false) => {}
            (_, false) => {
                self.state.stopped_at_elapsed = elapsed;
                self.state.successor = None;
            }
            (_, true) => {
                // Modes 0 and 4 go on where the gate stopped them.
                if let (Some(run), Some(elapsed)) = (&mut self.state.run, elapsed) {
                    run.at_tick = if elapsed == 0 { tick + 1 } else { tick - elapsed.min(tick) };
                }
                self.state.stopped_at_elapsed = None;
            }
        }
    }

    /// Start of the next period after `tick` (periodic modes).
    fn next_boundary(&self, tick: u64) -> Option<u64> {
        let run = self.state.run?;
        let periods = self.elapsed(run, tick) / u64::from(run.count);
        Some(run.at_tick + (periods + 1) * u64::from(run.count))
    }

    /// Time moves from tick `from` to tick `to`; returns how many times OUT rose on the way. A
    /// successor due by then takes over. (The rising edge a gate causes is not counted: only
    /// counter 0 is asked, and its gate is tied high.)
    pub(crate) fn advance(&mut self, from: u64, to: u64) -> u64 {
        match self.state.successor {
            Some(successor) if successor.at_tick <= to => {
                let before = self.rising_edges(from, successor.at_tick);
                self.state.run = Some(successor);
                self.state.successor = None;
                before + self.rising_edges(successor.at_tick, to)
            }
            _ => self.rising_edges(from, to),
        }
    }

    /// Rising edges of OUT in `(from, to]` under the present count.
    fn rising_edges(&self, from: u64, to: u64) -> u64 {
        let Some(run) = self.state.run else { return 0 };
        let (before, after) = (self.elapsed(run, from), self.elapsed(run, to));
        let count = u64::from(run.count);
        match self.mode() {
            2 | 3 => after / count - before / count,
            0 | 1 => u64::from(before < count && count <= after),
            _ => u64::from(before < count + 1 && count < after),
        }
    }

    /// The tick of the first rising edge of OUT after `tick`.
    pub(crate) fn next_rising_edge(&self, tick: u64) -> Option<u64> {
        let run = self.state.run?;
        if self.state.stopped_at_elapsed.is_some() {
            return None;
        }
        let count = u64::from(run.count);
        let edge = match self.mode() {
            2 | 3 => return self.next_boundary(tick),
            0 | 1 => run.at_tick + count,
            _ => run.at_tick + count + 1,
        };
        (edge > tick).then_some(edge)
    }

    /// The OUT pin.
    pub(crate) fn out(&self, tick: u64) -> bool {
        let Some(run) = self.state.run else {
            return self.mode() != 0;
        };
        let (elapsed, count) = (self.elapsed(run, tick), u64::from(run.count));
        match self.mode() {
            0 | 1 => elapsed >= count,
            2 => !self.gate || elapsed % count != count - 1,
            3 => !self.gate || elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// The counting element, as a read would see it.
    fn value(&self, tick: u64) -> u16 {
        let Some(run) = self.state.run else {
            return self.state.count.unwrap_or(0) as u16;
        };
        let (elapsed, count) = (self.elapsed(run, tick), u64::from(run.count));
        match self.mode() {
            2 => (count - elapsed % count) as u16,
            3 => {
                let (phase, high_ticks) = (elapsed % count, count.div_ceil(2));
                let step = if phase < high_ticks { phase } else { phase - high_ticks };
                ((count & !1) - 2 * step) as u16
            }
            _ => count.wrapping_sub(elapsed) as u16,
        }
    }

    /// Latches the count; a latched one stays until it is read (data sheet, "Counter Latch
    /// Command").
    pub(crate) fn latch_count(&mut self, tick: u64) {
        if self.state.latched_count.is_none() {
            self.state.latched_count = Some(self.value(tick));
        }
    }

    /// Latches the status byte (data sheet, "Read-Back Command", figure 12).
    pub(crate) fn latch_status(&mut self, tick: u64) {
        if self.state.latched_status.is_none() {
            let null_count = match self.state.run {
                None => true,
                Some(run) => tick < run.at_tick || Some(run.count) != self.state.count,
            };
            self.state.latched_status = Some(
                u8::from(self.out(tick)) << 7
                    | u8::from(null_count) << 6
                    | self.state.access.bits() << 4
                    | self.state.mode_bits << 1
                    | u8::from(self.state.bcd),
            );
        }
    }

    /// Reads the counter's port: a latched status first, then a latched count, else the running
    /// count.
    pub(crate) fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.state.latched_status.take() {
            return status;
        }
        let value = self.state.latched_count.unwrap_or_else(|| self.value(tick));
        let [low, high] = value.to_le_bytes();
        let (byte, is_last) = match self.state.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::LowThenHigh => {
                let second = self.state.read_high_next;
                self.state.read_high_next = !second;
                if second { (high, true) } else { (low, false) }
            }
        };
        if is_last {
            self.state.latched_count = None;
        }
        byte
    }
}

#[cfg(test)]
mod tests;
