//! ACPI fixed hardware: PM timer, PM1 event and control registers (ACPI specification 6.5, §4.8.3).
//!
//! | port | name | access | reset | meaning |
//! |------|------|--------|-------|---------|
//! | 0x600 | PM1a status | rw1c | 0 | PWRBTN 8: the power button was pressed |
//! | 0x602 | PM1a enable | rw | 0 | TMR 0, GBL 5, PWRBTN 8, SLPBTN 9, RTC 10: stored only |
//! | 0x604 | PM1a control | rw | 0x0001 | SCI_EN 0 always set; BM_RLD 1, SLP_TYP 12..10 stored; SLP_EN 13 enters the state |
//! | 0x60c | GPE0 status | rw1c | 0 | 0: the generation identifier changed |
//! | 0x60d | GPE0 enable | rw | 0 | |
//! | 0x608 | PM timer | r | 0 | 3,579,545 counts a second, 32 bits wide (TMR_VAL_EXT) |
//!
//! Any width reaches these registers, byte by byte; the four bytes of the timer are of one moment.
//! The count is computed from guest time at each read, so that rounding never adds up: it is exact
//! to one count after any time.
//!
//! The SCI (interrupt [`SCI_IRQ`]) is asked for while a status bit is set whose enable bit is set.
//!
//! Not emulated: TMR_STS, the sleep button, the global lock's release, sleep states other than S5.
//!
//! From outside: guest time, the power button, a new generation identifier. A power-off is only
//! noted; the machine around the board carries it out.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::bus::FLOATING_BUS;
use crate::reset::PowerEvent;
use crate::state::InvalidState;

/// First port of the PM1a event block: status, then enable.
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// Bytes of the PM1a event block.
pub const PM1A_EVENT_BYTES: u8 = 4;
/// First port of the PM1a control block.
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// Bytes of the PM1a control block.
pub const PM1A_CONTROL_BYTES: u8 = 2;
/// First port of the PM timer.
pub const PM_TIMER_PORT: u16 = 0x608;
/// Bytes of the PM timer.
pub const PM_TIMER_BYTES: u8 = 4;
/// First port of the block of general-purpose events: status, then enable.
pub const GPE0_PORT: u16 = 0x60c;
/// Bytes of that block.
pub const GPE0_BYTES: u8 = 2;
/// The event that says that the generation identifier is another.
pub const GENERATION_EVENT: u8 = 0;
/// Where the guest reads its generation identifier: 16 bytes of guest memory, in the area of the
/// ACPI tables ("Virtual Machine Generation ID", Microsoft 2012).
pub const GENERATION_ID_ADDRESS: u64 = 0xf_f000;
/// Frequency of the PM timer in Hz: what Linux assumes (`PMTMR_TICKS_PER_SEC`), three times the
/// 8254's.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// Interrupt request of the system control interrupt.
pub const SCI_IRQ: u8 = 9;
/// What SLP_TYP says to switch off; the `\_S5` object names it.
pub const S5_SLEEP_TYPE: u8 = 5;

const BLOCK_BYTES: usize = 14;
const NS_PER_S: u128 = 1_000_000_000;
const POWER_BUTTON: u16 = 1 << 8;
const GPES: u8 = 1 << GENERATION_EVENT;
const STATUS_POSSIBLE: u16 = POWER_BUTTON;
const ENABLE_WRITABLE: u16 = 1 << 10 | 1 << 9 | 1 << 8 | 1 << 5 | 1;
const SCI_ENABLED: u16 = 1;
const CONTROL_WRITABLE: u16 = SLEEP_TYPE_MASK | 1 << 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;

/// What the registers remember; plain data, checked when it becomes an `AcpiPm` again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    status: u16,
    gpe_status: u8,
    gpe_enable: u8,
    enable: u16,
    control: u16,
    powered_off: bool,
}

/// The fixed hardware at ports 0x600..=0x60d.
#[derive(Debug)]
pub(crate) struct AcpiPm {
    state: AcpiPmState,
}

impl TryFrom<AcpiPmState> for AcpiPm {
    type Error = InvalidState;

    fn try_from(state: AcpiPmState) -> Result<Self, InvalidState> {
        InvalidState::check(state.status & !STATUS_POSSIBLE == 0, "acpi.status")?;
        let gpes = (state.gpe_status | state.gpe_enable) & !GPES;
        InvalidState::check(gpes == 0, "acpi.gpe")?;
        InvalidState::check(state.enable & !ENABLE_WRITABLE == 0, "acpi.enable")?;
        InvalidState::check(state.control & !CONTROL_WRITABLE == SCI_ENABLED, "acpi.control")?;
        Ok(AcpiPm { state })
    }
}

impl AcpiPm {
    pub(crate) fn new() -> Self {
        AcpiPm {
            state: AcpiPmState {
                status: 0,
                gpe_status: 0,
                gpe_enable: 0,
                enable: 0,
                control: SCI_ENABLED,
                powered_off: false,
            },
        }
    }

    pub(crate) fn save(&self) -> AcpiPmState {
        self.state.clone()
    }

    /// Offset of an access that lies completely in the registers.
    pub(crate) fn offset(port: u16, length: usize) -> Option<usize> {
        let offset = usize::from(port.checked_sub(PM1A_EVENT_PORT)?);
        (length > 0 && offset + length <= BLOCK_BYTES).then_some(offset)
    }

    /// Ports whose content depends on the time.
    pub(crate) const TIMER_PORTS: RangeInclusive<u16> = PM_TIMER_PORT..=PM_TIMER_PORT + 3;

    pub(crate) fn power_event(&self) -> Option<PowerEvent> {
        self.state.powered_off.then_some(PowerEvent::PowerOff)
    }

    /// The power button goes down and up.
    pub(crate) fn press_power_button(&mut self) {
        self.state.status |= POWER_BUTTON;
    }

    /// The generation identifier is another.
    pub(crate) fn announce_generation(&mut self) {
        self.state.gpe_status |= 1 << GENERATION_EVENT;
    }

    /// Whether a driver wants to hear of the power button.
    pub(crate) fn hears_power_button(&self) -> bool {
        self.state.enable & POWER_BUTTON != 0
    }

    /// The level of the SCI.
    pub(crate) fn interrupt_line(&self) -> bool {
        self.state.status & self.state.enable != 0
            || self.state.gpe_status & self.state.gpe_enable != 0
    }

    pub(crate) fn read(&self, offset: usize, now_ns: u64, data: &mut [u8]) {
        let mut block = [FLOATING_BUS; BLOCK_BYTES];
        block[0..2].copy_from_slice(&self.state.status.to_le_bytes());
        block[2..4].copy_from_slice(&self.state.enable.to_le_bytes());
        block[4..6].copy_from_slice(&self.state.control.to_le_bytes());
        block[12] = self.state.gpe_status;
        block[13] = self.state.gpe_enable;
        block[8..12].copy_from_slice(&timer_count(now_ns).to_le_bytes());
        data.copy_from_slice(&block[offset..offset + data.len()]);
    }

    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        let (mut enable, mut control) =
            (self.state.enable.to_le_bytes(), self.state.control.to_le_bytes());
        for (at, &byte) in (offset..).zip(data) {
            match at {
                0 | 1 => self.state.status &= !(u16::from(byte) << (8 * at)),
                2 | 3 => enable[at - 2] = byte,
                12 => self.state.gpe_status &= !byte,
                13 => self.state.gpe_enable = byte & GPES,
                4 | 5 => control[at - 4] = byte,
                _ => {}
            }
        }
        self.state.enable = u16::from_le_bytes(enable) & ENABLE_WRITABLE;
        let control = u16::from_le_bytes(control);
        let sleep_type = (control & SLEEP_TYPE_MASK) >> SLEEP_TYPE_SHIFT;
        if control & SLEEP_ENABLE != 0 && sleep_type == u16::from(S5_SLEEP_TYPE) {
            self.state.powered_off = true;
        }
        self.state.control = control & CONTROL_WRITABLE | SCI_ENABLED;
    }
}

fn timer_count(now_ns: u64) -> u32 {
    (u128::from(now_ns) * u128::from(PM_TIMER_HZ) / NS_PER_S) as u32
}

#[cfg(test)]
mod tests;
