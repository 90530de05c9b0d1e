//! The real-time clock and CMOS memory of a PC: a Motorola MC146818 (data sheet "MC146818 Real-Time
//! Clock plus RAM").
//!
//! | port | name | access | reset | meaning |
//! |------|------|--------|-------|---------|
//! | 0x70 | index | w | 0 | bits 6..0 select a register, bit 7 (NMI mask) is ignored |
//! | 0x71 | data | rw | | the selected register |
//!
//! | index | register | access | reset |
//! |-------|----------|--------|-------|
//! | 0x00, 0x02, 0x04 | seconds, minutes, hours | rw | the time |
//! | 0x01, 0x03, 0x05 | alarm seconds, minutes, hours | rw | 0, stored only |
//! | 0x06 | day of week (1 = Sunday) | r | follows from the date |
//! | 0x07, 0x08, 0x09, 0x32 | day, month, year, century | rw | the date |
//! | 0x0a | A: divider and rate | rw, bit 7 (UIP) r | 0x26, UIP always 0 |
//! | 0x01, 0x03, 0x05 | alarm: seconds, minutes, hours | rw | 0; 0xc0 and more fit any |
//! | 0x0b | B: SET 7, alarm interrupt 5, update interrupt 4, binary 2, 24-hour 1, others stored | rw | 0x02 |
//! | 0x0c | C: IRQF 7, alarm 5, update 4; a read clears it | r | 0 |
//! | 0x0d | D: bit 7, RAM and time valid | r | 0x80 |
//! | others | RAM | rw | 0 |
//!
//! The time is `epoch_s + offset_s + now_ns / 10⁹`; a guest that sets the clock changes only the
//! offset. With SET held the registers are frozen and written freely, and count again when SET is
//! cleared.
//!
//! The chip asks for IRQ8 while a flag of C is set whose enable bit in B is set. Both flags are
//! looked at once a second, when the time moves on; a clock that is set past its alarm has missed
//! it.
//!
//! Not emulated: periodic interrupts, daylight saving, the update cycle
//! (UIP is never seen set, as if the guest always looked between two updates), dividers other than
//! 32.768 kHz.
//!
//! From outside: the time of day at power-on, or after a restore; guest time, through
//! [`Rtc::advance`].

use serde::{Deserialize, Serialize};

use crate::civil_time::{DateTime, UNIX_S_MAX};
use crate::state::InvalidState;

const NS_PER_S: u64 = 1_000_000_000;
const RAM_BYTES: usize = 128;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES_ALARM: u8 = 0x03;
const HOURS_ALARM: u8 = 0x05;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const REG_A_UIP: u8 = 0x80;
const REG_A_RESET: u8 = 0x26;
const REG_B_SET: u8 = 0x80;
/// Interrupt flags of register C, and their enable bits in B.
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const PERIODIC: u8 = 0x40;
const SQUARE_WAVE: u8 = 0x08;
const REG_C_IRQ: u8 = 0x80;
/// Alarm registers from here on fit any time.
const ANY: u8 = 0xc0;
const REG_B_BINARY: u8 = 0x04;
const REG_B_24_HOUR: u8 = 0x02;
const REG_D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;

/// What the clock remembers; plain data, checked when it becomes an [`Rtc`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    now_s: u64,
    epoch_s: u64,
    /// How far the guest has set the clock from `epoch_s + now_s`.
    offset_s: i64,
    /// The time registers while SET is held.
    frozen: Option<DateTime>,
    index: u8,
    /// Alarm and update flags of register C.
    flags: u8,
    /// Registers without a function of their own, by index ([`RAM_BYTES`] of them).
    ram: Vec<u8>,
}

/// The MC146818.
#[derive(Debug)]
pub(crate) struct Rtc {
    state: RtcState,
}

impl TryFrom<RtcState> for Rtc {
    type Error = InvalidState;

    fn try_from(state: RtcState) -> Result<Self, InvalidState> {
        InvalidState::check(state.ram.len() == RAM_BYTES, "rtc.ram")?;
        InvalidState::check(state.index < 0x80, "rtc.index")?;
        InvalidState::check(state.flags & !(ALARM | UPDATE) == 0, "rtc.flags")?;
        InvalidState::check(state.epoch_s <= UNIX_S_MAX, "rtc.epoch_s")?;
        InvalidState::check(state.offset_s.unsigned_abs() <= 2 * UNIX_S_MAX, "rtc.offset_s")?;
        let set = state.ram[usize::from(REG_B)] & REG_B_SET != 0;
        InvalidState::check(set == state.frozen.is_some(), "rtc.frozen")?;
        Ok(Rtc { state })
    }
}

impl Rtc {
    /// A clock that shows `epoch_s` (Unix seconds, at most [`UNIX_S_MAX`]) at guest time 0.
    pub(crate) fn new(epoch_s: u64) -> Self {
        let mut ram = vec![0; RAM_BYTES];
        ram[usize::from(REG_A)] = REG_A_RESET;
        ram[usize::from(REG_B)] = REG_B_24_HOUR;
        let epoch_s = epoch_s.min(UNIX_S_MAX);
        let state =
            RtcState { now_s: 0, epoch_s, offset_s: 0, frozen: None, index: 0, flags: 0, ram };
        Rtc { state }
    }

    pub(crate) fn save(&self) -> RtcState {
        self.state.clone()
    }

    /// Guest time moves on to `now_ns`.
    pub(crate) fn advance(&mut self, now_ns: u64) {
        let now_s = now_ns / NS_PER_S;
        let passed_s = now_s.saturating_sub(self.state.now_s);
        if passed_s > 0 && self.state.frozen.is_none() {
            self.state.flags |= UPDATE;
            if self.alarm_in_s().is_some_and(|alarm_s| alarm_s <= passed_s) {
                self.state.flags |= ALARM;
            }
        }
        self.state.now_s = now_s;
    }

    /// The RESET pin: interrupts off; time, alarm and memory stay.
    pub(crate) fn reset(&mut self) {
        self.state.flags = 0;
        self.state.index = 0;
        self.state.ram[usize::from(REG_B)] &= !(ALARM | UPDATE | PERIODIC | SQUARE_WAVE);
    }

    /// The time of day is `unix_s` now; how far the guest has set its clock from it stays.
    pub(crate) fn set_undisturbed(&mut self, unix_s: u64) {
        self.state.epoch_s = unix_s.min(UNIX_S_MAX).saturating_sub(self.state.now_s);
    }

    /// The level of the interrupt request.
    pub(crate) fn interrupt_line(&self) -> bool {
        self.state.flags & self.state.ram[usize::from(REG_B)] != 0
    }

    /// Guest time of the next interrupt that is wanted, in nanoseconds.
    #[inline]
    pub(crate) fn next_event_ns(&self) -> Option<u64> {
        // Asked several times at every exit, and hardly any guest wants one.
        if self.has_mode(UPDATE | ALARM) { self.wanted_event_ns() } else { None }
    }

    fn wanted_event_ns(&self) -> Option<u64> {
        if self.interrupt_line() || self.state.frozen.is_some() {
            return None;
        }
        let update_s = self.has_mode(UPDATE).then_some(1);
        let alarm_s = if self.has_mode(ALARM) { self.alarm_in_s() } else { None };
        let in_s = [update_s, alarm_s].into_iter().flatten().min()?;
        self.state.now_s.checked_add(in_s)?.checked_mul(NS_PER_S)
    }

    /// Seconds until the time of day next fits the alarm, at least one; `None` for an alarm no time
    /// fits.
    fn alarm_in_s(&self) -> Option<u64> {
        const DAY_S: u64 = 24 * 3600;
        let register = |index: u8| self.state.ram[usize::from(index)];
        let fits = |alarm: u8, decoded: u8, value: u64| alarm >= ANY || u64::from(decoded) == value;
        let (second, minute, hour) =
            (register(SECONDS_ALARM), register(MINUTES_ALARM), register(HOURS_ALARM));
        let now = self.time();
        let now_s = u64::from(now.hour) * 3600 + u64::from(now.minute) * 60 + u64::from(now.second);
        let mut at_s = now_s + 1;
        // To the next hour, minute and second that fits: some 200 steps at most.
        while at_s <= now_s + DAY_S {
            if !fits(hour, self.decode_hour(hour), at_s / 3600 % 24) {
                at_s = (at_s / 3600 + 1) * 3600;
            } else if !fits(minute, self.decode(minute), at_s / 60 % 60) {
                at_s = (at_s / 60 + 1) * 60;
            } else if !fits(second, self.decode(second), at_s % 60) {
                at_s += 1;
            } else {
                return Some(at_s - now_s);
            }
        }
        None
    }

    pub(crate) fn shows_guest_time(&self, now_ns: u64) -> bool {
        self.state.now_s == now_ns / NS_PER_S
    }

    fn undisturbed_s(&self) -> i64 {
        (self.state.epoch_s + self.state.now_s) as i64
    }

    fn time(&self) -> DateTime {
        self.state.frozen.unwrap_or_else(|| {
            let unix_s = self.undisturbed_s().saturating_add(self.state.offset_s);
            DateTime::from_unix_s(unix_s.clamp(0, UNIX_S_MAX as i64) as u64)
        })
    }

    /// A set of registers that is no date (the 31st of April on the way to the 1st of May) leaves
    /// the clock alone.
    fn set_time(&mut self, time: DateTime) {
        if let Some(unix_s) = time.to_unix_s() {
            self.state.offset_s = unix_s as i64 - self.undisturbed_s();
        }
    }

    pub(crate) fn write_index(&mut self, value: u8) {
        self.state.index = value & 0x7f;
    }

    pub(crate) fn read_data(&mut self) -> u8 {
        let time = self.time();
        match self.state.index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            DAY_OF_WEEK => self.encode(time.day_of_week()),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode((time.year % 100) as u8),
            CENTURY => self.encode((time.year / 100) as u8),
            REG_C => {
                let irq = if self.interrupt_line() { REG_C_IRQ } else { 0 };
                std::mem::take(&mut self.state.flags) | irq
            }
            REG_D => REG_D_VALID,
            index => self.state.ram[usize::from(index)],
        }
    }

    pub(crate) fn write_data(&mut self, value: u8) {
        let decoded = self.decode(value);
        let mut time = self.time();
        match self.state.index {
            SECONDS => time.second = decoded,
            MINUTES => time.minute = decoded,
            HOURS => time.hour = self.decode_hour(value),
            DAY => time.day = decoded,
            MONTH => time.month = decoded,
            YEAR => time.year = time.year / 100 * 100 + u16::from(decoded % 100),
            CENTURY => time.year = u16::from(decoded % 100) * 100 + time.year % 100,
            DAY_OF_WEEK | REG_C | REG_D => return,
            REG_A => {
                self.state.ram[usize::from(REG_A)] = value & !REG_A_UIP;
                return;
            }
            REG_B => return self.write_reg_b(value),
            index => {
                self.state.ram[usize::from(index)] = value;
                return;
            }
        }
        match &mut self.state.frozen {
            Some(frozen) => *frozen = time,
            None => self.set_time(time),
        }
    }

    fn write_reg_b(&mut self, value: u8) {
        let time = self.time();
        self.state.ram[usize::from(REG_B)] = value;
        if value & REG_B_SET != 0 {
            self.state.frozen = Some(time);
        } else if let Some(frozen) = self.state.frozen.take() {
            self.set_time(frozen);
        }
    }

    fn has_mode(&self, bit: u8) -> bool {
        self.state.ram[usize::from(REG_B)] & bit != 0
    }

    fn encode(&self, value: u8) -> u8 {
        if self.has_mode(REG_B_BINARY) { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.has_mode(REG_B_BINARY) {
            value
        } else {
            (value >> 4).saturating_mul(10).saturating_add(value & 0x0f)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.has_mode(REG_B_24_HOUR) {
            return self.encode(hour);
        }
        let pm = if hour % 24 >= 12 { HOUR_PM } else { 0 };
        self.encode((hour % 24 + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.has_mode(REG_B_24_HOUR) {
            return self.decode(value);
        }
        let hour = self.decode(value & !HOUR_PM) % 12;
        if value & HOUR_PM != 0 { hour + 12 } else { hour }
    }
}

#[cfg(test)]
mod tests;
