//! The two ports through which a PC is reset.
//!
//! | port | name | access | reset | meaning |
//! |------|------|--------|-------|---------|
//! | 0x60 | i8042 data | rw | 0xff | no controller: reads all ones |
//! | 0x64 | i8042 status / command | r / w | 0x01 | command 0xfe pulses the processor's reset line |
//! | 0xcf9 | reset control | rw | 0 | bit 2 resets, bits 3 and 1 choose how (82371AB data sheet, §4.3) |
//!
//! The status register always says "output buffer full, input buffer empty" (IBM PC/AT Technical
//! Reference, "keyboard controller"). The empty input buffer lets a guest that is about to reset
//! send its command at once; the output buffer that cannot be emptied makes Linux's i8042 driver
//! report "No controller found" after a few reads, instead of polling half a second for each answer
//! of a controller that is not there.
//!
//! Not emulated: keyboard, mouse, A20 gate, the difference between soft, hard and full reset.
//!
//! From outside: nothing. A reset is only noted; the machine around the board carries it out.

use serde::{Deserialize, Serialize};

use crate::state::InvalidState;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const COMMAND_PULSE_RESET: u8 = 0xfe;
const CF9_RESET_CPU: u8 = 0x04;
const CF9_WRITABLE: u8 = 0x0e;

/// What the guest has asked the machine to do with itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerEvent {
    /// Reset, which is how a Linux guest reboots.
    Reset,
    /// Switch off.
    PowerOff,
    /// Nothing: its kernel has panicked.
    Panic,
}

/// What the reset ports remember; plain data, checked when it becomes a [`ResetPorts`] again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetState {
    reset_control: u8,
    event: Option<PowerEvent>,
}

/// Ports 0x60, 0x64 and 0xcf9.
#[derive(Debug)]
pub(crate) struct ResetPorts {
    state: ResetState,
}

impl TryFrom<ResetState> for ResetPorts {
    type Error = InvalidState;

    fn try_from(state: ResetState) -> Result<Self, InvalidState> {
        InvalidState::check(state.reset_control & !CF9_WRITABLE == 0, "reset.reset_control")?;
        Ok(ResetPorts { state })
    }
}

impl ResetPorts {
    pub(crate) fn new() -> Self {
        ResetPorts { state: ResetState { reset_control: 0, event: None } }
    }

    pub(crate) fn save(&self) -> ResetState {
        self.state.clone()
    }

    pub(crate) fn power_event(&self) -> Option<PowerEvent> {
        self.state.event
    }

    pub(crate) fn read_i8042_status(&self) -> u8 {
        STATUS_OUTPUT_FULL
    }

    pub(crate) fn write_i8042_command(&mut self, value: u8) {
        if value == COMMAND_PULSE_RESET {
            self.state.event = Some(PowerEvent::Reset);
        }
    }

    pub(crate) fn read_reset_control(&self) -> u8 {
        self.state.reset_control
    }

    pub(crate) fn write_reset_control(&mut self, value: u8) {
        if value & CF9_RESET_CPU != 0 {
            self.state.event = Some(PowerEvent::Reset);
        }
        self.state.reset_control = value & CF9_WRITABLE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyboard_controller_resets_only_on_its_pulse_command() {
        let mut ports = ResetPorts::new();
        for value in (0..=u8::MAX).filter(|value| *value != COMMAND_PULSE_RESET) {
            ports.write_i8042_command(value);
        }
        assert_eq!(ports.power_event(), None);
        ports.write_i8042_command(COMMAND_PULSE_RESET);
        assert_eq!(ports.power_event(), Some(PowerEvent::Reset));
    }

    #[test]
    fn status_lets_linux_send_a_reset_and_give_up_on_a_keyboard() {
        const INPUT_FULL: u8 = 0x02;
        let status = ResetPorts::new().read_i8042_status();
        assert_eq!(status & INPUT_FULL, 0);
        assert_eq!(status & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
    }

    #[test]
    fn reset_control_resets_on_bit_2() {
        let mut ports = ResetPorts::new();
        ports.write_reset_control(0x02);
        assert_eq!(ports.power_event(), None);
        assert_eq!(ports.read_reset_control(), 0x02);
        ports.write_reset_control(0x06);
        assert_eq!(ports.power_event(), Some(PowerEvent::Reset));
    }

    #[test]
    fn saved_state_is_checked() {
        let state = ResetState { reset_control: 0x0e, event: Some(PowerEvent::Reset) };
        assert_eq!(ResetPorts::try_from(state.clone()).unwrap().save(), state);
        let bad = ResetState { reset_control: 0x10, ..state };
        assert_eq!(ResetPorts::try_from(bad).unwrap_err().field, "reset.reset_control");
    }
}
